"""Conversion of models with layers of somebody else: what they compute, what hangs on them and where they stand."""

from __future__ import annotations

import copy
import warnings
from collections import deque
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.networks import look_trained
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

from tsbn_kernels import (
    FusedTSigmaBN,
    FusedTSigmaBN2d,
    convert_model,
    revert_model,
)

T, N = 3, 8
variants = pytest.mark.parametrize("variant", ["ts_sigma_bn", "tsbn"])


# ---- what is not known to be equal, and what goes along ------------------------------------------------------------


class OwnForward(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class OwnCall(nn.BatchNorm2d):
    def __call__(self, input: Tensor) -> Tensor:
        return 2 * super().__call__(input)


class OwnHelper(nn.BatchNorm2d):
    def _check_input_dim(self, input: Tensor) -> None:
        raise ValueError("nothing is right")


class StaysInEvaluation(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> StaysInEvaluation:
        return super().train(False)


class ActivatesToo(nn.BatchNorm2d):
    """The attributes of timm's layer, and another forward."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.drop(super().forward(x)))


def on_the_instance(name: str) -> nn.Module:
    norm = nn.BatchNorm2d(4)
    setattr(norm, name, getattr(norm, name))
    return norm


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: OwnForward(4), "a class with its own forward"),
        (lambda: OwnCall(4), "a class with its own __call__"),
        (lambda: OwnHelper(4), "a class with its own _check_input_dim"),
        (lambda: StaysInEvaluation(4), "a class with its own train"),
        (lambda: ActivatesToo(4), "a class with its own forward"),
        (lambda: on_the_instance("forward"), "its own forward, set on the instance"),
        (lambda: on_the_instance("train"), "its own train, set on the instance"),
    ],
)
@pytest.mark.parametrize("inplace", [True, False])
def test_what_is_not_known_to_be_equal_is_refused_by_name(inplace: bool, make: Any, named: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), make())
    with pytest.raises(TypeError, match=f"'1' is a .* that has {named}.*Replace it by one, or exclude it"):
        convert_model(model, T, inplace=inplace)


def test_state_and_gradient_hooks_that_would_be_lost_are_refused_by_name() -> None:
    pruned, more, watched = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    prune.l1_unstructured(pruned, "weight", amount=1)
    more.register_buffer("importance", torch.ones(4))
    watched.weight.register_hook(lambda g: g)
    for norm, named in ((pruned, "its own weight_orig, weight_mask"), (more, "its own importance"), (watched, "grad")):
        with pytest.raises(ValueError, match=f"'0' has .*{named}"):
            convert_model(nn.Sequential(norm), T)


class Counting(nn.BatchNorm2d):
    """Computes what its base does, and offers more."""

    def channels(self) -> int:
        return self.num_features


def test_a_subclass_that_computes_the_same_is_converted() -> None:
    assert type(convert_model(nn.Sequential(Counting(4)), T)[0]) is FusedTSigmaBN2d  # type: ignore[index]


@pytest.mark.parametrize("inplace", [True, False])
def test_attributes_go_along(inplace: bool) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    plain[0].weight.is_expert = True
    plain[1].tag, plain[1].weight.no_decay, plain[1].running_mean.kept = "stem", True, True
    converted: Any = convert_model(plain, T, inplace=inplace)
    for model in (converted, revert_model(converted, 1)):
        assert model[0].weight.is_expert
        assert model[1].tag == "stem"
        assert model[1].weight.no_decay
    assert converted[1].running_mean.kept
    plain = nn.Sequential(nn.BatchNorm2d(4))
    plain[0].gate = "open"
    with pytest.raises(ValueError, match=r"attribute gate has the name of one of FusedTSigmaBN2d's"):
        convert_model(plain, T)


@pytest.mark.parametrize("inplace", [True, False])
def test_hooks_go_along(inplace: bool) -> None:
    """They get the layer, its stacked streams and its state."""
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    norm, seen = plain[1], []
    handle = norm.register_forward_hook(lambda module, args, y: seen.append(type(module)) or 2 * y)
    norm.register_forward_pre_hook(lambda _, args, options: seen.append(args[0].shape) or None, with_kwargs=True)
    norm.register_full_backward_hook(lambda *_: seen.append("backward"))
    norm.register_load_state_dict_pre_hook(lambda module, state, *_: seen.append(module))
    norm.register_state_dict_post_hook(lambda module, *_: seen.append(module))
    converted: Any = convert_model(plain, T, inplace=inplace)
    x = torch.randn(T * N, 3, 5, 5)
    y = converted(x)
    y.backward(torch.randn_like(y))
    assert seen == [(T * N, 4, 5, 5), FusedTSigmaBN2d, "backward"]
    seen.clear()
    converted.load_state_dict(converted.state_dict())
    assert seen == [converted[1], converted[1]]
    twin = convert_model(nn.Sequential(copy.deepcopy(plain[0]), nn.BatchNorm2d(4)), T)
    torch.testing.assert_close(y, 2 * twin(x))
    assert revert_model(converted, 0)[1]._forward_hooks  # type: ignore[index]
    if inplace:
        handle.remove()
        torch.testing.assert_close(converted(x), twin(x))


def test_hooks_that_see_an_activation_of_the_model_do_not_go_back() -> None:
    converted: Any = convert_model(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.SiLU()), T)
    handle = converted[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"'1' applies an activation of the model, and has hooks"):
        revert_model(converted, 0)
    handle.remove()
    revert_model(converted, 0)


class OwnLayer(FusedTSigmaBN2d):
    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        return 2 * super().forward(x, *args, **options)


@pytest.mark.parametrize("instance", [True, False])
def test_layers_that_compute_something_else_are_not_reverted(instance: bool) -> None:
    layer: Any = FusedTSigmaBN2d(T, 4) if instance else OwnLayer(T, 4)
    if instance:
        layer.forward = lambda x: 2 * FusedTSigmaBN2d.forward(layer, x)
    with pytest.raises(TypeError, match=r"'0' has .*its own forward"):
        revert_model(nn.Sequential(layer), 0)


# ---- norms that stand somewhere else too -----------------------------------------------------------------------------


class Holder(nn.Module):
    """Calls its normalisation by another way than its name."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = norm = nn.BatchNorm2d(4)
        self.held: Any = {
            "list": [norm],
            "nested": {"norms": (1, [norm])},
            "method": norm.forward,
            "closure": lambda x: norm(x),  # noqa: PLW0108
            "set": {norm},
            "object": SimpleNamespace(norm=deque([norm])),
            "partial": partial(norm.__call__),
        }[way]
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        held = self.held
        norm = held[0] if self.way == "list" else held["norms"][1][0] if self.way == "nested" else held
        norm = next(iter(held)) if self.way == "set" else held.norm[0] if self.way == "object" else norm
        return norm(self.conv(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("way", ["list", "nested", "method"])
def test_a_layer_stands_wherever_its_plain_layer_did(way: str, inplace: bool) -> None:
    plain = look_trained(Holder(way))
    named = look_trained(Holder("list"))
    named.load_state_dict(plain.state_dict())
    expected = convert_model(nn.Sequential(named.conv, named.norm), T)
    converted: Any = convert_model(plain, T, fuse_activation=False, inplace=inplace)
    x = torch.randn(T * N, 3, 5, 5)
    torch.testing.assert_close(converted(x), expected(x))
    torch.testing.assert_close(converted.norm.running_mean, expected[1].running_mean)  # type: ignore[index]
    assert (converted.norm.running_mean[0] != converted.norm.running_mean[1]).any()
    back = revert_model(converted.eval(), 1)
    torch.testing.assert_close(back(x[N : 2 * N]), converted(x)[N : 2 * N], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fuse_activation", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("way", ["closure", "set", "object", "partial"])
@pytest.mark.filterwarnings("ignore:activations stay unfused")
def test_a_normalisation_that_is_called_from_elsewhere_is_named(way: str, inplace: bool, fuse_activation: bool) -> None:
    with pytest.warns(UserWarning, match=r"'norm' is called by the model as an object of its own.* stays plain"):
        convert_model(Holder(way), T, inplace=inplace, fuse_activation=fuse_activation)


def test_a_model_that_holds_itself_and_much_more_converts_without_a_word() -> None:
    model = Holder("list")
    model.owner, model.rows = [model], list(range(200_000))
    model.note = lambda: model
    assert isinstance(convert_model(model, T).norm, FusedTSigmaBN2d)


class FrozenBatchNorm2d(nn.Module):
    """As torchvision's, which is no BatchNorm by class."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, torch.full((num_features,), float(value)))

    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


def test_other_normalisation_that_stays_shared_is_named() -> None:
    with pytest.warns(UserWarning, match=r"^'0' \(FrozenBatchNorm2d\) stay shared by all tasks"):
        convert_model(nn.Sequential(FrozenBatchNorm2d(3), nn.BatchNorm2d(3)), T)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_model(nn.Sequential(FrozenBatchNorm2d(3), nn.BatchNorm2d(3)), T, exclude="0")
    with pytest.raises(ValueError, match=r"no normalisation to convert.*; it has '0' \(FrozenBatchNorm2d\)"):
        convert_model(nn.Sequential(FrozenBatchNorm2d(3)), T)


@variants
def test_layers_with_a_weight_and_no_bias(variant: Any) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    plain[1].register_parameter("bias", None)  # BatchNorm2d(bias=False) of newer PyTorch
    nn.init.uniform_(plain[1].weight, 0.2, 0.9)
    converted = convert_model(plain, T, variant=variant)
    x = torch.randn(N, 3, 5, 5)
    for training in (True, False):
        y = converted.train(training)(x.repeat(T, 1, 1, 1))
        torch.testing.assert_close(y[N : 2 * N], plain.train(training)(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(revert_model(converted, 0)(x), plain(x), rtol=1e-4, atol=1e-4)
    converted.load_state_dict(plain.state_dict(), strict=True)


class SyncBatchNormAct(nn.SyncBatchNorm):
    """As timm's, which has drop and act only where it has been converted to."""

    __module__ = "timm.layers.norm_act"

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


@pytest.mark.parametrize("fuse", [True, False])
def test_timms_synchronised_layer(fuse: bool) -> None:
    norm: Any = SyncBatchNormAct(4)
    norm.drop, norm.act = nn.Identity(), nn.SiLU()
    plain = look_trained(nn.Sequential(nn.Conv2d(3, 4, 1), norm)).eval()
    nn.init.uniform_(norm.weight, 0.2, 0.9)
    converted: Any = convert_model(plain, T, fuse_activation=fuse)
    assert isinstance(converted[1], FusedTSigmaBN) and converted[1].process_group == "world"
    x = torch.randn(N, 3, 5, 5)
    torch.testing.assert_close(converted(x.repeat(T, 1, 1, 1))[:N], plain(x), rtol=1e-4, atol=1e-5)
    assert list(converted.state_dict()) == list(plain.state_dict())
    back = revert_model(converted, 2)
    assert type(back[1]) is SyncBatchNormAct  # type: ignore[index]
    torch.testing.assert_close(back(x), plain(x), rtol=1e-4, atol=1e-5)
