"""Optimisers that hold absent tasks: their states, their copies, errors, and processes that share a model."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from support import ranks
from support.holding import SCHEDULE, C, N, Pair, T, multitask, optimiser
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.utils import parametrize, prune

from tsbn_kernels import (
    FusedTSigmaBN2d,
    hold_absent_tasks,
    parameter_groups,
    shard_tasks,
)

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
