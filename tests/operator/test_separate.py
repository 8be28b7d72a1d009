"""Streams that are changed in place: by heads, by decoders behind the model, by what follows a layer's streams."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from tsbn_kernels import FusedTSigmaBN2d, MultiTaskModel, convert_model, recompute_outputs, revert_model
from tsbn_kernels.operator.separate import separate

TASKS = ("a", "b", "c")
T, N, C = 3, 2, 4


class Twice(nn.Module):
    """Writes to its input twice, the second time through a view."""

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        x[:, 1:].add_(1)
        return x * x


HEADS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(C, 2, 1)),
    "dropout": lambda: nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Flatten(), nn.Linear(C * 16, 2)),
    "silu": lambda: nn.Sequential(nn.SiLU(inplace=True), nn.AdaptiveAvgPool2d(1)),
    "views": Twice,
    "none": lambda: nn.Conv2d(C, 2, 1),
}


def build(*last: nn.Module, heads: str | None = None, **options: Any) -> MultiTaskModel:
    plain = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), nn.BatchNorm2d(C), *last)
    backbone = convert_model(plain, T, pretrained=False, fuse_activation=False)
    nn.init.normal_(backbone[1].weight)
    chosen = [heads] * T if heads else list(HEADS)[:T]
    return MultiTaskModel(backbone, {task: HEADS[name]() for task, name in zip(TASKS, chosen, strict=True)}, **options)


def results(outputs: dict[str, Tensor], parameters: list[nn.Parameter]) -> list[Tensor]:
    torch.manual_seed(3)
    gradients = torch.autograd.grad(list(outputs.values()), parameters, [torch.randn_like(y) for y in outputs.values()])
    return [*outputs.values(), *gradients]


def loop(model: MultiTaskModel, x: Tensor) -> dict[str, Tensor]:
    """The same heads behind a backbone of each task's own, which shares the parameters."""
    outputs = {}
    for t, task in enumerate(TASKS):
        features = model.backbone(x.repeat(T, 1, 1, 1)).unflatten(0, (T, len(x)))[t].clone()
        outputs[task] = model.heads[task](features)
    return outputs


@pytest.mark.parametrize("last", ["nothing", "convolution", "flatten", "channels_last"])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("heads", [None, "views", "relu", "silu", "none"])
def test_heads_that_write_in_place(heads: str | None, recompute: bool, last: str) -> None:
    layers = {"convolution": [nn.Conv2d(C, C, 1)], "flatten": [nn.Flatten(2), nn.Unflatten(2, (4, 4))]}
    model = build(*layers.get(last, []), heads=heads, recompute=recompute).double()
    x = torch.randn(N, 3, 4, 4, dtype=torch.float64)
    if last == "channels_last":
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    parameters = list(model.parameters())
    torch.manual_seed(1)
    wanted = results(loop(model, x), parameters)
    torch.manual_seed(1)
    for got, other in zip(results(model(x), parameters), wanted, strict=True):
        torch.testing.assert_close(got, other)


@pytest.mark.parametrize("stacking", ["task_major", "sample_major"])
@pytest.mark.parametrize("inside", [True, False])
def test_streams_of_a_layer(inside: bool, stacking: Any) -> None:
    """Also where what their operators save of them would be computed again."""
    layer = FusedTSigmaBN2d(T, C, stacking=stacking, dtype=torch.float64)
    convolution = nn.Conv2d(C, 2, 1, dtype=torch.float64)
    x = torch.randn(T * N, C, 3, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for clone in (True, False):
        with recompute_outputs() if inside else torch.enable_grad():
            streams = [stream.clone() if clone else stream for stream in layer.streams(x)]
            outputs = [convolution(streams[0]), convolution(streams[1].relu_()), convolution(streams[2].mul_(3))]
        outputs.append(streams[0].mul_(5))
        found.append(results(dict(enumerate(outputs[1:])), [x, layer.weight, convolution.weight]))  # type: ignore[arg-type, list-item]
    for got, wanted in zip(*found[::-1], strict=True):
        torch.testing.assert_close(got, wanted)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs[0].sum().backward() if not inside else _raise_as_pytorch()


def _raise_as_pytorch() -> None:
    """What is computed again is right, so that nothing is to be refused."""
    raise RuntimeError("modified by an inplace operation")


@pytest.mark.parametrize("how", ["head", "behind the model", "view behind the model"])
@pytest.mark.parametrize("last", [nn.Tanh(), nn.Sigmoid(), "recover_input"], ids=["tanh", "sigmoid", "recover_input"])
def test_what_the_backbone_has_saved_must_not_be_changed(last: Any, how: str) -> None:
    """PyTorch says so, as it does of a model of one task."""
    model = build(*[] if last == "recover_input" else [last])
    if last == "recover_input":
        model.backbone[1].recover_input = True
    head = nn.Sequential(nn.Dropout(0.5, inplace=True), nn.AdaptiveAvgPool2d(1))
    for task in TASKS:
        model.heads[task] = head if how == "head" else nn.Identity()
    outputs = model(dict.fromkeys(TASKS, torch.randn(N, 3, 4, 4)))
    if how != "head":
        outputs = {task: head(y if how == "behind the model" else y[:1]) for task, y in outputs.items()}
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs["b"].sum().backward()


def test_a_detached_output_must_not_be_changed_where_its_memory_is_saved() -> None:
    class Two(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return y, y.detach()

    model = build(nn.Tanh())
    model.backbone.__class__ = Two
    for task in TASKS:
        model.heads[task] = nn.Identity()
    y, detached = model(torch.randn(N, 3, 4, 4))["b"]
    detached.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_outputs_that_share_memory_are_not_changed_in_silence() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Any:
            y = self.norm(x)
            return y, y[..., ::2]

    class Head(nn.Module):
        def forward(self, features: Any) -> Tensor:
            return features[0].mul_(2).sum() + features[1].sum()  # type: ignore[no-any-return]

    model = MultiTaskModel(convert_model(Two(), T, fuse_activation=False), {task: Head() for task in TASKS})
    with pytest.raises(RuntimeError, match="other outputs of the backbone share its memory"):
        model(torch.randn(N, 3, 4, 4))["a"].backward()


def test_what_all_heads_share_is_not_changed_in_silence() -> None:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Any:
            stem = self.conv(x)
            return stem, self.norm(stem)

    class Head(nn.Module):
        def forward(self, features: Any) -> Tensor:
            return features[0].mul_(2).sum() + features[1].sum()  # type: ignore[no-any-return]

    model = MultiTaskModel(convert_model(Stem(), T, fuse_activation=False), {task: Head() for task in TASKS})
    x = torch.randn(N, 3, 4, 4)
    for gradients in (True, False):
        with (
            torch.set_grad_enabled(gradients),
            pytest.raises(RuntimeError, match="that the heads of other tasks get too"),
        ):
            model(x)
    plain = revert_model(model.backbone, 1)
    torch.testing.assert_close(model(x, tasks=["b"])["b"], Head()(plain(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_without_gradients(without: Any) -> None:
    model = build(heads="relu").eval()
    x = torch.randn(N, 3, 4, 4)
    wanted = loop(model, x)
    with without():
        for task, y in model(x).items():
            torch.testing.assert_close(y, wanted[task])
    frozen = build(heads="views")
    frozen.backbone.requires_grad_(False)
    parameter = nn.Parameter(torch.ones(()))
    frozen.heads["a"].register_forward_pre_hook(lambda _, args: (args[0].mul_(parameter),))
    frozen(x)["a"].sum().backward()
    assert parameter.grad is not None


def test_no_copy_is_made() -> None:
    stack = torch.randn(T * N, C, requires_grad=True) * 1
    (streams,) = separate([stack], T)
    for t, stream in enumerate(streams):
        assert stream.data_ptr() == stack[t * N :].data_ptr()
        assert not stream._is_view()


def test_all_modes_of_differentiation() -> None:
    x = torch.randn(T * N, C, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        a, _, c = separate([x * x], T)[0]
        return a.sin_() * c.exp()

    assert torch.autograd.gradcheck(function, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, x)
    primal = x.detach()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(primal, torch.ones_like(primal)))).tangent
    torch.testing.assert_close(tangent, torch.func.jvp(function, (primal,), (torch.ones_like(primal),))[1])
    torch.func.vmap(function)(torch.stack([primal, primal]))
    scale = torch.ones(C, dtype=torch.float64, requires_grad=True)  # as the parameters of a backbone are
    jacobians = [
        transform(lambda x: function(x * scale))(primal) for transform in (torch.func.jacfwd, torch.func.jacrev)
    ]
    torch.testing.assert_close(*jacobians)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_in_a_graph(backend: str) -> None:
    torch._dynamo.reset()
    model = build(heads="relu")
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    x = torch.randn(N, 3, 4, 4)
    found = [results(m(x), list(m.parameters())) for m in (compiled, model)]
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
