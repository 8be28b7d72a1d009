"""What is done to whole models, done to a layer of another normalisation: it asks for ``TaskSpecific`` alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import ranks
from torch import Tensor, nn
from torch.nn import functional

from tsbn_kernels import (
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
from tsbn_kernels.layers.task_specific import TaskSpecific, whole


class TaskLayerNorm(TaskSpecific):
    """Layer normalisation of the channels of ``[T*N, C]``, as plainly as can be."""

    def __init__(self, num_tasks: int, num_features: int) -> None:
        super().__init__()
        self.num_tasks, self.num_features = num_tasks, num_features
        self.stacking, self.gate = "task_major", "sigmoid"
        self.weight = nn.Parameter(torch.randn(num_tasks, num_features, dtype=torch.float64))

    def forward(self, input: Tensor, *, tasks: Any = None, fan_out: bool | None = None) -> Tensor:
        tasks, fan_out = self._route(input, tasks, fan_out)
        (weight,), rows = self._own_rows((self.weight,), tasks)
        weight, _ = self._take_part(weight if rows is None else weight[rows], rows, own_streams=False)
        normalised = functional.layer_norm(input, (self.num_features,))
        streams = normalised if fan_out else normalised.unflatten(0, (len(weight), -1))
        return (streams * torch.sigmoid(weight).unsqueeze(1)).flatten(0, 1)

    def task(self, index: int) -> nn.Module:
        index = self._checked_task(index)
        plain = nn.LayerNorm(self.num_features, dtype=torch.float64).train(self.training)
        with torch.no_grad():
            plain.weight.copy_(whole(self.gates)[index])
        return plain

    def _expand_plain_state(self, state_dict: dict[str, Any], prefix: str) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None and weight.dim() == 1:
            state_dict.pop(f"{prefix}bias", None)
            state_dict[f"{prefix}weight"] = weight.logit(1e-5).repeat(self.num_tasks, 1)


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU()).double()


def model(T: int = 3) -> MultiTaskModel:
    backbone = plain()
    backbone[1] = TaskLayerNorm(T, 6)
    return MultiTaskModel(backbone, {f"task{t}": nn.Linear(6, 2, dtype=torch.float64) for t in range(T)})


def data(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("export", [revert_model, export_task])
def test_the_plain_model_of_a_task(export: Any) -> None:
    whole_model, x = model().eval(), data(5, 4)
    for task, (name, wanted) in enumerate(whole_model(x).items()):
        if export is export_task:
            assert torch.allclose(export(whole_model, name)(x), wanted, rtol=1e-12)
        else:
            features = export(whole_model.backbone, task)
            assert type(features[1]) is nn.LayerNorm
            assert torch.allclose(whole_model.heads[name](features(x)), wanted, rtol=1e-12)


def test_a_layer_that_computes_something_else_is_not_reverted() -> None:
    class Doubled(TaskLayerNorm):
        def forward(self, input: Tensor, **options: Any) -> Tensor:
            return 2 * super().forward(input, **options)

    backbone = plain()
    backbone[1] = Doubled(3, 6)
    with pytest.raises(TypeError, match=r"'1' has a class with its own forward"):
        revert_model(backbone, 0)


def test_attributes_of_a_user_go_along() -> None:
    backbone = plain()
    backbone[1] = TaskLayerNorm(3, 6)
    backbone[1].note = "kept"  # type: ignore[assignment]
    assert revert_model(backbone, 1)[1].note == "kept"


def test_states_of_plain_models_load() -> None:
    state = {name: value.sigmoid() for name, value in plain().state_dict().items()}
    loaded = model().backbone
    loaded.load_state_dict(state)
    expanded = expand_state_dict(loaded, state)
    assert expanded.keys() == loaded.state_dict().keys()
    for got in (loaded[1].gates, expanded["1.weight"].sigmoid()):
        assert torch.allclose(got, state["1.weight"].expand(3, -1), rtol=1e-12)


def test_parameters_have_their_groups() -> None:
    whole_model = model()
    gates = whole_model.backbone[1].weight
    groups = {group["name"]: group for group in parameter_groups(whole_model, 0.1)}
    assert groups["gates"]["params"] == [gates]
    assert task_vector_names(whole_model) == ["backbone.1.weight"]
    assert any(p is gates for p in split_parameters(whole_model)[1])


def test_absent_tasks_are_held() -> None:
    whole_model, x = model(), data(5, 4)
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


def case_shards() -> None:
    from torch.distributed.device_mesh import init_device_mesh

    alone, sharded, x = model(4), model(4), data(5, 4)
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
def test_tasks_are_sharded() -> None:
    ranks.run(case_shards, 2)
