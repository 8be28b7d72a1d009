"""Parameter groups: every trainable parameter once, gates at their own rate and without decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.networks import pretrained
from torch import nn
from torch.nn.utils import parametrize

from tsbn_kernels import (
    FusedTSigmaBN2d,
    LateFanOut,
    MultiTaskModel,
    convert_model,
    parameter_groups,
    split_parameters,
    task_vector_names,
)

T = 3


def multitask(variant: Any = "ts_sigma_bn") -> MultiTaskModel:
    return MultiTaskModel(
        convert_model(pretrained("celeba"), T, variant=variant), {f"task{t}": nn.Linear(16, 1) for t in range(T)}
    )


def by_name(groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {group["name"]: group for group in groups}


@pytest.mark.parametrize("variant", ["ts_sigma_bn", "tsbn"])
def test_every_parameter_is_in_one_group(variant: str) -> None:
    model = multitask(variant)
    groups = by_name(parameter_groups(model, 3e-4, weight_decay=0.01))
    assert list(groups) == ["base", "gates"]
    listed = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(parameter) for parameter in model.parameters()}
    gates = {id(layer.weight) for layer in model.modules() if hasattr(layer, "gates")}
    assert {id(parameter) for parameter in groups["gates"]["params"]} == gates
    assert (groups["base"]["lr"], groups["base"]["weight_decay"]) == (3e-4, 0.01)
    assert (groups["gates"]["lr"], groups["gates"]["weight_decay"]) == (pytest.approx(3e-2), 0.0)


@pytest.mark.parametrize("multiplier", [1.0, 10.0, 1000.0])
def test_multiplier(multiplier: float) -> None:
    groups = by_name(parameter_groups(multitask(), 0.5, gate_lr_multiplier=multiplier))
    assert groups["gates"]["lr"] == 0.5 * multiplier
    assert groups["base"]["lr"] == 0.5


def test_frozen_parameters_are_left_out() -> None:
    model = multitask()
    model.backbone[0].weight.requires_grad_(False)
    model.backbone[1].weight.requires_grad_(False)
    listed = [parameter for group in parameter_groups(model, 0.1) for parameter in group["params"]]
    assert len(listed) == len(list(model.parameters())) - 2
    assert all(parameter.requires_grad for parameter in listed)


def test_tied_parameters_are_listed_once() -> None:
    model = multitask()
    model.heads["task1"].weight = model.heads["task0"].weight
    model.backbone[4].weight = model.backbone[7].weight  # convolutions
    norms = [layer for layer in model.modules() if hasattr(layer, "gates")]
    norms[1].weight = norms[2].weight
    model.tied = norms[0].weight  # a gate is a gate, wherever else it stands
    groups = by_name(parameter_groups(model, 0.1))
    assert len(groups["gates"]["params"]) == len(norms) - 1
    listed = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert sorted(listed) == sorted({id(parameter) for parameter in model.parameters()})


def test_gates_of_layer_normalisation() -> None:
    class TSSigmaLayerNorm(nn.LayerNorm):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.weight = nn.Parameter(torch.zeros(T, channels))

        @property
        def gates(self) -> torch.Tensor:
            return torch.sigmoid(self.weight)

    model = nn.Sequential(TSSigmaLayerNorm(4), nn.LayerNorm(4), nn.Linear(4, 4))
    groups = by_name(parameter_groups(model, 1e-3, weight_decay=0.1))
    assert [parameter.shape for parameter in groups["layer_norm_gates"]["params"]] == [(T, 4)]
    assert groups["layer_norm_gates"]["lr"] == pytest.approx(1e-2)
    assert groups["layer_norm_gates"]["weight_decay"] == 0.0
    assert "gates" not in groups
    assert len(groups["base"]["params"]) == 5
    assert by_name(parameter_groups(model, 1e-3, layer_norm_lr_multiplier=2))["layer_norm_gates"]["lr"] == 2e-3


def test_plain_model_has_one_group() -> None:
    model = pretrained("celeba")
    (group,) = parameter_groups(model, 0.1)
    assert group["params"] == list(model.parameters())


@pytest.mark.parametrize(
    "optimiser",
    ["SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD"],
)
def test_any_optimiser_takes_them(optimiser: str) -> None:
    model = multitask()
    steps = getattr(torch.optim, optimiser)(parameter_groups(model, 1e-3, weight_decay=0.01))
    before = [parameter.clone() for parameter in model.parameters()]
    sum(y.square().sum() for y in model(torch.randn(4, 3, 16, 16)).values()).backward()
    steps.step()
    changed = [not torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True)]
    assert all(changed)
    steps.load_state_dict(steps.state_dict())
    assert [group["lr"] for group in steps.param_groups] == [1e-3, pytest.approx(0.1)]


def test_gates_move_a_hundred_times_as_fast() -> None:
    """Two models, one step of SGD: only the rate differs."""
    models = [multitask(), multitask()]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(4, 3, 16, 16)
    moved = []
    for model, multiplier in zip(models, (1.0, 100.0), strict=True):
        optimiser = torch.optim.SGD(parameter_groups(model, 1e-4, gate_lr_multiplier=multiplier))
        before = model.backbone[1].weight.detach().clone()
        sum(y.square().sum() for y in model(x).values()).backward()
        optimiser.step()
        moved.append(model.backbone[1].weight.detach() - before)
    torch.testing.assert_close(moved[1], 100 * moved[0], rtol=1e-2, atol=1e-5)


def test_a_schedule_keeps_the_gates_rate_where_it_is_told_each() -> None:
    """``max_lr`` as one number gives all groups the same."""
    for told in (True, False):
        groups = parameter_groups(multitask(), 1e-3)
        steps = torch.optim.SGD(groups)
        max_lr = [group["lr"] for group in groups] if told else 1e-3
        schedule = torch.optim.lr_scheduler.OneCycleLR(steps, max_lr=max_lr, total_steps=10)
        for _ in range(10):
            base, gates = (group["lr"] for group in steps.param_groups)
            assert gates == pytest.approx(base * (100 if told else 1))
            steps.step()
            schedule.step()


# ---- which parameters are which ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["ts_sigma_bn", "tsbn"])
def test_names_of_what_rules_by_dimensions_take_for_matrices(variant: str) -> None:
    model = multitask(variant)
    names = task_vector_names(model)
    layers = {name for name, module in model.named_modules() if hasattr(module, "gates")}
    learned = ("weight", "bias") if variant == "tsbn" else ("weight",)
    assert set(names) == {f"{layer}.{name}" for layer in layers for name in learned}
    by_dimension = {name for name, p in model.named_parameters() if p.dim() > 1} - set(names)
    weights = (nn.Conv2d, nn.Linear)
    assert by_dimension == {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, weights)}


def test_names_of_what_became_of_gates() -> None:
    parametrized, late = FusedTSigmaBN2d(T, 4), LateFanOut(T, 4, conv=nn.Conv2d(4, 4, 1))
    parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    model = nn.Sequential(parametrized, late, nn.LayerNorm(4))
    assert task_vector_names(model) == ["0.parametrizations.weight.original", "1.weight"]
    shared, specific = split_parameters(model)
    assert specific == [parametrized.parametrizations.weight.original, late.weight]
    assert shared == [*late.conv.parameters(), *model[2].parameters()]


def test_what_is_shared_and_what_is_of_one_task() -> None:
    """As weighting methods need it: in a plain model with T heads it would be the encoder without its norms."""
    model = multitask("tsbn")
    for wrapped in (model, nn.ModuleDict({"inside": model})):
        shared, specific = split_parameters(wrapped)
        plain = [module for module in model.backbone.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        assert [id(p) for p in shared] == [id(p) for module in plain for p in module.parameters()]
        assert {*shared, *specific} == set(model.parameters())
        assert len(shared) + len(specific) == len(list(model.parameters()))
    model.heads["task1"].weight = model.heads["task0"].weight  # of two tasks
    model.backbone[0].weight.requires_grad_(False)
    fewer, _ = split_parameters(model)
    assert set(fewer) == {*shared[1:], model.heads["task0"].weight}
    assert not set(split_parameters(model.backbone)[1]) & set(model.heads.parameters())


def test_helpers_want_a_module() -> None:
    for helper in (task_vector_names, split_parameters):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
            helper(None)  # type: ignore[operator]
