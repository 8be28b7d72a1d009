"""Folded layers and exported networks against the task's stream of the multi-task model in eval mode."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from support.folding import (
    TASKS,
    TOLERANCES,
    N,
    T,
    assert_close,
    converted,
    export,
    normalisations,
    randomise,
    stream_of,
)
from support.networks import NETWORKS, pretrained
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tsbn_kernels import (
    FusedTSigmaBN,
    FusedTSigmaBN1d,
    FusedTSigmaBN2d,
    FusedTSigmaBN3d,
    MultiTaskModel,
    Pruning,
    convert_model,
    export_task,
    fold_into_conv,
    revert_model,
    use_backend,
)
from tsbn_kernels.definition.activations import ACTIVATIONS

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
@pytest.mark.parametrize("name", ["resnet18", "bottleneck", "celeba"])  # the last two are pruned
def test_onnx_takes_it(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("onnx") is None:
        pytest.skip("onnx is not installed")
    dynamo = importlib.util.find_spec("onnxscript") is not None  # else the older exporter, which does without
    import onnx
    from onnx.reference import ReferenceEvaluator

    exported: Any = export(_multitask(name), "smile")
    if name != "resnet18" and importlib.util.find_spec("torch_pruning") is not None:
        full = sum(p.numel() for p in exported.parameters())
        pruning = Pruning(torch.randn(2, 3, 32, 32), amount=0.3, min_filters=1)
        exported = export_task(_multitask(name), "smile", prune=pruning)
        assert sum(p.numel() for p in exported.parameters()) < 0.95 * full
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
