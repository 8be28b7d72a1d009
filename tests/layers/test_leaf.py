"""Layers of this package in graphs of torch.fx: one node each, whatever the tracer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.layers import SHAPE, of_any_kind, trained
from support.networks import look_trained
from torch import Tensor, fx, nn

from tsbn_kernels import FusedTSigmaBN2d, LateFanOut, MultiTaskModel, convert_model, revert_model

T, N = 2, 3


def encoder() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5))


def test_every_tracer_takes_the_layers_for_leaves() -> None:
    model = convert_model(look_trained(encoder()), T)
    traced = fx.symbolic_trace(model)
    assert [str(node.target) for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2", "3", "4"]
    x = torch.randn(T * N, 3, 6, 6)
    torch.testing.assert_close(traced(x), model(x))
    assert traced.get_submodule("1") is model.get_submodule("1")
    torch.testing.assert_close(revert_model(traced.eval(), 1)(x), revert_model(model.eval(), 1)(x))


@of_any_kind
def test_a_layer_is_a_leaf(kind: str) -> None:
    model = nn.Sequential(trained(kind), nn.ReLU())
    traced = fx.symbolic_trace(model)
    assert [str(node.target) for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1"]
    x = torch.randn(SHAPE)
    torch.testing.assert_close(traced(x), model(x))
    with pytest.raises(TypeError, match=f"cannot trace {type(model[0]).__name__} '' by itself"):
        fx.symbolic_trace(model[0])


class Calls(nn.Module):
    def __init__(self, layer: nn.Module, *names: str) -> None:
        super().__init__()
        self.layer, self.names = layer, names

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x, **dict.fromkeys(self.names, x), tasks=[0], fan_out=False)
        return y * 2


@of_any_kind
def test_arguments_are_in_the_graph(kind: str) -> None:
    names = ("residual",) if kind == "BN" else ()
    model = Calls(trained(kind), *names)
    traced = fx.symbolic_trace(model)
    (node,) = (node for node in traced.graph.nodes if node.op == "call_module")
    assert list(node.kwargs) == [*names, "tasks", "fan_out"]
    x = torch.randn(SHAPE)[:N]
    torch.testing.assert_close(traced(x), model(x))


def test_late_fan_out_is_a_leaf() -> None:
    late = nn.Sequential(LateFanOut(T, 4, pool=nn.MaxPool2d(2), conv=nn.Conv2d(4, 6, 1)))
    x = torch.randn(N, 4, 6, 6)
    torch.testing.assert_close(fx.symbolic_trace(late)(x), late(x))


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.model = MultiTaskModel(convert_model(encoder(), T), {"a": nn.Flatten(), "b": nn.Flatten()})

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.model(self.stem(x), tasks=["b"])
        return outputs["b"] * 2  # type: ignore[no-any-return]


def test_a_model_is_a_leaf() -> None:
    model = Around()
    traced = fx.symbolic_trace(model)
    x = torch.randn(N, 3, 6, 6)
    torch.testing.assert_close(traced(x), model(x))
    with pytest.raises(TypeError, match="cannot trace MultiTaskModel '' by itself: take a tracer"):
        fx.symbolic_trace(model.model)


class BatchNormAct2d(nn.BatchNorm2d):
    __module__ = "timm.layers.norm_act"

    def __init__(self, num_features: int, act: nn.Module) -> None:
        super().__init__(num_features)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


@pytest.mark.parametrize("act", [nn.SiLU(), nn.Tanh()], ids=["inside", "outside"])
def test_timms_layer_activates_once(act: nn.Module) -> None:
    model = convert_model(look_trained(nn.Sequential(BatchNormAct2d(3, act))), T)
    x = torch.randn(T * N, 3, 4, 4)
    torch.testing.assert_close(fx.symbolic_trace(model)(x), model(x))


def test_what_cannot_be_a_leaf_says_so() -> None:
    layer = FusedTSigmaBN2d(T, 4)
    with pytest.raises(TypeError, match="cannot trace FusedTSigmaBN2d '' by itself"):
        fx.symbolic_trace(layer)
    model = nn.Sequential(layer)
    layer.register_forward_hook(lambda _, __, y: 2 * y)  # would run in the trace, and again in the graph
    with pytest.raises(TypeError, match="cannot trace FusedTSigmaBN2d '0' with its hooks"):
        fx.symbolic_trace(model)
    with pytest.raises(TypeError, match="input must be a tensor, got str"):
        layer("x")

    class Leaf(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, FusedTSigmaBN2d) or super().is_leaf_module(m, module_qualified_name)

    x = torch.randn(T * N, 4, 3, 3)
    torch.testing.assert_close(fx.GraphModule(model, Leaf().trace(model))(x), model(x))


def test_streams_cannot_be_traced() -> None:
    class Streams(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = FusedTSigmaBN2d(T, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer.streams(x)[0]

    with pytest.raises(TypeError, match="input must be a tensor, got Proxy"):
        fx.symbolic_trace(Streams())


def test_quantisation_of_a_graph() -> None:
    quantize_fx: Any = pytest.importorskip("torch.ao.quantization.quantize_fx")
    from torch.ao.quantization import get_default_qconfig_mapping

    if (
        "x86" not in torch.backends.quantized.supported_engines
        and "fbgemm" not in torch.backends.quantized.supported_engines
    ):
        pytest.skip("this PyTorch quantises nothing here")
    rows = nn.LayerNorm(4), nn.Conv2d(5, 3, 1), nn.RMSNorm(4)
    model = convert_model(look_trained(nn.Sequential(*encoder(), *rows)), T, layer_norm=True).eval()
    x = torch.randn(T * N, 3, 6, 6)
    prepared = quantize_fx.prepare_fx(model, get_default_qconfig_mapping("fbgemm"), (x,))
    prepared(x)
    y = quantize_fx.convert_fx(prepared)(x)
    assert (y - model(x)).norm() < 0.1 * model(x).norm()


def test_features_of_torchvision() -> None:
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    from torchvision.models import resnet18

    model = convert_model(look_trained(resnet18()), T).eval()
    extractor = extraction.create_feature_extractor(model, {"relu": "stem", "layer1": "low", "layer4.1.bn1": "high"})
    x = torch.randn(T * N, 3, 64, 64)
    features = extractor(x)
    low = model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(x)))))
    torch.testing.assert_close(features["low"], low)
    assert features["high"].shape == (T * N, 512, 2, 2)
