"""States of plain models, of lists of plain layers and of models with fewer tasks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.networks import pretrained
from torch import nn

from tsbn_kernels import (
    FusedTSigmaBN2d,
    FusedTSigmaLN,
    FusedTSigmaRMSNorm,
    MultiTaskModel,
    add_task,
    convert_model,
    expand_state_dict,
    revert_model,
)

T, C = 3, 4


@pytest.mark.parametrize("variant", ["ts_sigma_bn", "tsbn"])
@pytest.mark.parametrize("wrap", ["", "compiled", "inside", "meta"])
def test_it_loads_as_the_plain_state_does(wrap: str, variant: Any) -> None:
    plain = pretrained("celeba")
    model = convert_model(pretrained("celeba"), T, variant=variant, exclude=["1"])
    expected = convert_model(pretrained("celeba"), T, variant=variant, exclude=["1"])
    expected.load_state_dict(plain.state_dict())
    state = plain.state_dict()
    if wrap == "inside":
        model, expected = nn.ModuleDict({"net": model}), nn.ModuleDict({"net": expected})
        state = {f"net.{key}": value for key, value in state.items()}
    given: Any = torch.compile(model) if wrap == "compiled" else model.to("meta") if wrap == "meta" else model
    before = {key: value.clone() for key, value in state.items()}
    got = expand_state_dict(given, state)
    assert got.keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(got[key], value), key
        assert torch.equal(state[key], before[key])
    again = expand_state_dict(given, got)
    assert all(again[key] is value for key, value in got.items())


def test_what_a_checkpoint_lacks() -> None:
    plain = nn.Sequential(nn.BatchNorm2d(C, affine=False))
    model = nn.Sequential(FusedTSigmaBN2d(T, C, bias=True, device="meta"))
    got = expand_state_dict(model, plain.state_dict())
    assert {key: value.shape[0] for key, value in got.items()} == dict.fromkeys(model.state_dict(), T)
    assert not any(value.is_meta for value in got.values())


KINDS: dict[str, tuple[Any, Any]] = {
    "BN": (FusedTSigmaBN2d, nn.BatchNorm2d),
    "LN": (FusedTSigmaLN, nn.LayerNorm),
    "RMS": (FusedTSigmaRMSNorm, nn.RMSNorm),
}


class Inside(nn.Module):
    """A list of layers in a module of its own, as code for domains has it."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.bns = nn.ModuleList(layers)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate", ["sigmoid", "identity"])
@pytest.mark.parametrize("inside", [True, False])
def test_lists_of_plain_layers(inside: bool, gate: str, kind: str) -> None:
    fused, plain = KINDS[kind]
    layers = [plain(C) for _ in range(12)]  # more than nine: their names do not sort as numbers do
    for layer in layers:
        for tensor in layer.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape) if tensor.is_floating_point() else torch.tensor(7))
    listed = nn.Sequential(nn.Linear(2, 2), Inside(layers) if inside else nn.ModuleList(layers))
    options = {"gate": gate} if kind == "RMS" else {"gate": gate, "bias": True}
    model: Any = nn.Sequential(nn.Linear(2, 2), fused(12, C, **options))
    model.load_state_dict(listed.state_dict())
    for key, tensor in expand_state_dict(model, listed.state_dict()).items():
        assert torch.equal(tensor, model.state_dict()[key])
    for index, layer in enumerate(layers):
        torch.testing.assert_close(model[1].task(index).state_dict(), layer.state_dict())
    missing = {key: tensor for key, tensor in listed.state_dict().items() if ".10.weight" not in key}
    with pytest.raises(ValueError, match=r"the layer '1' needs plain layers of 12 tasks with the same entries"):
        model.load_state_dict(missing)


def test_a_list_without_weights() -> None:
    layers = nn.ModuleList(nn.BatchNorm2d(C, affine=False) for _ in range(T))
    layer = FusedTSigmaBN2d(T, C, gate="identity", bias=True)
    layer.load_state_dict(layers.state_dict())
    assert layer.weight.eq(1).all()
    with pytest.raises(ValueError, match=r"needs plain layers of 4 tasks.*expand_state_dict\(model, state, tasks"):
        FusedTSigmaBN2d(T + 1, C).load_state_dict(layers.state_dict())


def multitask(names: str) -> MultiTaskModel:
    plain = nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.Flatten())
    backbone = convert_model(plain, len(names), variant="tsbn", pretrained=False)
    for tensor in backbone.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) if tensor.is_floating_point() else torch.tensor(len(names)))
    return MultiTaskModel(backbone, {name: nn.Linear(9 * C, 1) for name in names})


@pytest.mark.parametrize("tasks", [["a", "d"], [0, 3], [0, -1]])
def test_fewer_tasks_load_into_more(tasks: Any) -> None:
    few, many = multitask("ad"), multitask("abcd")
    heads = copy.deepcopy(many.heads)
    before: Any = {name: (revert_model(many.backbone, index), heads[name]) for index, name in enumerate("abcd")}
    for name in "bc":
        before[name][0][0].load_state_dict(few.backbone.get_submodule("0").state_dict())  # which the tasks share
    many.load_state_dict(expand_state_dict(many, few.state_dict(), tasks))
    for index, name in enumerate("abcd"):
        own = revert_model(many.backbone, index), many.heads[name]
        old = (revert_model(few.backbone, "ad".index(name)), few.heads[name]) if name in "ad" else before[name]
        for part, expected in zip(own, old, strict=True):
            torch.testing.assert_close(part.state_dict(), expected.state_dict(), rtol=0, atol=0)
    few.load_state_dict(few.state_dict())
    add_task(few, "e", like="a")
    with pytest.raises(ValueError, match=r"must have shape \[2, 4\], for the tasks \[0, 3\] of the layer's 4, got"):
        expand_state_dict(many, few.state_dict(), tasks)


@pytest.mark.parametrize("form", ["plain", "list"])
def test_some_tasks_start_from_plain_layers(form: str) -> None:
    layer = FusedTSigmaBN2d(4, C, gate="identity")
    before = layer.task(2).state_dict()
    plain = [nn.BatchNorm2d(C) for _ in range(3)]
    for index, one in enumerate(plain):
        nn.init.constant_(one.weight, 2.0 + index)
    state = plain[0].state_dict() if form == "plain" else nn.ModuleList(plain).state_dict()
    state = {key: tensor for key, tensor in state.items() if "bias" not in key}
    layer.load_state_dict(expand_state_dict(layer, state, [3, 0, 1]))
    assert layer.weight[:, 0].tolist() == ([2, 2, 1, 2] if form == "plain" else [3, 4, 1, 2])
    torch.testing.assert_close(layer.task(2).state_dict(), before)


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        expand_state_dict(None, {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="state_dict must be a dict, got list"):
        expand_state_dict(nn.Linear(1, 1), [])  # type: ignore[arg-type]
    layer = FusedTSigmaBN2d(T, C)
    for tasks, kind, message in (
        ([0, 0], ValueError, r"different ones, got \[0, 0\]"),
        ([5], IndexError, "each of tasks 5 is out of range for num_tasks=3"),
        (["a"], ValueError, "no names"),
    ):
        with pytest.raises(kind, match=message):
            expand_state_dict(layer, {}, tasks)
