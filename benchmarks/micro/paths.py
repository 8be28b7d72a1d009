"""The hot paths: what a call of the library spends its time in, each beside PyTorch's own batch normalisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.host import stubbed_launches
from tsbn_kernels import FusedTSigmaBN2d
from tsbn_kernels.backends import triton
from tsbn_kernels.functional import task_batch_norm
from tsbn_kernels.ops import operators

Step = Callable[[], object]

TASKS, EPS = 4, 1e-5
IN_CACHE = 4, 32, 12, 12  # N, C, H, W of a task: x and y take 0.6 MB in float32, and fit an L2 cache of 1 MB
BEYOND_CACHE = 16, 64, 64, 64  # 64 MB in float32: y is streamed past the caches
FLAT = 64, 256  # N, C of a task's one-dimensional layer
TINY = 2, 8, 4, 4  # nothing to compute: what is left is the host's share of a call


class Pair(NamedTuple):
    """A step of the library, and PyTorch's batch normalisation of one task in the same pass over the same tensor."""

    fused: Step
    pytorch: Step


@dataclass(frozen=True)
class HotPath:
    """A path by name; ``ready`` makes its tensors, and lends the steps while it is open."""

    name: str
    ready: Callable[[], AbstractContextManager[Pair]]
    checked: bool = True  # what exceeds the caches depends on the machine's other work, and is only measured


# ---- kernels: operators on tensors that are large enough for the host's share to be small ----------------------------


def _tensor(shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    """A few random values over and over: under valgrind more of them would take longer than what is counted."""
    size = math.prod(shape)
    values = torch.randn(1021)
    tensor = values.repeat(size // len(values) + 1)[:size].view(shape).to(dtype)
    return tensor.contiguous(memory_format=memory_format) if len(shape) == 4 else tensor


@contextmanager
def _kernel(
    kind: str,
    shape: tuple[int, ...] = IN_CACHE,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    activation: str = "none",
    shared: bool = False,
) -> Iterator[Pair]:
    samples, channels, *_ = shape
    x = _tensor((samples if shared else TASKS * samples, *shape[1:]), dtype, memory_format)
    all_x, dy = (_tensor((TASKS * samples, *shape[1:]), dtype, memory_format) for _ in range(2))
    weight, bias = torch.randn(TASKS, channels), torch.randn(TASKS, channels)
    options, epilogue = (TASKS, EPS, "sigmoid", "task_major"), (None, activation, 0.0, shared)
    fused = operators(None)
    _, mean, var = fused.forward_training(x, weight, bias, *options, *epilogue)
    plain = weight[0], bias[0], mean[0].clone(), var[0].clone()
    rstd = torch.rsqrt(var[0] + EPS)

    def pytorch_forward(training: bool) -> Tensor:
        y, *_ = torch.native_batch_norm(all_x, *plain, training, 0.0, EPS)
        return y if activation == "none" else y.relu_()

    def pytorch_backward() -> object:
        dz = dy if activation == "none" else torch.ops.aten.threshold_backward(dy, all_x, 0)
        mask = [True, True, True]
        return torch.ops.aten.native_batch_norm_backward(
            dz, all_x, plain[0], *plain[2:], mean[0], rstd, True, EPS, mask
        )

    if kind == "forward":
        yield Pair(lambda: fused.forward_training(x, weight, bias, *options, *epilogue), partial(pytorch_forward, True))
    elif kind == "eval":
        yield Pair(
            lambda: fused.forward_eval(x, weight, bias, mean, var, *options, *epilogue),
            partial(pytorch_forward, False),
        )
    else:
        flags = True, True, True, True  # training, and all three gradients
        yield Pair(
            lambda: fused.backward(dy, x, weight, mean, var, *options, *flags, bias, *epilogue), pytorch_backward
        )


FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "fp32 ReLU": {"activation": "relu"},
    "fp32 fan-out": {"shared": True},
}


def _kernels() -> Iterator[HotPath]:
    for layout, memory_format in FORMATS.items():
        in_format = partial(_kernel, memory_format=memory_format)
        for variant, settings in VARIANTS.items():
            for kind in ("forward", "backward"):
                yield HotPath(f"{layout} {variant} {kind}", partial(in_format, kind, **settings))
        yield HotPath(f"{layout} fp32 eval", partial(in_format, "eval"))
        for kind in ("forward", "backward"):
            name = f"{layout} fp32 beyond the caches {kind}"
            yield HotPath(name, partial(in_format, kind, BEYOND_CACHE), checked=False)
    for kind in ("forward", "backward"):
        yield HotPath(f"1d fp32 {kind}", partial(_kernel, kind, FLAT))


# ---- the host's share of a call --------------------------------------------------------------------------------------


def _tiny() -> Tensor:
    samples, *rest = TINY
    return torch.randn(TASKS * samples, *rest, requires_grad=True)


def _layers() -> tuple[FusedTSigmaBN2d, nn.BatchNorm2d]:
    return FusedTSigmaBN2d(TASKS, TINY[1]), nn.BatchNorm2d(TINY[1])


@contextmanager
def _module(training: bool) -> Iterator[Pair]:
    x, (fused, plain) = _tiny(), _layers()
    fused.train(training), plain.train(training)
    yield Pair(lambda: fused(x), lambda: plain(x))


@contextmanager
def _functional() -> Iterator[Pair]:
    x, (fused, plain) = _tiny(), _layers()
    yield Pair(
        lambda: task_batch_norm(
            x, fused.weight, fused.bias, fused.running_mean, fused.running_var, num_tasks=TASKS, momentum=0.1
        ),
        lambda: functional.batch_norm(
            x, plain.running_mean, plain.running_var, plain.weight, plain.bias, True, 0.1, EPS
        ),
    )


def _backward_of(module: nn.Module, x: Tensor) -> Step:
    y, leaves = module(x), [x, *module.parameters()]
    dy = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


@contextmanager
def _backward() -> Iterator[Pair]:
    x, (fused, plain) = _tiny(), _layers()
    yield Pair(_backward_of(fused, x), _backward_of(plain, x))


@contextmanager
def _launched(kind: str) -> Iterator[Pair]:
    """What precedes a launch on a GPU: the call of the Triton backend, whose kernels do not run."""
    x, (fused, plain) = _tiny(), _layers()
    with stubbed_launches():
        if kind == "forward":
            yield Pair(lambda: fused(x), lambda: plain(x))
        else:
            yield Pair(_backward_of(fused, x), _backward_of(plain, x))


def _host() -> Iterator[HotPath]:
    yield HotPath("host: module, training", partial(_module, True))
    yield HotPath("host: module, evaluation", partial(_module, False))
    yield HotPath("host: functional", _functional)
    yield HotPath("host: operator", partial(_kernel, "forward", TINY))
    yield HotPath("host: backward", _backward)
    if triton.available:
        for kind in ("forward", "backward"):
            yield HotPath(f"host: Triton {kind}, launch stubbed", partial(_launched, kind))


PATHS = (*_kernels(), *_host())
CHECKED = tuple(path for path in PATHS if path.checked)


@contextmanager
def one_thread() -> Iterator[None]:
    """A thread that waits for another measures the machine's other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
