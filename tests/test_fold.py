"""Folded layers and exported networks against the task's stream of the multi-task model in eval mode."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import NETWORKS, pretrained
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations

from tsbn_kernels import (
    FusedTSigmaBN,
    FusedTSigmaBN1d,
    FusedTSigmaBN2d,
    FusedTSigmaBN3d,
    MultiTaskModel,
    convert_model,
    export_task,
    fold_into_conv,
    revert_model,
    use_backend,
)
from tsbn_kernels.activations import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("one_thread")

T, N = 3, 4
TASKS = ("age", "smile", "hat")
variants = pytest.mark.parametrize("variant", ["ts_sigma_bn", "tsbn"])
LAYERS = {1: FusedTSigmaBN1d, 2: FusedTSigmaBN2d, 3: FusedTSigmaBN3d}
CONVOLUTIONS = [
    (kind, dims, groups)
    for (dims, kinds), groups in product(
        {
            1: (nn.Conv1d, nn.ConvTranspose1d),
            2: (nn.Conv2d, nn.ConvTranspose2d),
            3: (nn.Conv3d, nn.ConvTranspose3d),
        }.items(),
        (1, 2),
    )
    for kind in kinds
]
# Of outputs of a size near 1. A folded bfloat16 network rounds its weights once more and its activations once less.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 5e-2}


def randomise(model: nn.Module) -> Any:
    """Tasks that differ, and normalisation that matters."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, (FusedTSigmaBN, _BatchNorm)):
                layer.weight.normal_(0.7, 0.4)
                layer.running_mean.normal_(0, 0.2)
                layer.running_var.uniform_(0.5, 1.5)
                if layer.bias is not None:
                    layer.bias.uniform_(0.0, 0.5)
    return model.eval()


def converted(name: str, dtype: torch.dtype = torch.float32, variant: Any = "ts_sigma_bn") -> Any:
    return randomise(convert_model(pretrained(name, dtype), T, variant=variant))


def export(model: nn.Module, task: int | str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return export_task(model, task)


def stream_of(model: nn.Module, x: Tensor, task: int) -> Tensor:
    """What a converted model gives for one task, with the other streams holding other numbers."""
    streams = [x if t == task else torch.randn_like(x) for t in range(T)]
    with torch.no_grad(), use_backend("reference"):
        return model(torch.cat(streams)).chunk(T)[task]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCES[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * max(1.0, expected.abs().max().item()))


def normalisations(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, (FusedTSigmaBN, _BatchNorm))]


# ---- one layer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "dims", "groups"), CONVOLUTIONS)
@pytest.mark.parametrize("conv_bias", [True, False])
@pytest.mark.parametrize(("gate", "bias"), [("sigmoid", False), ("sigmoid", "frozen"), ("identity", True)])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_every_convolution(
    dtype: torch.dtype, gate: Any, bias: Any, conv_bias: bool, kind: Any, dims: int, groups: int
) -> None:
    options = {"output_padding": 1} if "Transpose" in kind.__name__ else {"padding_mode": "reflect"}
    conv = kind(4, 6, 3, stride=2, padding=1, groups=groups, bias=conv_bias, dtype=dtype, **options)
    layer = randomise(LAYERS[dims](T, 6, gate=gate, bias=bias, dtype=dtype))
    x = torch.randn(N, 4, *(5,) * dims, dtype=dtype)
    for task in range(T):
        folded = fold_into_conv(conv, layer, task)
        assert type(folded) is kind
        assert_close(folded(x), stream_of(nn.Sequential(conv, layer), x, task))


@pytest.mark.parametrize("conv_bias", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", [FusedTSigmaBN1d, FusedTSigmaBN])
def test_linear(kind: Any, dtype: torch.dtype, conv_bias: bool) -> None:
    linear = nn.Linear(4, 6, bias=conv_bias, dtype=dtype)
    layer = randomise(kind(T, 6, bias=True, dtype=dtype))
    x = torch.randn(N, 4, dtype=dtype)
    folded = fold_into_conv(linear, layer, -1)
    assert isinstance(folded, nn.Linear)
    assert_close(folded(x), stream_of(nn.Sequential(linear, layer), x, T - 1))
    # Of three axes the layer would normalise the second, which is no longer possible.
    with pytest.raises(ValueError, match=r"folded into Linear.*takes \[N, C\] and got 3 dimensions"):
        folded(torch.randn(N, 6, 4, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("statistics", ["narrow", "wide"])
def test_half_precision_is_rounded_once(statistics: str, dtype: torch.dtype) -> None:
    """The folded parameters are those of float64, rounded."""
    conv = nn.Conv2d(16, 64, 3, dtype=dtype)
    layer = randomise(FusedTSigmaBN2d(T, 64, bias=True, dtype=dtype))
    if statistics == "wide":
        layer.running_mean, layer.running_var = layer.running_mean.float() * 1.01, layer.running_var.float() * 1.01
    exact: Any = fold_into_conv(copy.deepcopy(conv).double(), copy.deepcopy(layer).double(), 1)
    folded: Any = fold_into_conv(conv, layer, 1)
    for name in ("weight", "bias"):
        actual, expected = getattr(folded, name), getattr(exact, name)
        assert actual.dtype == dtype
        # float32 may fall to the other side of a midpoint, once in some ten thousand times
        assert (actual == expected.to(dtype)).double().mean() > 0.999
        torch.testing.assert_close(actual.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_a_folded_layer_is_a_copy_like_the_convolution() -> None:
    conv = nn.Conv2d(4, 6, 3, bias=False).to(memory_format=torch.channels_last).train()
    conv.weight.requires_grad_(False)
    layer = randomise(FusedTSigmaBN2d(T, 6)).train()
    before = copy.deepcopy(conv), copy.deepcopy(layer)
    folded: Any = fold_into_conv(conv, layer, 0)
    assert not folded.training and conv.training and layer.training
    assert folded.weight.is_contiguous(memory_format=torch.channels_last)
    assert not folded.weight.requires_grad and not folded.bias.requires_grad
    assert isinstance(folded.bias, nn.Parameter) and conv.bias is None
    folded.weight.data.zero_()
    for module, copied in zip((conv, layer), before, strict=True):
        for one, other in zip(module.state_dict().values(), copied.state_dict().values(), strict=True):
            assert torch.equal(one, other)
    assert fold_into_conv(conv.to("meta"), layer.to("meta"), 0).weight.is_meta


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activation_follows(activation: Any) -> None:
    conv = nn.Conv2d(4, 6, 3).double()
    layer = randomise(FusedTSigmaBN2d(T, 6, activation=activation, negative_slope=0.3, bias=True, dtype=torch.float64))
    x = torch.randn(N, 4, 8, 8, dtype=torch.float64)
    folded = fold_into_conv(conv, layer, 1)
    assert isinstance(folded, nn.Sequential) and len(folded) == 2 and not folded.training
    model = nn.Sequential(conv, layer)
    exported = export(model, 1)
    assert [type(module) for module in exported] == [nn.Conv2d, type(folded[1])]
    expected = stream_of(model, x, 1)
    assert_close(folded(x), expected)
    assert_close(exported(x), expected)


def test_what_cannot_be_folded_says_why() -> None:
    conv, layer = nn.Conv2d(4, 6, 3), FusedTSigmaBN2d(T, 6)
    for task in (T, -T - 1):
        with pytest.raises(IndexError, match=f"task {task} is out of range for num_tasks=3"):
            fold_into_conv(conv, layer, task)
    with pytest.raises(ValueError, match=r"into Conv2d: it has no running statistics"):
        fold_into_conv(conv, FusedTSigmaBN2d(T, 6, track_running_stats=False), 0)
    for wrong in (conv, nn.Linear(6, 4), nn.ConvTranspose2d(6, 5, 1)):
        with pytest.raises(ValueError, match=r"it has 7 channels and its input [456]"):
            fold_into_conv(wrong, FusedTSigmaBN2d(T, 7), 0)
    with pytest.raises(ValueError, match="its channels are not the last axis"):
        fold_into_conv(nn.Linear(4, 6), layer, 0)
    weight_norm = parametrizations.weight_norm(nn.Conv2d(4, 6, 3))
    for unknown in (nn.ReLU(), nn.Sequential(conv), weight_norm, nn.LazyConv2d(6, 3), nn.Bilinear(2, 3, 6)):
        with pytest.raises(TypeError, match=r"cannot fold into \w+, expected one of nn.Conv1d.*nn.Linear"):
            fold_into_conv(unknown, layer, 0)
    for unknown_layer in (nn.BatchNorm2d(6), None):
        with pytest.raises(TypeError, match="layer must be a FusedTSigmaBN, got"):
            fold_into_conv(conv, unknown_layer, 0)  # type: ignore[arg-type]
    conv.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="Conv2d has hooks"):
        fold_into_conv(conv, layer, 0)


# ---- networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@variants
def test_networks_equal_their_stream(variant: str, dtype: torch.dtype, name: str) -> None:
    model = converted(name, dtype, variant).train()  # it is exported in eval mode anyway
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(N, 3, 32, 32, dtype=dtype)
    for task in range(T):
        exported = export(model, task)
        assert type(exported) is type(revert_model(model, task))
        assert not any(module.training for module in exported.modules())
        assert not normalisations(exported)
        expected = stream_of(copy.deepcopy(model).eval(), x, task)
        if dtype == torch.bfloat16:  # where a maximum tips it is one value that differs, by much
            assert (exported(x) - expected).norm() < TOLERANCES[dtype] * expected.norm()
        else:
            assert_close(exported(x), expected)
    assert model.training and all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_names_and_parameters_are_those_of_the_convolutions() -> None:
    model = converted("resnet18")
    exported = export(model, 1)
    plain = NETWORKS["resnet18"]()
    convolutions = {name for name, module in plain.named_modules() if isinstance(module, nn.Conv2d)}
    assert set(exported.state_dict()) == {f"{name}.{kind}" for name in convolutions for kind in ("weight", "bias")}
    shapes = {name: type(module) for name, module in plain.named_modules() if not isinstance(module, nn.BatchNorm2d)}
    for name, module in exported.named_modules():
        assert type(module) is shapes.get(name, nn.Identity)
    x = torch.randn(N, 3, 32, 32)
    assert_close(exported(x), model(x.repeat(T, 1, 1, 1)).chunk(T)[1])  # of the backend that runs by default
    weights = sum(plain.get_submodule(name).weight.numel() for name in convolutions)
    biases = sum(plain.get_submodule(name).out_channels for name in convolutions)
    assert sum(parameter.numel() for parameter in exported.parameters()) == weights + biases
    pickle.loads(pickle.dumps(exported)).load_state_dict(exported.state_dict(), strict=True)


@pytest.mark.parametrize("task", ["smile", 1, -2])
def test_a_multi_task_model_gives_backbone_and_head(task: int | str) -> None:
    # The backbone ends in [N, C], and so the head's first layer is given that.
    heads = {name: nn.Sequential(nn.Linear(16, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 1)) for name in TASKS}
    model = randomise(MultiTaskModel(convert_model(pretrained("celeba"), T), heads)).double()
    before = copy.deepcopy(model.state_dict())
    exported = export(model, task)
    assert not normalisations(exported)
    x = torch.randn(N, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad(), use_backend("reference"):
        assert_close(exported(x), model(x)["smile"])
        assert_close(exported(x), model(x, tasks=["hat", "smile"])["smile"])
    assert sum(p.numel() for p in exported[1].parameters()) == sum(
        p.numel() for p in (*heads["smile"][0].parameters(), *heads["smile"][3].parameters())
    )
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


class Features(nn.Module):
    """A backbone that returns a structure, with a shared stem."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.first, self.norm1 = nn.Conv2d(4, 5, 3, groups=1), nn.BatchNorm2d(5)
        self.second, self.norm2 = nn.ConvTranspose2d(5, 6, 3), nn.BatchNorm2d(6)
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        low = self.norm1(self.first(self.stem(x)))
        high = self.norm2(self.second(low.relu()))
        return {"low": low, "high": high} if self.kind == "dict" else (low, high)


class Head(nn.Module):
    def forward(self, features: Any) -> Tensor:
        low, high = features.values() if isinstance(features, dict) else features
        return low.mean((2, 3)).sum(1) + high.amax((1, 2, 3))


@pytest.mark.parametrize("kind", ["dict", "tuple"])
def test_heads_get_the_structure_that_the_backbone_returns(kind: str) -> None:
    model = randomise(MultiTaskModel(convert_model(Features(kind), T), {name: Head() for name in TASKS})).double()
    x = torch.randn(N, 3, 12, 12, dtype=torch.float64)
    with torch.no_grad(), use_backend("reference"):
        expected = model(x)
    for name in TASKS:
        exported = export(model, name)
        assert not normalisations(exported)
        assert_close(exported(x), expected[name])


# ---- what must not be folded -------------------------------------------------------------------------------------


class Awkward(nn.Module):
    """``uses`` says what else becomes of the convolution, or of the normalisation."""

    def __init__(self, uses: str) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.uses = uses
        if uses == "tied":
            self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        more = {
            "output": lambda: y,
            "conv twice": lambda: self.conv(2 * x),
            "norm twice": lambda: self.norm(self.other(x)),
            "weight": lambda: 2 * self.conv.weight.sum(),
            "gate": lambda: self.norm.weight.sum() * 0,
            "function": lambda: nn.functional.conv2d(x, self.conv.weight),
            "before": lambda: y,
            "relu": lambda: 0,
            "training": lambda: y if self.training else 0,
        }.get(self.uses, lambda: self.other(x))()
        if self.uses == "relu":
            y = y.relu()
        return self.norm(x if self.uses == "before" else y) + more


@pytest.mark.parametrize(
    "uses",
    [
        "output",
        "relu",
        "conv twice",
        "norm twice",
        "weight",
        "gate",
        "function",
        "before",
        "tied",
        "training",
        "nothing",
    ],
)
def test_only_what_a_normalisation_alone_uses_is_folded(uses: str) -> None:
    model = randomise(convert_model(Awkward(uses), T)).double()
    exported = export(copy.deepcopy(model).train(), 2)
    assert len(normalisations(exported)) == (uses not in ("tied", "training", "nothing"))
    x = torch.randn(N, 3, 6, 6, dtype=torch.float64)
    assert_close(exported(x), stream_of(model, x, 2))


def test_hooks_parametrisations_and_batch_statistics_stay() -> None:
    hooked, weight_normed = nn.Conv2d(3, 3, 1), parametrizations.weight_norm(nn.Conv2d(3, 3, 1))
    hooked.register_forward_hook(lambda _module, _args, y: 2 * y)
    plain = nn.Sequential(hooked, nn.BatchNorm2d(3), weight_normed, nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    model = randomise(convert_model(nn.Sequential(*plain, nn.BatchNorm2d(3)), T)).double()
    exported = export(model, 0)
    assert [type(exported[i]) for i in (1, 3, 5)] == [nn.BatchNorm2d, nn.BatchNorm2d, nn.Identity]
    x = torch.randn(N, 3, 6, 6, dtype=torch.float64)
    assert_close(exported(x), stream_of(model, x, 0))
    untracked = convert_model(
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)), T
    ).double()
    exported = export(untracked.eval(), 1)
    assert isinstance(exported[1], nn.BatchNorm2d)
    assert_close(exported(x), stream_of(untracked, x, 1))


def test_a_linear_layer_over_another_axis_is_an_error_and_never_folded_into_2d() -> None:
    model = randomise(convert_model(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm2d(3)), T)).double()
    exported = export(model, 0)
    assert isinstance(exported[1], nn.BatchNorm2d)
    x = torch.randn(N, 3, 6, 5, dtype=torch.float64)
    assert_close(exported(x), stream_of(model, x, 0))
    plain = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(3, 3), nn.BatchNorm1d(3))
    model = randomise(convert_model(plain, T)).double()
    exported = export(model, 0)  # what the first is given may have more axes
    assert [type(exported[i]) for i in (1, 4)] == [nn.BatchNorm1d, nn.Identity]
    x = torch.randn(N, 5, dtype=torch.float64)
    assert_close(exported(x), stream_of(model, x, 0))
    model = randomise(convert_model(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), T)).double()
    x = torch.randn(N, 3, 5, dtype=torch.float64)
    assert_close(export(model, 0)(x), stream_of(model, x, 0))


class Residual(nn.Module):
    def __init__(self, layer: FusedTSigmaBN, *, convolve: bool, of_itself: bool = False) -> None:
        super().__init__()
        self.of_itself = of_itself
        self.conv = nn.Conv2d(3, 3, 1) if convolve else nn.Identity()
        self.norm = layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y, residual=y if self.of_itself else x)


@pytest.mark.parametrize("convolve", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_residuals_are_added_before_the_activation(activation: Any, convolve: bool) -> None:
    model = randomise(Residual(FusedTSigmaBN2d(T, 3, activation=activation), convolve=convolve)).double()
    exported = export(model, 1)
    assert bool(normalisations(exported)) is not convolve
    x = torch.randn(N, 3, 6, 6, dtype=torch.float64)
    assert_close(exported(x), stream_of(model, x, 1))
    assert_close(torch.export.export(exported, (x,)).module()(x), exported(x))


def test_a_convolution_that_is_its_own_residual_stays() -> None:
    model = randomise(Residual(FusedTSigmaBN2d(T, 3), convolve=True, of_itself=True)).double()
    exported = export(model, 1)
    assert normalisations(exported)
    x = torch.randn(N, 3, 6, 6, dtype=torch.float64)
    assert_close(exported(x), stream_of(model, x, 1))


class FansOut(nn.Module):
    """Its first layer is told to fan one input out, which one stream of one task does into itself."""

    def __init__(self, *, convolve: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1) if convolve else nn.Identity()
        self.norm = FusedTSigmaBN2d(T, 3)
        self.next = nn.Sequential(nn.Conv2d(3, 4, 1), FusedTSigmaBN2d(T, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.next(self.norm(self.conv(x), fan_out=True))


@pytest.mark.parametrize("convolve", [True, False])
def test_one_stream_fans_out_into_itself(convolve: bool) -> None:
    model = randomise(FansOut(convolve=convolve)).double()
    x = torch.randn(N, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad(), use_backend("reference"):
        streams = model(x).chunk(T)
    for task, expected in enumerate(streams):
        exported = export(model, task)
        assert bool(normalisations(exported)) is not convolve
        assert_close(exported(x), expected)


class BatchNormAct2d(nn.BatchNorm2d):
    """What timm's class of that name adds to nn.BatchNorm2d; it is known by where it comes from."""

    __module__ = "timm.layers.norm_act"

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.drop, self.act = nn.Dropout(0.5), nn.PReLU(init=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_batch_norm_act_keeps_its_activation(dtype: torch.dtype) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4), BatchNormAct2d(4))
    model = randomise(convert_model(plain, T).to(dtype))
    exported = export(model, 1)
    assert [type(module) for module in exported] == [nn.Conv2d, nn.Sequential, BatchNormAct2d]
    assert {tensor.dtype for tensor in exported.parameters()} == {dtype}
    assert {"1.act.weight", "2.act.weight"} <= set(exported.state_dict())
    x = torch.randn(N, 3, 6, 6, dtype=dtype)
    assert_close(exported(x), stream_of(model, x, 1))


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.norm(self.conv(x))
        return y if y.sum() > 0 else -y


def test_a_model_that_cannot_be_traced_stays_correct_and_says_so() -> None:
    model = randomise(convert_model(Untraceable(), T, fuse_activation=False)).double()
    with pytest.warns(
        UserWarning, match=r"cannot trace Untraceable, its norm.* unfolded in 'norm': TraceError"
    ) as told:
        exported = export_task(model, 1)
    assert len(told) == 1 and told[0].filename == __file__
    assert isinstance(exported.norm, nn.BatchNorm2d)
    assert model.calls == exported.calls == 0
    x = torch.randn(N, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(exported(x).abs(), stream_of(model, x, 1).abs())
    multitask = MultiTaskModel(model, {name: Untraceable() for name in TASKS})
    with pytest.warns(UserWarning, match="cannot trace Untraceable.*; torch.fx cannot trace Untraceable") as told:
        export_task(multitask, "hat")
    assert len(told) == 1


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.norm(self.conv(x))
        return self.last


def test_tracing_leaves_nothing_behind() -> None:
    model = randomise(convert_model(Remembers(), T))
    exported = export(model, 0)
    assert model.last is exported.last is None
    assert not normalisations(exported)


def test_shared_modules_are_folded_where_they_stand() -> None:
    block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    plain = nn.Sequential(block, nn.ReLU())
    plain.alias = block  # another name, not another call: nn.Sequential runs it too
    model = randomise(convert_model(plain, T)).double()
    exported = export(model, 0)
    assert exported.alias[0] is exported[0][0] and exported.alias[1] is exported[0][1]
    x = torch.randn(N, 3, 6, 6, dtype=torch.float64)
    assert_close(exported(x), stream_of(model, x, 0))


def test_nothing_to_export_is_an_error() -> None:
    model = MultiTaskModel(convert_model(pretrained("celeba"), T), {name: nn.Identity() for name in TASKS})
    with pytest.raises(ValueError, match="task must be one of age, smile, hat, or an index, got 'shoe'"):
        export_task(model, "shoe")
    for exportable in (model, model.backbone):
        with pytest.raises(IndexError, match="task 3 is out of range for num_tasks=3"):
            export_task(exportable, 3)
    with pytest.raises(TypeError, match="CelebA has no heads to be named, task must be an index, got 'age'"):
        export_task(model.backbone, "age")
    with pytest.raises(ValueError, match="Sequential has no task-specific layer; convert it with convert_model"):
        export_task(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), 0)
    with pytest.raises(ValueError, match="Sequential has a MultiTaskModel inside; export that one"):
        export_task(nn.Sequential(model), 0)


@pytest.mark.parametrize("kind", ["layer hook", "forward of the convolution", "subclass"])
def test_only_what_is_known_is_folded(kind: str) -> None:
    model = randomise(convert_model(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), T, fuse_activation=False))
    conv, norm = model.double()
    if kind == "layer hook":
        norm.register_forward_hook(lambda _, __, y: 2 * y)
    elif kind == "forward of the convolution":
        forward = conv.forward
        conv.forward = lambda x: 2 * forward(x)
    else:
        conv.__class__ = type("Own", (nn.Conv2d,), {"forward": lambda self, x: 2 * nn.Conv2d.forward(self, x)})
    x = torch.randn(N, 3, 6, 6, dtype=torch.float64)
    exported = export(model, 1)
    assert isinstance(exported[1], nn.BatchNorm2d)
    assert_close(exported(x), stream_of(model, x, 1))
    error = TypeError if kind == "subclass" else ValueError
    with pytest.raises(error, match="cannot fold"):
        fold_into_conv(conv, norm, 1)


class FoldsItself(nn.Module):
    """As timm's RepVGG block: two branches that it makes one convolution of, reading what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(2))

    def reparameterize(self) -> None:
        folded = [nn.utils.fuse_conv_bn_eval(conv, bn) for conv, bn in self.branches]
        conv = copy.deepcopy(folded[0])
        conv.weight.data += folded[1].weight
        conv.bias.data += folded[1].bias
        self.branches = nn.ModuleList([conv])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = sum(branch(x) for branch in self.branches)
        return y


def test_blocks_that_fold_themselves_can() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), FoldsItself())
    model = randomise(convert_model(plain, T)).double()
    exported = export(model, 1)
    assert type(exported[1]) is nn.Identity
    exported[2].reparameterize()
    assert not normalisations(exported)
    x = torch.randn(N, 3, 6, 6, dtype=torch.float64)
    assert_close(exported(x), stream_of(model, x, 1))


# ---- exporters ---------------------------------------------------------------------------------------------------


def _multitask(name: str) -> MultiTaskModel:
    backbone = converted(name)
    heads = {task: nn.LazyConv2d(1, 1) if name == "segnet" else nn.LazyLinear(1) for task in TASKS}
    model = MultiTaskModel(backbone, heads).eval()
    with torch.no_grad(), use_backend("reference"):
        model(torch.randn(N, 3, 32, 32))
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_torch_export_takes_it(name: str) -> None:
    exported = export(_multitask(name), "smile")
    x = torch.randn(N, 3, 32, 32)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(exported, (x,), dynamic_shapes=({0: batch},))
    called = " ".join(str(node.target) for node in program.graph.nodes)
    assert "tsbn" not in called
    assert "batch_norm" not in called
    for n in (N, 7):
        x = torch.randn(n, 3, 32, 32)
        assert_close(program.module()(x), exported(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_takes_it() -> None:
    exported = export(_multitask("celeba"), "smile")
    assert not any(has_any_hooks(module) for module in exported.modules())
    x = torch.randn(N, 3, 32, 32)
    assert_close(torch.jit.script(exported)(x), exported(x))
    unflattened = export(convert_model(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()), T), 0)
    x = torch.randn(N, 4)
    assert_close(torch.jit.script(unflattened)(x), unflattened(x))
    linear = fold_into_conv(nn.Linear(3, 4), randomise(FusedTSigmaBN1d(T, 4)), 0)
    x = torch.randn(N, 3)
    assert_close(torch.jit.script(linear)(x), linear(x))


def has_any_hooks(module: nn.Module) -> bool:
    return any(value for name, value in vars(module).items() if name.endswith("_hooks"))


@pytest.mark.filterwarnings("ignore")  # those of the exporter itself
@pytest.mark.parametrize("name", ["resnet18", "bottleneck", "celeba"])
def test_onnx_takes_it(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("onnx") is None:
        pytest.skip("onnx is not installed")
    dynamo = importlib.util.find_spec("onnxscript") is not None  # else the older exporter, which does without
    import onnx
    from onnx.reference import ReferenceEvaluator

    exported = export(_multitask(name), "smile")
    path = str(tmp_path / "task.onnx")
    batch = torch.export.Dim("batch", min=2, max=64)
    options: Any = {"dynamic_shapes": ({0: batch},)} if dynamo else {"dynamic_axes": {"x": {0: "batch"}}}
    torch.onnx.export(exported, (torch.randn(N, 3, 32, 32),), path, dynamo=dynamo, input_names=["x"], **options)
    onnx.checker.check_model(path)
    assert {node.op_type for node in onnx.load(path).graph.node} & {"Conv", "BatchNormalization"} == {"Conv"}
    for n in (N, 7):
        x = torch.randn(n, 3, 32, 32)
        (y,) = ReferenceEvaluator(path).run(None, {"x": x.numpy()})
        assert_close(torch.from_numpy(y), exported(x).detach())
