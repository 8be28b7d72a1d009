"""What is done to whole models, done to layers of every normalisation: it asks for ``TaskSpecific`` alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support import ranks
from support.layers import train
from torch import Tensor, nn

from tsbn_kernels import (
    FusedTSigmaBN1d,
    FusedTSigmaLN,
    FusedTSigmaRMSNorm,
    MultiTaskModel,
    expand_state_dict,
    export_task,
    hold_absent_tasks,
    parameter_groups,
    revert_model,
    shard_tasks,
    split_parameters,
    task_vector_names,
)

PLAIN: dict[str, Callable[[], nn.Module]] = {
    "BN": partial(nn.BatchNorm1d, 6),
    "LN": partial(nn.LayerNorm, 6, bias=False),
    "RMS": partial(nn.RMSNorm, 6),
}
FUSED: dict[str, Callable[[int], Any]] = {
    "BN": partial(FusedTSigmaBN1d, num_features=6),
    "LN": partial(FusedTSigmaLN, normalized_shape=6),
    "RMS": partial(FusedTSigmaRMSNorm, normalized_shape=6),
}
of_any_kind = pytest.mark.parametrize("kind", PLAIN)


def plain(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), PLAIN[kind](), nn.ReLU()).double()


def task_specific(kind: str, T: int = 3) -> nn.Module:
    backbone = plain(kind)
    backbone[1] = train(FUSED[kind](T)).double()
    return backbone


def model(kind: str, T: int = 3) -> MultiTaskModel:
    heads = {f"task{t}": nn.Linear(6, 2, dtype=torch.float64) for t in range(T)}
    return MultiTaskModel(task_specific(kind, T), heads)


def data(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("export", [revert_model, export_task])
@of_any_kind
def test_the_plain_model_of_a_task(kind: str, export: Any) -> None:
    whole_model, x = model(kind).eval(), data(5, 4)
    for task, (name, wanted) in enumerate(whole_model(x).items()):
        if export is export_task:
            assert torch.allclose(export(whole_model, name)(x), wanted, rtol=1e-12)
        else:
            features = export(whole_model.backbone, task)
            assert type(features[1]) is type(PLAIN[kind]())
            assert torch.allclose(whole_model.heads[name](features(x)), wanted, rtol=1e-12)


@of_any_kind
def test_a_layer_that_computes_something_else_is_not_reverted(kind: str) -> None:
    backbone = task_specific(kind)
    own = type(backbone[1])
    doubled = type("Doubled", (own,), {"forward": lambda self, input: 2 * own.forward(self, input)})
    backbone[1].__class__ = doubled
    with pytest.raises(TypeError, match=r"'1' has a class with its own forward"):
        revert_model(backbone, 0)


@of_any_kind
def test_attributes_of_a_user_go_along(kind: str) -> None:
    backbone = task_specific(kind)
    backbone[1].note = "kept"  # type: ignore[assignment]
    assert revert_model(backbone, 1)[1].note == "kept"


@of_any_kind
def test_states_of_plain_models_load(kind: str) -> None:
    state = {name: value.sigmoid() for name, value in plain(kind).state_dict().items() if name != "1.bias"}
    loaded = model(kind).backbone
    loaded.load_state_dict(state)
    expanded = expand_state_dict(loaded, state)
    assert expanded.keys() == loaded.state_dict().keys()
    for got in (loaded[1].gates, expanded["1.weight"].sigmoid()):
        assert torch.allclose(got, state["1.weight"].expand(3, -1), rtol=1e-12)


@of_any_kind
def test_parameters_have_their_groups(kind: str) -> None:
    whole_model = model(kind)
    gates = whole_model.backbone[1].weight
    groups = {group["name"]: group for group in parameter_groups(whole_model, 0.1)}
    assert groups["gates" if kind == "BN" else "layer_norm_gates"]["params"] == [gates]
    assert task_vector_names(whole_model) == ["backbone.1.weight"]
    assert any(p is gates for p in split_parameters(whole_model)[1])


@of_any_kind
def test_absent_tasks_are_held(kind: str) -> None:
    whole_model, x = model(kind), data(5, 4)
    optimizer = torch.optim.Adam(whole_model.parameters(), 0.1)
    hold_absent_tasks(optimizer, whole_model)
    gates = whole_model.backbone[1].weight
    for names in (None, ["task0", "task2"]):
        before = gates.detach().clone()
        optimizer.zero_grad()
        sum(y.square().sum() for y in whole_model(x, names).values()).backward()
        optimizer.step()
    moved = (gates != before).any(1).tolist()
    assert moved == [True, False, True]


def case_shards(kind: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    torch.manual_seed(1)
    alone = model(kind, 4)
    sharded, x = copy.deepcopy(alone), data(5, 4)
    shard_tasks(sharded, init_device_mesh("cpu", (2,), mesh_dim_names=("tasks",)))
    wanted = alone(x)
    sum(y.square().sum() for y in wanted.values()).backward()
    outputs = sharded(x)
    assert len(outputs) == 2
    for name, y in outputs.items():
        assert torch.allclose(y, wanted[name], rtol=1e-12)
    sum(y.square().sum() for y in outputs.values()).backward()
    for one, other in zip(alone.backbone.parameters(), sharded.backbone.parameters(), strict=True):
        gradient = other.grad.full_tensor() if hasattr(other.grad, "full_tensor") else other.grad
        assert torch.allclose(gradient, one.grad, rtol=1e-10)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@of_any_kind
def test_tasks_are_sharded(kind: str) -> None:
    ranks.run(case_shards, 2, kind)
