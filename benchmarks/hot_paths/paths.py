"""The hot paths: what a call of the library spends its time in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.hot_paths.host_cost import stubbed_launches
from tsbn_kernels import FusedTSigmaBN2d, FusedTSigmaLN, FusedTSigmaRMSNorm, MultiTaskModel, convert_model
from tsbn_kernels.backends import triton
from tsbn_kernels.definition.options import LayerNeeds, LayerOptions, LayerSaved, Needs, Options, Saved
from tsbn_kernels.functional import task_batch_norm
from tsbn_kernels.layers.layer_norm import TaskRowNorm
from tsbn_kernels.operator import layer_ops, mixed_ops
from tsbn_kernels.operator.ops import operators

Make = Callable[[], Callable[[], object]]

TASKS, EPS = 4, 1e-5
IN_CACHE = 4, 32, 12, 12  # N, C, H, W of a task: x and y take 0.6 MB in float32, and fit an L2 cache of 1 MB
FLAT = 64, 256  # N, C of a task's one-dimensional layer
TOKENS = 2, 98, 192  # samples of a task, tokens, D of a transformer's layer
TINY_TOKENS = 2, 2, 64  # as many values as TINY has
TINY = 2, 8, 4, 4  # nothing to compute: what is left is the host's share of a call


@dataclass(frozen=True)
class HotPath:
    """A path by name; ``make`` makes its tensors and gives the call, which runs inside ``within``."""

    name: str
    make: Make
    within: Callable[[], AbstractContextManager[None]] = nullcontext


# ---- kernels: operators on tensors that are large enough for the host's share to be small ----------------------------


def _tensor(shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    """A few random values over and over: under valgrind more of them would take longer than what is counted."""
    size = math.prod(shape)
    values = torch.randn(1021)
    tensor = values.repeat(size // len(values) + 1)[:size].view(shape).to(dtype)
    return tensor.contiguous(memory_format=memory_format) if len(shape) == 4 else tensor


def _kernel(
    kind: str,
    shape: tuple[int, ...] = IN_CACHE,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    activation: str = "none",
    fan_out: bool = False,
) -> Callable[[], object]:
    samples, channels, *_ = shape
    x = _tensor((samples if fan_out else TASKS * samples, *shape[1:]), dtype, memory_format)
    dy = _tensor((TASKS * samples, *shape[1:]), dtype, memory_format)
    weight, bias = torch.randn(TASKS, channels), torch.randn(TASKS, channels)
    options = Options(TASKS, EPS, "sigmoid", "task_major", activation, fan_out=fan_out)
    fused = operators(None)
    _, mean, var = fused.forward_training(x, weight, bias, None, options)
    saved, needs = Saved(x, weight, bias, None, mean, var), Needs(True, True, True, False)
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: fused.forward_training(x, weight, bias, None, options),
        "eval": lambda: fused.forward_eval(saved, options),
        "backward": lambda: fused.backward(dy, saved, True, needs, options),
    }
    return calls[kind]


def _mixed_kernel(kind: str, shape: tuple[int, ...]) -> Callable[[], object]:
    """The kernels of a mixed batch on the equal tasks of :func:`_kernel`, one after the other."""
    samples, channels, *_ = shape
    x, dy = (_tensor((TASKS * samples, *shape[1:]), torch.float32, torch.contiguous_format) for _ in range(2))
    index = torch.arange(TASKS).repeat_interleave(samples)
    weight, bias = torch.randn(TASKS, channels), torch.randn(TASKS, channels)
    options = Options(TASKS, EPS, "sigmoid", "task_major", "none")
    fused = mixed_ops.operators(None)
    _, mean, var = fused.mixed_forward_training(x, index, weight, bias, None, options)
    saved, needs = Saved(x, weight, bias, None, mean, var), Needs(True, True, True, False)
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: fused.mixed_forward_training(x, index, weight, bias, None, options),
        "backward": lambda: fused.mixed_backward(dy, saved, index, True, needs, options),
    }
    return calls[kind]


def _row_kernel(
    kind: str, dtype: torch.dtype = torch.float32, rms: bool = False, added: bool = False
) -> Callable[[], object]:
    samples, tokens, features = TOKENS
    shape = TASKS * samples, tokens, features
    x, residual, dy = (_tensor(shape, dtype, torch.contiguous_format) for _ in range(3))
    weight = torch.randn(TASKS, features)
    options = LayerOptions(TASKS, EPS, "sigmoid", "task_major", rms)
    fused = layer_ops.operators(None)
    more = residual if added else None
    _, s, mean, rstd = fused.layer_norm(x, weight, None, more, options)
    saved, needs = LayerSaved(x if s is None else s, weight, mean, rstd), LayerNeeds(True, True, False)
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: fused.layer_norm(x, weight, None, more, options),
        "backward": lambda: fused.layer_norm_backward(dy, more, saved, needs, options),
    }
    return calls[kind]


FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "fp32 ReLU": {"activation": "relu"},
    "fp32 fan-out": {"fan_out": True},
}
ROW_VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "fp32 RMS": {"rms": True},
    "fp32 addition": {"added": True},
}


def _kernels() -> Iterator[HotPath]:
    for layout, memory_format in FORMATS.items():
        in_format = partial(_kernel, memory_format=memory_format)
        for variant, settings in VARIANTS.items():
            for kind in ("forward", "backward"):
                yield HotPath(f"{layout} {variant} {kind}", partial(in_format, kind, **settings))
        yield HotPath(f"{layout} fp32 eval", partial(in_format, "eval"))
    for kind in ("forward", "backward"):
        yield HotPath(f"1d fp32 {kind}", partial(_kernel, kind, FLAT))
        yield HotPath(f"mixed NCHW fp32 {kind}", partial(_mixed_kernel, kind, IN_CACHE))
        yield HotPath(f"mixed 1d fp32 {kind}", partial(_mixed_kernel, kind, FLAT))
        for variant, settings in ROW_VARIANTS.items():
            yield HotPath(f"layer norm {variant} {kind}", partial(_row_kernel, kind, **settings))


# ---- the host's share of a call --------------------------------------------------------------------------------------


def _input(sizes: tuple[int, ...] = TINY) -> Tensor:
    samples, *rest = sizes
    return torch.randn(TASKS * samples, *rest, requires_grad=True)


def _batch_norm(training: bool = True) -> FusedTSigmaBN2d:
    return FusedTSigmaBN2d(TASKS, TINY[1]).train(training)


def _layer_norm(kind: type[TaskRowNorm] = FusedTSigmaLN) -> TaskRowNorm:
    return kind(TASKS, TINY_TOKENS[-1])


def _module(make: Callable[[], nn.Module], sizes: tuple[int, ...] = TINY, **how: Any) -> Callable[[], object]:
    x, layer = _input(sizes), make()
    return lambda: layer(x, **how)


def _added() -> Callable[[], object]:
    x, layer = _input(TINY_TOKENS), _layer_norm()
    return lambda: layer.add(x, x)


def _functional() -> Callable[[], object]:
    x, layer = _input(), _batch_norm()
    return lambda: task_batch_norm(
        x, layer.weight, layer.bias, layer.running_mean, layer.running_var, num_tasks=TASKS, momentum=0.1
    )


def _backward(
    make: Callable[[], nn.Module] = _batch_norm, sizes: tuple[int, ...] = TINY, **how: Any
) -> Callable[[], object]:
    x, layer = _input(sizes), make()
    y, leaves = layer(x, **how), [x, *layer.parameters()]
    dy = torch.randn_like(y)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def _model() -> Callable[[], object]:
    """A step of a model that routes its streams."""
    samples, channels, height, width = TINY
    layers = [module for _ in range(2) for module in (nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))]
    heads = {str(task): nn.Linear(channels * height * width, 1) for task in range(TASKS)}
    model = MultiTaskModel(convert_model(nn.Sequential(*layers, nn.Flatten()), TASKS, pretrained=False), heads)
    x, dys = torch.randn(TINY), [torch.randn(samples, 1) for _ in range(TASKS)]
    leaves = list(model.parameters())
    return lambda: torch.autograd.grad([*model(x).values()], leaves, dys)


def _host() -> Iterator[HotPath]:
    yield HotPath("host: module, training", partial(_module, _batch_norm))
    yield HotPath("host: module, evaluation", partial(_module, partial(_batch_norm, False)))
    index = torch.arange(TASKS).repeat_interleave(TINY[0])
    yield HotPath("host: mixed batch, training", partial(_module, _batch_norm, task_of_sample=index))
    yield HotPath("host: mixed batch, backward", partial(_backward, task_of_sample=index))
    yield HotPath("host: functional", _functional)
    yield HotPath("host: operator", partial(_kernel, "forward", TINY))
    yield HotPath("host: backward", _backward)
    yield HotPath("host: layer norm", partial(_module, _layer_norm, TINY_TOKENS))
    yield HotPath("host: layer norm, addition", _added)
    yield HotPath("host: layer norm, backward", partial(_backward, _layer_norm, TINY_TOKENS))
    yield HotPath("host: RMS norm", partial(_module, partial(_layer_norm, FusedTSigmaRMSNorm), TINY_TOKENS))
    yield HotPath("host: model, step", _model)
    if triton.available:  # what precedes a launch on a GPU: the call of a backend whose kernels do not run
        yield HotPath("host: Triton forward, launch stubbed", partial(_module, _batch_norm), stubbed_launches)
        yield HotPath("host: Triton backward, launch stubbed", _backward, stubbed_launches)


PATHS = (*_kernels(), *_host())
