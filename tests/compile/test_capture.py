"""What a CUDA graph can be captured of, without a GPU: of meta tensors no value can be read, and copies are seen."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tsbn_kernels import FusedTSigmaBN2d, FusedTSigmaLN, LateFanOut, MultiTaskModel, convert_model
from tsbn_kernels.backends import capture
from tsbn_kernels.backends.triton import autotune

T, C = 3, 4
X = (2 * T, C, 5, 5)


class Copies(TorchDispatchMode):
    """Names of what takes values from one device to another, from Python, or there."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.patch = pytest.MonkeyPatch()

    def __enter__(self) -> Copies:
        """The dispatcher sees nothing of how a list of numbers becomes a tensor of another device."""
        make = torch.tensor

        def seen(*args: Any, **kwargs: Any) -> Tensor:
            result = make(*args, **kwargs)
            if result.device.type != "cpu":
                self.names.append("tensor")
            return result

        self.patch.setattr(torch, "tensor", seen)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patch.undo()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        tensors = [each for each in (*args, *(kwargs or {}).values()) if isinstance(each, Tensor)]
        result = func(*args, **(kwargs or {}))
        results = [result] if isinstance(result, Tensor) else []
        moves = len({tensor.device for tensor in tensors + results if tensor.dim()}) > 1
        if moves or str(func).startswith(("aten._local_scalar_dense", "aten.nonzero")):
            self.names.append(str(func))
        return result


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    capture._indices.clear()
    yield
    capture._indices.clear()


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "is_capturing", lambda: True)


def meta(*shape: int) -> Tensor:
    return torch.randn(shape, device="meta", requires_grad=True)


def step(call: Callable[[Any], Any], one: Any) -> None:
    """Forward and backward."""
    y = call(one)
    outputs = [y] if isinstance(y, Tensor) else list(y)
    torch.autograd.backward(outputs, [torch.randn_like(each) for each in outputs])


def network() -> MultiTaskModel:
    backbone = nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    heads = {name: nn.Linear(C, 2) for name in "abc"}
    return MultiTaskModel(convert_model(backbone, T), heads).to("meta")


def layer(**options: Any) -> FusedTSigmaBN2d:
    return FusedTSigmaBN2d(T, C, device="meta", bias=True, **options)


def of_model(model: MultiTaskModel, *tasks: str) -> list[Tensor]:
    return list(model(meta(2, 3, 7, 7), tasks=tasks).values())


def rows(**options: Any) -> FusedTSigmaLN:
    return FusedTSigmaLN(T, 5, device="meta", bias=True, **options)


SOME = 4, C, 5, 5
STEPS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "plain": (layer, lambda one: one(meta(*X))),
    "momentum None": (lambda: layer(momentum=None), lambda one: one(meta(*X))),
    "evaluation": (lambda: layer().eval(), lambda one: one(meta(*X))),
    "epilogue": (lambda: layer(activation="gelu"), lambda one: one(meta(*X), meta(*X))),
    "fan-out": (lambda: layer(fan_out=True), lambda one: one(meta(*X))),
    "late": (lambda: LateFanOut(T, C, device="meta"), lambda one: one(meta(*X))),
    "recovered": (lambda: layer(activation="leaky_relu", recover_input=True), lambda one: one(meta(*X))),
    "some tasks": (layer, lambda one: one(meta(*SOME), tasks=[0, 2])),
    "some tasks, momentum None": (lambda: layer(momentum=None), lambda one: one(meta(*SOME), tasks=(2, 1))),
    "a tensor of tasks": (layer, lambda one: one(meta(*SOME), tasks=torch.empty(2, dtype=torch.int64, device="meta"))),
    "streams": (layer, lambda one: one.streams(meta(*X))),
    "some streams": (layer, lambda one: one.streams(meta(*X))[1:]),
    "one stream": (layer, lambda one: one.streams(meta(*X))[1]),
    "LN": (rows, lambda one: one(meta(*X))),
    "LN, addition": (rows, lambda one: one.add(meta(*X), meta(*X))),
    "LN, fan-out": (lambda: rows(fan_out=True), lambda one: one(meta(*X))),
    "LN, some tasks": (rows, lambda one: one(meta(*SOME), tasks=[0, 2])),
    "LN, some streams": (rows, lambda one: one.streams(meta(*X))[1:]),
    "a model": (network, lambda model: of_model(model, "a", "b", "c")),
    "a model of some tasks": (network, lambda model: of_model(model, "c", "a")),
}


@pytest.mark.usefixtures("capturing")
@pytest.mark.parametrize("name", STEPS)
def test_a_step_that_is_captured_copies_nothing(name: str) -> None:
    """Also where no step went before."""
    make, call = STEPS[name]
    one = make()
    with Copies() as copies:
        step(call, one)
    assert copies.names == []
    assert not capture._indices  # which would be memory of the graph's


@pytest.mark.parametrize("name", [name for name in STEPS if name != "recovered"])
def test_indices_are_copied_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, call = STEPS[name]
    one = make()
    for copied in (1 if "some" in name or name == "one stream" else 0, 0):
        with Copies() as copies:
            step(call, one)
        assert len(copies.names) == copied, copies.names
    monkeypatch.setattr(capture, "is_capturing", lambda: True)
    with Copies() as copies:
        step(call, one)
    assert copies.names == []


def test_the_copies_would_be_seen() -> None:
    with Copies() as copies:
        torch.tensor([0, 2], device="meta")
        torch.randn(3).nonzero()
        torch.randn(1).item()
        torch.randn(3).to("meta")
    assert len(copies.names) == 4, copies.names


def test_recovered_inputs_that_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients are those of a layer that keeps its input."""
    torch.manual_seed(0)
    x, dy = torch.randn(X), torch.randn(X)
    one = FusedTSigmaBN2d(T, C, bias=True, activation="leaky_relu", recover_input=True)

    def gradients() -> tuple[Tensor, ...]:
        inputs = [x.clone().requires_grad_(), *one.parameters()]
        return torch.autograd.grad(one(inputs[0]), inputs, dy)

    monkeypatch.setattr(capture, "is_capturing", lambda: True)
    captured = gradients()
    one.recover_input = False
    assert all(torch.equal(a, b) for a, b in zip(captured, gradients(), strict=True))


@pytest.mark.parametrize("during", [False, True])
def test_indices(during: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that can be looked at: the CPU, taken for another."""
    monkeypatch.setattr(capture, "is_capturing", lambda: during)
    monkeypatch.setattr(capture, "_HOST", "none")
    like = torch.zeros(1)
    for tasks in ([2], [3, 0, 1], (0, 1, 2), [7, 5]):
        indices = capture.task_indices(tasks, like)
        assert torch.equal(indices, torch.tensor(tasks))
        assert indices.dtype == torch.int64
        assert (capture.task_indices(tuple(tasks), like) is indices) == (not during)


def test_indices_that_are_remembered_serve_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made in inference mode they may be kept for a backward pass; threads share them, and there are not too many."""
    monkeypatch.setattr(capture, "_HOST", "none")
    monkeypatch.setattr(capture, "_MOST", 5)
    with torch.inference_mode():
        assert not capture.task_indices([0, 2], torch.zeros(1)).is_inference()
    found: list[Tensor] = []

    def work() -> None:
        for k in range(200):
            indices = capture.task_indices([k % 9, 9], torch.zeros(1))
            assert indices.tolist() == [k % 9, 9]
        found.append(indices)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(capture._indices) <= 5 + len(threads)


def test_is_capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is touched that was not used before."""
    assert not capture.is_capturing()
    assert not torch.cuda.is_initialized()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert capture.is_capturing()
    assert autotune.is_capturing()
