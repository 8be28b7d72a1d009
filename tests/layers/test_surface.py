"""Every public name of ``nn.BatchNorm1d``, ``2d``, ``3d`` and ``nn.SyncBatchNorm`` on the layers, and what differs."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from tsbn_kernels import FusedTSigmaBN, FusedTSigmaBN1d, FusedTSigmaBN2d, FusedTSigmaBN3d, convert_model

T, N, C = 3, 4, 5
PAIRS = [
    (FusedTSigmaBN1d, nn.BatchNorm1d, (7,)),
    (FusedTSigmaBN2d, nn.BatchNorm2d, (3, 4)),
    (FusedTSigmaBN3d, nn.BatchNorm3d, (2, 3, 4)),
    (FusedTSigmaBN, nn.SyncBatchNorm, (3, 4)),
]
pairs = pytest.mark.parametrize(("fused", "plain", "spatial"), PAIRS)

MISSING = {
    "convert_sync_batchnorm": "a class method that makes nn.SyncBatchNorm: tsbn_kernels.convert_sync_batchnorm is ours",
}
ARGUMENTS = {
    "affine": "gates are what makes a layer task-specific; freeze them with weight.requires_grad_(False)",
    "bias": "off by default, as in TS-sigma-BN; takes 'frozen' too",
    "process_group": "None leaves the ranks alone, 'world' is what None is there",
}


def made(fused: Any, plain: Any) -> tuple[Any, Any]:
    return fused(T, C), plain(C)


@pairs
def test_every_public_name_is_there_and_can_be_read(fused: Any, plain: Any, spatial: Any) -> None:
    layer, one = made(fused, plain)
    names = {name for name in dir(one) if not name.startswith("_")}
    assert {name for name in names if not hasattr(layer, name)} == MISSING.keys() & names
    for name in names - MISSING.keys():
        ours, theirs = getattr(layer, name), getattr(one, name)
        assert callable(ours) == callable(theirs), name
        if isinstance(theirs, (bool, float, int)):
            assert type(ours) is type(theirs), name
            assert ours == theirs, name


@pairs
def test_attributes_can_be_set(fused: Any, plain: Any, spatial: Any) -> None:
    values = {"eps": 1e-2, "momentum": 0.5, "track_running_stats": False, "training": False}
    for layer in made(fused, plain):
        for name, value in values.items():
            setattr(layer, name, value)
            assert getattr(layer, name) == value


@pairs
def test_methods_take_the_same_arguments(fused: Any, plain: Any, spatial: Any) -> None:
    """In the same places and under the same names; what is added comes behind them."""
    for name, theirs in inspect.getmembers(plain, inspect.isfunction):
        if name.startswith("_") and name != "__call__":
            continue
        ours = list(inspect.signature(getattr(fused, name)).parameters.values())
        expected = list(inspect.signature(theirs).parameters.values())
        got = [(p.name, p.kind, p.default) for p in ours[: len(expected)]]
        assert got == [(p.name, p.kind, p.default) for p in expected], name
        assert all(p.default is not p.empty for p in ours[len(expected) :]), name


@pairs
def test_the_constructor_takes_the_same_arguments(fused: Any, plain: Any, spatial: Any) -> None:
    ours, theirs = (dict(inspect.signature(layer).parameters) for layer in (fused, plain))
    in_places = ["num_features", "eps", "momentum"]  # the others by name alone
    assert list(ours)[:4] == ["num_tasks", *in_places]
    assert list(theirs)[:3] == in_places
    for name, parameter in theirs.items():
        if name not in ARGUMENTS:
            assert ours[name].default == parameter.default, name
    with pytest.raises(TypeError, match="affine"):
        fused(T, C, affine=False)


@pairs
@pytest.mark.parametrize("fan_out", [False, True])
def test_the_input_has_the_name_of_batch_norm(fan_out: bool, fused: Any, plain: Any, spatial: Any) -> None:
    layer = fused(T, C).eval()
    x = torch.randn(N if fan_out else T * N, C, *spatial)
    expected = layer(x, fan_out=fan_out)
    assert torch.equal(layer(input=x, fan_out=fan_out), expected)
    assert torch.equal(torch.cat(layer.streams(input=x, fan_out=fan_out)), expected)
    with pytest.raises(TypeError, match="input must be a tensor, got list"):
        layer(input=[1.0])


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(C), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(input=self.norm(input=x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("fuse_activation", [True, False])
def test_a_model_that_names_the_input_is_converted(fuse_activation: bool) -> None:
    model, x = Keyword().eval(), torch.randn(N, C, 3, 4)
    nn.init.uniform_(model.norm.weight, 0.2, 0.9)
    converted = convert_model(model, 1, fuse_activation=fuse_activation)
    torch.testing.assert_close(converted(x), model(x), rtol=1e-4, atol=1e-5)


@pairs
def test_layers_of_before_have_the_names_too(fused: Any, plain: Any, spatial: Any) -> None:
    """A pickle holds what an instance has: what came later must not be missing."""
    layer = pickle.loads(pickle.dumps(fused(T, C)))
    assert "affine" not in layer.__dict__
    assert layer.affine is True
