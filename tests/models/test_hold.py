"""Steps with absent tasks equal those of T layers in a loop, where what did not run has no gradient."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from support.holding import KINDS, OPTIMISERS, SCHEDULE, C, N, Pair, T, multitask, optimiser
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tsbn_kernels import (
    FusedTSigmaBN2d,
    MultiTaskModel,
    hold_absent_tasks,
    parameter_groups,
)


@pytest.mark.parametrize("options", [{}, {"foreach": True}])
@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_optimiser_does_as_in_a_loop(kind: str, name: str, options: dict[str, Any]) -> None:
    pair = Pair(optimiser(name, **options), kind=kind)
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
