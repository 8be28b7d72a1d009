"""Steps with absent tasks equal those of T layers in a loop, where what did not run has no gradient."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import ranks
import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

from tsbn_kernels import (
    FusedTSigmaBN2d,
    MultiTaskModel,
    convert_model,
    hold_absent_tasks,
    parameter_groups,
    shard_tasks,
)

pytestmark = pytest.mark.usefixtures("one_thread")

T, N, C = 3, 2, 4
OPTIMISERS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "lr": 0.1},
    "Rprop": {"lr": 0.01},
    **{
        name: {"lr": 0.1, "weight_decay": 0.1}
        for name in (
            "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "ASGD", "Adafactor",
        )
    },
}  # fmt: skip
Make = Callable[[Any], torch.optim.Optimizer]


def optimiser(name: str, **options: Any) -> Make:
    return lambda parameters: getattr(torch.optim, name)(parameters, **OPTIMISERS[name] | options)


class Pair:
    """A layer whose absent tasks are held, and the same as a loop, each with an optimiser."""

    def __init__(self, make: Make, dtype: torch.dtype = torch.float64) -> None:
        self.layer = FusedTSigmaBN2d(T, C, gate="identity", bias=True, dtype=dtype)
        self.loop = nn.ModuleList(nn.BatchNorm2d(C, dtype=dtype) for _ in range(T))
        self.optimisers = make(self.layer.parameters()), make(self.loop.parameters())
        self.dtype = dtype
        hold_absent_tasks(self.optimisers[0], self.layer)

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        for one in self.optimisers:
            one.zero_grad(set_to_none)

    def losses(self, tasks: list[int], form: str, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """Of the layer and of the loop; of the layer with ``tasks=``, or from some of all its streams."""
        streams = torch.randn(T, N, C, 3, 3, dtype=self.dtype)
        upstream = factor * torch.randn(T, N, C, 3, 3, dtype=self.dtype)
        if form == "tasks":
            got = (self.layer(streams[tasks].flatten(0, 1), tasks=tasks) * upstream[tasks].flatten(0, 1)).sum()
        else:
            ys = self.layer.streams(streams.flatten(0, 1))
            got = sum((ys[t] * upstream[t]).sum() for t in tasks)
        return got, sum((self.loop[t](streams[t]) * upstream[t]).sum() for t in tasks)

    def backward(self, *args: Any, **options: Any) -> None:
        for loss in self.losses(*args, **options):
            loss.backward()

    def step(self) -> None:
        for one in self.optimisers:
            one.step()

    def assert_equal(self) -> None:
        for name in ("weight", "bias"):
            stacked = torch.stack([getattr(one, name) for one in self.loop])
            torch.testing.assert_close(getattr(self.layer, name), stacked, rtol=1e-9, atol=1e-9)


SCHEDULE = [([0], "tasks"), ([1], "streams"), ([2, 0], "tasks"), ([1], "tasks"), ([2, 0], "streams"), ([1], "tasks")]


@pytest.mark.parametrize("options", [{}, {"foreach": True}])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_optimiser_does_as_in_a_loop(name: str, options: dict[str, Any]) -> None:
    pair = Pair(optimiser(name, **options))
    for tasks, form in SCHEDULE * 2:
        pair.zero_grad()
        pair.backward(tasks, form)
        pair.step()
        pair.assert_equal()


@pytest.mark.parametrize("options", [{"fused": True}, {"amsgrad": True}, {"maximize": True}])
def test_variants_of_adam(options: dict[str, Any]) -> None:
    pair = Pair(optimiser("Adam", **options))
    for tasks, form in SCHEDULE:
        pair.zero_grad()
        pair.backward(tasks, form)
        pair.step()
        pair.assert_equal()


def test_without_it_absent_tasks_move() -> None:
    """What the documents say: the test that the others could fail."""
    layer = FusedTSigmaBN2d(T, C)
    steps = torch.optim.Adam(parameter_groups(layer, lr=1e-3))
    for tasks in ([0], [1]):
        before = layer.weight.detach().clone()
        steps.zero_grad()
        x = torch.randn(N, C, 3, 3)
        layer(x, tasks=tasks).backward(torch.randn_like(x))
        steps.step()
    assert (layer.weight[0] != before[0]).all()
    assert torch.equal(layer.weight[2], before[2])  # Adam has no moments of it yet


@pytest.mark.parametrize("form", ["tasks", "streams"])
def test_a_task_that_ran_with_a_gradient_of_zero_took_part(form: str) -> None:
    """Its loss was masked, say: in a loop its gradient is zero, not None, and momentum goes on."""
    pair = Pair(optimiser("Adam"))
    pair.backward([0, 1], form)
    pair.step()
    for tasks, factor in (([0], 0.0), ([2], 1.0), ([0], 0.0)):
        pair.zero_grad()
        pair.backward(tasks, form, factor)
        pair.step()
        pair.assert_equal()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_of_several_passes_add_up(set_to_none: bool) -> None:
    pair = Pair(optimiser("AdamW"))
    moved = pair.layer.weight.detach().clone()
    for passes in ([([0], "tasks"), ([2], "streams")], [([1], "streams"), ([1], "tasks")], [([0], "streams")]):
        for one in pair.optimisers:
            one.zero_grad(set_to_none)
        if not set_to_none:
            pair.optimisers[1].zero_grad()
        for tasks, form in passes:
            pair.backward(tasks, form)
        nn.utils.clip_grad_norm_(pair.layer.parameters(), 1.0)
        nn.utils.clip_grad_norm_(pair.loop.parameters(), 1.0)
        pair.step()
        pair.assert_equal()
    assert (pair.layer.weight != moved).all()


def test_zeroed_without_a_step_is_forgotten() -> None:
    """A step that is skipped, as for a loss of NaN."""
    for set_to_none in (True, False):
        pair = Pair(optimiser("Adam"))
        pair.backward([0, 1, 2], "tasks")
        pair.step()
        pair.zero_grad()
        pair.backward([0], "tasks")
        pair.optimisers[0].zero_grad(set_to_none)
        pair.optimisers[1].zero_grad()
        pair.backward([1], "streams")
        pair.step()
        pair.assert_equal()


def test_a_second_step_with_the_same_gradients() -> None:
    pair = Pair(optimiser("Adam"))
    for tasks in ([0, 1, 2], [1]):
        pair.zero_grad()
        pair.backward(tasks, "tasks")
        for _ in range(3):
            pair.step()
            pair.assert_equal()


def test_a_pass_that_brings_no_gradient_of_the_layer() -> None:
    """Weighting methods ask for gradients of shared parameters, from each loss by itself, over one graph."""
    pair = Pair(optimiser("Adam"))
    pair.backward([0, 1, 2], "tasks")
    pair.step()
    pair.zero_grad()
    x = torch.randn(T * N, C, 3, 3, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(T, N, C, 3, 3, dtype=torch.float64)
    ys = pair.layer.streams(x)
    torch.autograd.grad(ys[0], x, dy[0], retain_graph=True)
    ys[1].backward(dy[1], retain_graph=True)
    pair.loop[1](x.detach()[N : 2 * N]).backward(dy[1])
    pair.step()
    pair.assert_equal()
    pair.zero_grad()
    ys = pair.layer.streams(x)
    for t in (2, 1):  # twice over one graph
        ys[t].backward(dy[t], retain_graph=True)
        pair.loop[t](x.detach()[t * N : (t + 1) * N]).backward(dy[t])
    pair.step()
    pair.assert_equal()


def test_a_penalty_on_the_gates_moves_all_of_them() -> None:
    pair = Pair(optimiser("SGD"))
    for tasks in ([0], [1]):
        pair.zero_grad()
        pair.backward(tasks, "tasks")
        (0.1 * pair.layer.gates.square()).sum().backward()
        sum((0.1 * one.weight.square()).sum() for one in pair.loop).backward()
        pair.layer.bias.grad[[t for t in range(T) if t not in tasks]] = 0  # the loop has None there
        for name in ("weight",):
            pair.step()
            stacked = torch.stack([getattr(one, name) for one in pair.loop])
            torch.testing.assert_close(getattr(pair.layer, name), stacked)


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients_and_steps_that_are_left_out(fused: bool) -> None:
    pair = Pair(optimiser("Adam", fused=fused), torch.float32)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1) for _ in range(2)]
    for index, (tasks, form) in enumerate(SCHEDULE):
        pair.zero_grad()
        losses = pair.losses(tasks, form, float("inf") if index == 2 else 1.0)
        for loss, scaler, one in zip(losses, scalers, pair.optimisers, strict=True):
            scaler.scale(loss).backward()
            scaler.step(one)
            scaler.update()
        for name in ("weight", "bias"):
            stacked = torch.stack([getattr(one, name) for one in pair.loop])
            torch.testing.assert_close(getattr(pair.layer, name), stacked, rtol=1e-4, atol=1e-5)
    assert scalers[0].get_scale() == scalers[1].get_scale()


def test_a_closure() -> None:
    """As Lightning calls the optimiser."""
    pair = Pair(optimiser("Adam"))
    for tasks, form in SCHEDULE:
        losses = iter(pair.losses(tasks, form))
        for one in pair.optimisers:

            def closure(one: Any = one, losses: Any = losses) -> Tensor:
                one.zero_grad()
                loss: Tensor = next(losses)
                loss.backward()
                return loss

            assert isinstance(one.step(closure), Tensor)
        pair.assert_equal()


def test_a_closure_that_raises_leaves_the_optimiser_whole() -> None:
    pair = Pair(optimiser("Adam"))

    def closure() -> Tensor:
        raise MemoryError

    pair.backward([0], "tasks")
    for one in pair.optimisers:
        with pytest.raises(MemoryError):
            one.step(closure)
    assert pair.optimisers[0].param_groups[0]["params"] == list(pair.layer.parameters())
    pair.step()
    pair.assert_equal()


class Raises(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        if any(group["lr"] > 1 for group in self.param_groups):
            raise MemoryError
        super().step(closure)


def test_a_step_that_raises_is_noticed() -> None:
    layer = FusedTSigmaBN2d(T, C)
    steps = Raises(layer.parameters(), lr=2.0)
    hold_absent_tasks(steps, layer)
    layer(torch.randn(N, C, 3, 3), tasks=[1]).sum().backward()
    with pytest.raises(MemoryError):
        steps.step()
    with pytest.raises(MemoryError):
        steps.step()
    steps.param_groups[0]["lr"] = 0.1
    steps.zero_grad()
    with pytest.raises(RuntimeError, match="an earlier step of the optimiser raised"):
        steps.step()
    assert steps.param_groups[0]["params"] == [layer.weight]
    before = layer.weight.detach().clone()
    steps.step()
    assert (layer.weight != before).any(1).tolist() == [False, True, False]


def test_saved_for_the_backward_pass_is_known_to_have_changed() -> None:
    layer = FusedTSigmaBN2d(T, C)
    steps = torch.optim.SGD(layer.parameters(), lr=0.1)
    hold_absent_tasks(steps, layer)
    x = torch.randn(T * N, C, 3, 3)
    y = layer(x)
    y.backward(torch.randn_like(x), retain_graph=True)
    steps.step()
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        y.backward(torch.randn_like(x))


# ---- networks ------------------------------------------------------------------------------------------------------


def backbone() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.ReLU(), nn.Conv2d(C, C, 3), nn.BatchNorm2d(C), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


class Loop(nn.Module):
    """The model as T networks that share their convolutions."""

    def __init__(self, model: MultiTaskModel) -> None:
        super().__init__()
        first = copy.deepcopy(model.backbone)
        self.shared = nn.ModuleList([first[0], first[3]])
        self.norms = nn.ModuleList(
            nn.ModuleList(plain_norm(layer, t) for layer in (first[1], first[4])) for t in range(T)
        )
        self.heads = nn.ModuleList(copy.deepcopy(head) for head in model.heads.values())

    def forward(self, x: Tensor, t: int) -> Tensor:
        for conv, norm in zip(self.shared, self.norms[t], strict=True):
            x = norm(conv(x)).relu()
        return self.heads[t](x.mean((2, 3)))  # type: ignore[no-any-return]


def plain_norm(layer: FusedTSigmaBN2d, t: int) -> nn.Module:
    one = nn.BatchNorm2d(C, dtype=torch.float64)
    with torch.no_grad():
        one.weight.copy_(layer.weight[t])
    return one


def multitask() -> MultiTaskModel:
    torch.manual_seed(1)
    converted = convert_model(backbone(), T, variant="tsbn", pretrained=False)
    return MultiTaskModel(converted, {name: nn.Linear(C, 2) for name in "abc"}).double()


@pytest.mark.parametrize("losses", ["of what ran", "of some"])
@pytest.mark.parametrize("how", ["eager", "compiled", "reentrant", "checkpointed"])
def test_a_model_that_runs_some_tasks(how: str, losses: str) -> None:
    """Or all of them, of which some have a loss: their gradients come through one stack, and tell no more."""
    if losses == "of some" and how in ("compiled", "reentrant"):
        pytest.skip("there all that ran took part, as hold_absent_tasks() says")
    model = multitask()
    loop = Loop(model)
    steps = [torch.optim.AdamW(parameter_groups(network, 1e-2, weight_decay=0.1)) for network in (model, loop)]
    for group in (*steps[0].param_groups, *steps[1].param_groups):
        group.update(lr=1e-2, weight_decay=0.1)
    hold_absent_tasks(steps[0], model)
    call: Any = torch.compile(model, backend="aot_eager") if how == "compiled" else model
    if how in ("reentrant", "checkpointed"):
        block = copy.copy(model.backbone[3:])
        inner = block.forward
        block.forward = lambda x: checkpoint(inner, x, use_reentrant=how == "reentrant")
        model.backbone = nn.Sequential(*model.backbone[:3], block)
    for names in ("a", "bc", "a", "b", "abc", "c"):
        x, dy = torch.randn(N, 3, 7, 7, dtype=torch.float64), torch.randn(T, N, 2, dtype=torch.float64)
        for one in steps:
            one.zero_grad()
        outputs = call(x, tasks=list(names) if losses == "of what ran" else None)
        sum((outputs[name] * dy["abc".index(name)]).sum() for name in names).backward()
        sum((loop(x, "abc".index(name)) * dy["abc".index(name)]).sum() for name in names).backward()
        for one in steps:
            one.step()
        layers = [layer for layer in model.modules() if isinstance(layer, FusedTSigmaBN2d)]
        for index, layer in enumerate(layers):
            for name in ("weight", "bias"):
                stacked = torch.stack([getattr(norms[index], name) for norms in loop.norms])
                torch.testing.assert_close(getattr(layer, name), stacked, rtol=1e-7, atol=1e-9)


def test_passes_in_several_threads() -> None:
    """Four threads add gradients to one layer, before one step."""
    pair = Pair(optimiser("Adam"))
    pair.backward([0, 1, 2], "tasks")
    pair.step()
    for _ in range(5):
        pair.zero_grad()
        pairs = [pair.losses([t], form) for t in (0, 2) for form in ("tasks", "streams")]
        threads = [threading.Thread(target=loss.backward) for loss, _ in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for _, loss in pairs:
            loss.backward()
        pair.step()
        pair.assert_equal()


# ---- states and copies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Adam", "SGD", "NAdam"])
def test_states_pass_through_a_file(name: str, tmp_path: Any) -> None:
    pairs = [Pair(optimiser(name)) for _ in range(2)]
    for pair in pairs:
        torch.manual_seed(3)
        for step, (tasks, form) in enumerate(SCHEDULE):
            if pair is pairs[1] and step == 3:  # goes on from a file
                torch.save([one.state_dict() for one in pair.optimisers], tmp_path / "state.pt")
                for one in pair.optimisers:
                    one.state.clear()
                states = torch.load(tmp_path / "state.pt", weights_only=True)
                for one, state in zip(pair.optimisers, states, strict=True):
                    one.load_state_dict(state)
            pair.zero_grad()
            pair.backward(tasks, form)
            pair.step()
            pair.assert_equal()
    torch.testing.assert_close(pairs[0].layer.weight, pairs[1].layer.weight)


def test_a_state_of_before_is_taken_apart() -> None:
    """From a run that held nothing: all tasks have taken all steps."""
    before = FusedTSigmaBN2d(T, C, gate="identity", bias=True, dtype=torch.float64)
    pair = Pair(optimiser("Adam"))
    steps = optimiser("Adam")(before.parameters())
    x, dy = torch.randn(2, T * N, C, 3, 3, dtype=torch.float64)
    before(x).backward(dy)
    steps.step()
    for t in range(T):
        pair.loop[t](x.unflatten(0, (T, N))[t]).backward(dy.unflatten(0, (T, N))[t])
    pair.optimisers[1].step()
    pair.layer.load_state_dict(before.state_dict())
    pair.optimisers[0].load_state_dict(steps.state_dict())
    for tasks, form in SCHEDULE:
        pair.zero_grad()
        pair.backward(tasks, form)
        pair.step()
        pair.assert_equal()


def test_what_cannot_be_taken_apart_says_so() -> None:
    layer = FusedTSigmaBN2d(T, C)
    steps = torch.optim.Adafactor(layer.parameters())  # factors a matrix, where a loop has vectors
    for held in (False, True):
        if held:
            hold_absent_tasks(steps, layer)
        layer(torch.randn(T * N, C, 3, 3)).square().sum().backward()
        if held:
            with pytest.raises(ValueError, match=r"'row_var' of shape \[3, 1\].*before the first step"):
                steps.step()
        else:
            steps.step()


def test_states_by_name() -> None:
    """As distributed checkpoints are made of; the first run of a new process makes the states itself."""
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    models = [nn.Sequential(FusedTSigmaBN2d(T, C)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    steps = [torch.optim.Adam(model.parameters(), lr=0.1) for model in models]
    for model, one in zip(models, steps, strict=True):
        hold_absent_tasks(one, model)
    passes = [(torch.randn(N, C, 3, 3), torch.randn(N, C, 3, 3), [t]) for t in (0, 1, 2, 1, 0)]

    def train(index: int, some: Any) -> None:
        for x, dy, tasks in some:
            steps[index].zero_grad()
            models[index][0](x, tasks=tasks).backward(dy)
            steps[index].step()

    train(0, passes[:3])
    state = get_optimizer_state_dict(models[0], steps[0], options=flat)
    assert state["state.0.weight.step"].tolist() == [1.0] * T
    models[1].load_state_dict(models[0].state_dict())
    set_optimizer_state_dict(models[1], steps[1], copy.deepcopy(state), options=flat)
    for index in range(2):
        train(index, passes[3:])
    assert torch.equal(models[0][0].weight, models[1][0].weight)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_not_watched(duplicate: Any) -> None:
    pair = Pair(optimiser("Adam"))
    other = duplicate(pair.layer)
    assert other._participation is None
    other(torch.randn(T * N, C, 3, 3).double()).square().sum().backward()
    assert pair.layer._participation is not None
    assert pair.layer._participation.rows is None
    hold_absent_tasks(torch.optim.Adam(other.parameters()), other)


def test_two_optimisers_of_one_model() -> None:
    layer = FusedTSigmaBN2d(T, C, bias=True)
    steps = [torch.optim.Adam([parameter], lr=0.1) for parameter in layer.parameters()]
    for one in steps:
        hold_absent_tasks(one, layer)
    before = {}
    for tasks in ([0], [1]):
        for one in steps:
            one.zero_grad()
        layer(torch.randn(N, C, 3, 3), tasks=tasks).square().sum().backward()
        before = {name: tensor.detach().clone() for name, tensor in layer.named_parameters()}
        for one in steps:
            one.step()
    for name, tensor in layer.named_parameters():
        assert torch.equal(tensor[0], before[name][0]), name
        assert not torch.equal(tensor[1], before[name][1]), name


def test_tied_and_pruned_weights() -> None:
    first, second = FusedTSigmaBN2d(T, C), FusedTSigmaBN2d(T, C)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    model.append(FusedTSigmaBN2d(T, C))
    prune.random_unstructured(model[2], "weight", 0.1)
    steps = torch.optim.Adam(model.parameters(), lr=0.1)
    hold_absent_tasks(steps, model)
    for tasks in ((0, 1), (2, 2)):
        steps.zero_grad()
        x = torch.randn(N, C, 3, 3)
        for layer, task in zip(model, (*tasks, tasks[0]), strict=True):
            layer(x, tasks=[task]).backward(torch.randn_like(x))
        before = [parameter.detach().clone() for parameter in model.parameters()]
        steps.step()
        tied, masked = ((p != b).any(1).tolist() for p, b in zip(model.parameters(), before, strict=True))
        assert tied == [t in tasks for t in range(T)]
        assert masked == [t == tasks[0] for t in range(T)]


def test_all_is_freed() -> None:
    layer = FusedTSigmaBN2d(T, C)
    steps = torch.optim.Adam(layer.parameters())
    hold_absent_tasks(steps, layer)
    layer(torch.randn(T * N, C, 3, 3)).square().sum().backward()
    steps.step()
    references = [weakref.ref(layer), weakref.ref(layer.weight), weakref.ref(steps)]
    del layer, steps
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


def test_errors() -> None:
    layer = FusedTSigmaBN2d(T, C)
    steps = torch.optim.Adam(layer.parameters())
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got"):
        hold_absent_tasks(layer, steps)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        hold_absent_tasks(steps, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="LBFGS"):
        hold_absent_tasks(torch.optim.LBFGS(layer.parameters()), layer)
    with pytest.raises(ValueError, match="trains no parameter of a task-specific layer"):
        hold_absent_tasks(steps, FusedTSigmaBN2d(T, C))
    hold_absent_tasks(steps, layer)
    with pytest.raises(ValueError, match="holds absent tasks already"):
        hold_absent_tasks(steps, layer)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    with pytest.raises(ValueError, match="'' is parametrized"):
        hold_absent_tasks(torch.optim.Adam(layer.parameters()), layer)


# ---- processes -----------------------------------------------------------------------------------------------------


def case_ddp(wrapped: bool) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    layer = FusedTSigmaBN2d(T, C, gate="identity", dtype=torch.float64)
    model = nn.parallel.DistributedDataParallel(layer)
    steps = torch.optim.Adam(model.parameters(), lr=0.1)
    hold_absent_tasks(steps, model if wrapped else layer, None if wrapped else "world")
    loop = nn.ModuleList(nn.BatchNorm2d(C, dtype=torch.float64) for _ in range(T))
    steps_of_loop = torch.optim.Adam([one.weight for one in loop], lr=0.1)
    rank = distributed.get_rank()
    for tasks, factors in (((0, 1), (1, 1)), ((2, 2), (1, 1)), ((0, 1), (0, 1)), ((1, 1), (1, 0))):
        steps.zero_grad()
        steps_of_loop.zero_grad()
        xs, dys = torch.randn(2, 2, N, C, 3, 3, dtype=torch.float64)
        model(xs[rank], tasks=[tasks[rank]]).backward(factors[rank] * dys[rank])
        for part in range(2):
            loop[tasks[part]](xs[part]).backward(factors[part] * dys[part] / 2)
        steps.step()
        steps_of_loop.step()
    return layer.weight.detach(), torch.stack([one.weight.detach() for one in loop])


@pytest.mark.parametrize("wrapped", [True, False])
def test_ranks_agree_on_what_took_part(wrapped: bool) -> None:
    """One rank has a gradient of zero for a task that the other did not run."""
    (got, expected), (other, _) = ranks.run(case_ddp, 2, wrapped)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(got, other)


def case_sharded() -> tuple[Tensor, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh

    torch.manual_seed(0)
    model = multitask()
    one = copy.deepcopy(model)
    shard_tasks(model, init_device_mesh("cpu", (2,), mesh_dim_names=("tasks",)))
    steps = [torch.optim.Adam(parameter_groups(network, 1e-2)) for network in (model, one)]
    for network, optimizer in zip((model, one), steps, strict=True):
        hold_absent_tasks(optimizer, network)
    names = list(model.heads)
    for schedule in ("abc", "a", "b", "ac"):
        for optimizer in steps:
            optimizer.zero_grad()
        x, dy = torch.randn(N, 3, 7, 7, dtype=torch.float64), torch.randn(T, N, 2, dtype=torch.float64)
        for network, tasks in ((model, [name for name in schedule if name in names]), (one, list(schedule))):
            if not tasks:  # every rank runs a pass
                sum(0.0 * p.sum() for p in network.backbone[0].parameters()).backward()
                continue
            outputs = network(x, tasks=tasks)
            sum((outputs[name] * dy["abc".index(name)]).sum() for name in tasks).backward()
        for optimizer in steps:
            optimizer.step()
    layer, whole = model.backbone[1].weight, one.backbone[1].weight
    return layer.full_tensor().detach(), whole.detach()


def test_sharded_tasks() -> None:
    for got, expected in ranks.run(case_sharded, 2):
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


def case_fsdp() -> None:
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(nn.Sequential(FusedTSigmaBN2d(T, C)))
    with pytest.raises(TypeError, match=r"'0' are sharded, and not by shard_tasks\(\)"):
        hold_absent_tasks(torch.optim.Adam(model.parameters()), model)


def test_parameters_without_rows_are_refused() -> None:
    ranks.run(case_fsdp, 2)
