"""Models that get further tasks and lose some, beside loops to which layers are added, through steps on both sides."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.holding import KINDS, OPTIMISERS, C, N, T, optimiser
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from tsbn_kernels import (
    FusedTSigmaBN2d,
    FusedTSigmaLN,
    FusedTSigmaRMSNorm,
    LateFanOut,
    MultiTaskModel,
    add_task,
    convert_model,
    hold_absent_tasks,
    parameter_groups,
    remove_task,
)

STATISTICS = "running_mean", "running_var", "num_batches_tracked"


class Loop:
    """Layers of one task each, every one with an optimiser of its own: one more is one that is new, or a copy."""

    def __init__(self, kind: str, name: str) -> None:
        self.kind, self.make = kind, optimiser(name)
        self.layers: list[Any] = []
        self.optimisers: list[torch.optim.Optimizer] = []
        for _ in range(T):
            self.add(None)

    def add(self, like: int | None) -> None:
        _, plain, shape = KINDS[self.kind]
        layer = plain(shape, dtype=torch.float64) if like is None else copy.deepcopy(self.layers[like])
        one = self.make(layer.parameters())
        if like is not None:
            one.load_state_dict(copy.deepcopy(self.optimisers[like].state_dict()))
        self.layers.append(layer)
        self.optimisers.append(one)

    def remove(self, task: int) -> None:
        del self.layers[task], self.optimisers[task]


class Both:
    """A layer of T tasks with its optimiser, and the loop."""

    def __init__(self, kind: str, name: str, *, held: bool) -> None:
        fused, _, shape = KINDS[kind]
        self.layer = fused(T, shape, gate="identity", bias=True, dtype=torch.float64)
        self.optimiser = optimiser(name)(self.layer.parameters())
        if held:
            hold_absent_tasks(self.optimiser, self.layer)
        self.loop = Loop(kind, name)

    def step(self, *absent: int) -> None:
        tasks = [task for task in range(len(self.loop.layers)) if task not in absent]
        for one in (self.optimiser, *self.loop.optimisers):
            one.zero_grad()
        x, dy = torch.randn(2, len(tasks), N, C, 3, 3, dtype=torch.float64)
        self.layer(x.flatten(0, 1), tasks=tasks).backward(dy.flatten(0, 1))
        for row, task in enumerate(tasks):
            self.loop.layers[task](x[row]).backward(dy[row])
        for one in (self.optimiser, *self.loop.optimisers):
            one.step()

    def add(self, like: int | None) -> None:
        add_task(self.layer, like=like, optimizer=self.optimiser)
        self.loop.add(like)

    def remove(self, task: int) -> None:
        remove_task(self.layer, task, optimizer=self.optimiser)
        self.loop.remove(task)

    def assert_equal(self) -> None:
        assert self.layer.num_tasks == len(self.loop.layers)
        for name in self.layer.state_dict():
            stacked = torch.stack([getattr(one, name) for one in self.loop.layers])
            torch.testing.assert_close(getattr(self.layer, name).detach(), stacked, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted({*OPTIMISERS} - {"Adafactor"}))
def test_steps_of_held_tasks_equal_a_loop(name: str, kind: str) -> None:
    both = Both(kind, name, held=True)
    both.step()
    both.step(0)
    both.add(None)
    both.step(1)
    both.add(1)
    both.step()
    both.step(3, 0)
    both.remove(0)
    both.step(1)
    both.add(None)
    both.remove(-3)
    both.step()
    both.assert_equal()


@pytest.mark.parametrize("name", sorted({*OPTIMISERS} - {"Adafactor"}))
def test_steps_of_all_tasks_equal_a_loop(name: str) -> None:
    """Without a count for each task a fresh one goes on with the others', where an optimiser counts."""
    both = Both("BN", name, held=False)
    both.step()
    both.step()
    if name in ("SGD", "Adagrad", "Adadelta", "RMSprop", "Rprop"):
        if name == "SGD":  # dampens all steps but the first
            for one in (both.optimiser, *both.loop.optimisers):
                one.param_groups[0]["dampening"] = 0
            both.loop.make = optimiser("SGD", dampening=0)
        both.add(None)
        both.step()
    both.add(1)
    both.step()
    both.remove(0)
    both.step()
    both.assert_equal()


@pytest.mark.parametrize(
    "layer",
    [
        FusedTSigmaBN2d(T, C, bias="frozen"),
        FusedTSigmaBN2d(T, C, track_running_stats=False),
        FusedTSigmaLN(T, (3, C), bias=True),
        FusedTSigmaRMSNorm(T, C),
    ],
    ids=str,
)
def test_layers(layer: Any) -> None:
    """What was there stays to the bit, a copied task is its source, and a fresh one is that of a new layer."""
    layer = copy.deepcopy(layer)
    for tensor in layer.state_dict().values():
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape))
    vars(layer.weight)["note"] = "kept"
    before = copy.deepcopy(layer.state_dict())
    options = {} if layer.bias is None else {"bias": layer._bias_kind()}
    fresh = type(layer)(1, getattr(layer, "normalized_shape", C), **options)
    assert add_task(layer, like=1) is layer
    add_task(layer)
    assert vars(layer.weight) == {"note": "kept"}
    for key, tensor in layer.state_dict().items():
        assert torch.equal(tensor[:T], before[key])
        assert torch.equal(tensor[T], before[key][1])
        assert torch.equal(tensor[T + 1], fresh.state_dict()[key][0])
    remove_task(layer, T)
    remove_task(layer, T)
    assert layer.num_tasks == T
    for key, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[key])


# ---- networks ------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A loop over the tasks of a network that shares its convolutions."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.stem, norm, self.after = copy.deepcopy(list(model.backbone))
        self.norms = nn.ModuleDict({name: norm.task(index) for index, name in enumerate(model.tasks)})
        self.heads = copy.deepcopy(model.heads)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.heads[name](self.after(self.norms[name](self.stem(x[name])))) for name in x}


class Networks:
    """A :class:`MultiTaskModel` and the loop, each with Adam, its groups and a schedule."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = nn.Conv2d(3, C, 3), FusedTSigmaBN2d(T, C, gate="identity", bias=True), nn.Flatten()
        self.model: Any = MultiTaskModel(nn.Sequential(*layers), {name: nn.Linear(C * 9, 2) for name in "abc"}).double()
        self.net = Net(self.model)
        groups = parameter_groups(self.model, 1e-2, weight_decay=0.1, gate_lr_multiplier=3.0)
        norms = list(self.net.norms.parameters())
        base = [parameter for parameter in self.net.parameters() if all(parameter is not other for other in norms)]
        own = [
            {"params": [*base, *(norm.bias for norm in self.net.norms.values())], "weight_decay": 0.1},
            {"params": [norm.weight for norm in self.net.norms.values()], "lr": 3e-2},
        ]
        self.optimisers = torch.optim.Adam(groups), torch.optim.Adam(own, lr=1e-2)
        self.schedules = [torch.optim.lr_scheduler.StepLR(one, 1, 0.7) for one in self.optimisers]
        hold_absent_tasks(self.optimisers[0], self.model)

    def step(self, tasks: str) -> None:
        for one in self.optimisers:
            one.zero_grad()
        x = {name: torch.randn(N, 3, 5, 5, dtype=torch.float64) for name in tasks}
        dy = {name: torch.randn(N, 2, dtype=torch.float64) for name in tasks}
        for model in (self.model, self.net):
            sum((y * dy[name]).sum() for name, y in model(x).items()).backward()
        for one in self.optimisers:
            one.step()
        for schedule in self.schedules:
            schedule.step()

    def assert_equal(self) -> None:
        layer, norms = self.model.backbone[1], [*self.net.norms.values()]
        for name in ("weight", "bias", *STATISTICS):
            torch.testing.assert_close(getattr(layer, name), torch.stack([getattr(one, name) for one in norms]))
        torch.testing.assert_close(self.model.heads.state_dict(), self.net.heads.state_dict())
        torch.testing.assert_close(self.model.backbone[0].state_dict(), self.net.stem.state_dict())


def test_a_network_gets_a_task_and_loses_one() -> None:
    both = Networks()
    ours, theirs = both.optimisers
    both.step("abc")
    both.step("ac")
    head = nn.Linear(C * 9, 2).double()
    add_task(both.model, "d", head=head, optimizer=ours)
    norm = nn.BatchNorm2d(C).double()
    both.net.norms["d"], both.net.heads["d"] = norm, copy.deepcopy(head)
    theirs.param_groups[0]["params"] += [*both.net.heads["d"].parameters(), norm.bias]
    theirs.param_groups[1]["params"].append(norm.weight)
    both.step("dab")
    both.step("bcd")
    remove_task(both.model, "b", optimizer=ours)
    for part in (both.net.norms, both.net.heads):
        del part["b"]
    both.step("ad")
    add_task(both.model, "e", like="d", optimizer=ours)
    for part in (both.net.norms, both.net.heads):
        part["e"] = copy.deepcopy(part["d"])
        for old, new in zip(part["d"].parameters(), part["e"].parameters(), strict=True):
            (group,) = (group for group in theirs.param_groups if any(old is one for one in group["params"]))
            group["params"].append(new)
            theirs.state[new] = copy.deepcopy(theirs.state[old])
    assert both.model.tasks == tuple(both.model.heads) == ("a", "c", "d", "e")
    both.step("acde")
    both.step("ec")
    both.assert_equal()
    parameters = [parameter for group in ours.param_groups for parameter in group["params"]]
    assert {*parameters} == {*ours.state} == {*both.model.parameters()}
    assert len(parameters) == len(list(both.model.parameters()))
    ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    both.step("ac")
    both.assert_equal()


class Residual(nn.Module):
    """A path leads around the first layer, so that the streams part before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(x + self.norm(x), 1)


def test_streams_part_in_a_model_that_has_run() -> None:
    backbone = convert_model(Residual(), 2, pretrained=False)
    model = MultiTaskModel(backbone, {"a": nn.Linear(75, 1), "b": nn.Linear(75, 1)})
    x = torch.randn(2, 3, 5, 5)
    model(x)
    add_task(model, "c", like="a")
    remove_task(model, "a")
    assert isinstance(backbone.norm, FusedTSigmaBN2d)
    with torch.no_grad():
        backbone.norm.weight[1] += 1
    outputs = model(x)
    assert list(outputs) == ["b", "c"]
    for index, (name, y) in enumerate(outputs.items()):
        norm = backbone.norm.task(index).train()
        torch.testing.assert_close(y, model.heads[name](torch.flatten(x + norm(x), 1)))


def test_tied_vectors_and_heads_stay_tied() -> None:
    first, second = FusedTSigmaBN2d(T, C), FusedTSigmaBN2d(T, C)
    second.weight = first.weight
    common = nn.Linear(C, C)
    heads = {name: nn.Sequential(common, nn.Linear(C, 1)) for name in "abc"}
    model: Any = MultiTaskModel(nn.Sequential(first, second), heads)
    named = torch.optim.SGD(model.named_parameters(), lr=0.1)
    add_task(model, "d", like="b", optimizer=named)
    assert first.weight is second.weight
    assert model.heads["d"][0].weight is common.weight
    assert model.heads["d"][1].weight is not model.heads["b"][1].weight
    parameters = dict(model.named_parameters())
    (group,) = named.param_groups
    assert {*group["param_names"]} == {*parameters}
    named_so = zip(group["param_names"], group["params"], strict=True)
    assert all(parameters[name] is parameter for name, parameter in named_so)
    remove_task(model, "b", optimizer=named)
    assert {*group["params"]} == {*model.parameters()}
    assert len(group["param_names"]) == len(group["params"])


def test_two_optimisers() -> None:
    layer = FusedTSigmaBN2d(T, C, bias=True)
    both = [torch.optim.Adam([parameter], lr=0.1) for parameter in layer.parameters()]
    for one in both:
        hold_absent_tasks(one, layer)
    add_task(layer, optimizer=both)
    layer(torch.randn(N, C, 3, 3), tasks=[T]).square().sum().backward()
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    for one in both:
        one.step()
    for parameter, old in zip(layer.parameters(), before, strict=True):
        assert (parameter != old).any(1).tolist() == [False] * T + [True]


def test_errors() -> None:
    layer = FusedTSigmaBN2d(T, C)
    model = MultiTaskModel(nn.Sequential(layer), {name: nn.Identity() for name in "abc"})
    steps = torch.optim.Adafactor(layer.parameters())
    layer(torch.randn(T * N, C, 3, 3)).square().sum().backward()
    steps.step()
    before = copy.deepcopy(model.state_dict())
    calls: list[tuple[Any, type[Exception], str]] = [
        (lambda: add_task(nn.Linear(1, 1)), ValueError, "no task-specific layer"),
        (lambda: add_task(nn.Sequential(layer, LateFanOut(T, C))), TypeError, "'1' is a LateFanOut"),
        (lambda: add_task(nn.Sequential(layer, FusedTSigmaBN2d(2, C))), ValueError, "3 of '0' and 2 of '1'"),
        (lambda: add_task(layer, "d"), ValueError, "has none, and no heads"),
        (lambda: add_task(model), TypeError, "name must be that of the new task"),
        (lambda: add_task(model, "a", like="b"), ValueError, "has a task 'a' already; it has a, b, c"),
        (lambda: add_task(model, "d"), ValueError, "'d' needs a head"),
        (lambda: add_task(model, "d.e", like=0), KeyError, "module name"),
        (lambda: add_task(model, "d", like="e"), ValueError, "like must be one of a, b, c, got 'e'"),
        (lambda: add_task(layer, like="a"), ValueError, "no names"),
        (lambda: add_task(layer, like=T), IndexError, "like 3 is out of range for num_tasks=3"),
        (lambda: add_task(model, "d", head=3), TypeError, "head must be an nn.Module"),  # type: ignore[arg-type]
        (lambda: add_task(nn.ModuleList([model, copy.deepcopy(model)]), "d"), ValueError, "2 MultiTaskModels"),
        (lambda: add_task(layer, optimizer=torch.optim.LBFGS(layer.parameters())), TypeError, "no LBFGS"),
        (lambda: add_task(layer, optimizer=torch.optim.SGD([torch.ones(1)])), ValueError, "trains no parameter"),
        (lambda: add_task(layer, optimizer=steps), ValueError, r"'row_var' of shape \[3, 1\].*new Adafactor"),
        (lambda: remove_task(FusedTSigmaBN2d(1, C), 0), ValueError, "one task, 0, and cannot be without"),
        (lambda: remove_task(model, "d"), ValueError, "task must be one of a, b, c, got 'd'"),
        (lambda: remove_task(layer, -4), IndexError, "task -4 is out of range"),
    ]
    for call, kind, message in calls:
        with pytest.raises(kind, match=message):
            call()
    assert model.state_dict().keys() == before.keys()
    assert layer.num_tasks == T
    prune.random_unstructured(layer, "weight", 0.1)
    other = FusedTSigmaBN2d(T, C)
    parametrize.register_parametrization(other, "weight", nn.Identity())
    for one in (layer, other):
        with pytest.raises(ValueError, match="pruned, parametrized or sharded"):
            add_task(one)
