"""The first layer of the shared backbone: one input fanned out, against expanding it first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.layers.cases import DTYPES, MEMORY_FORMATS
from benchmarks.layers.verify import MismatchError
from benchmarks.records.summary import Summary
from benchmarks.records.workloads import CELEBA40
from benchmarks.timing.measure import Effort, copy_candidate, measure, summarize, timer_for, training_candidate
from tsbn_kernels import FusedTSigmaBN2d

FIRST = CELEBA40[0]
WAYS = ("fan-out", "expand")
COPY = "copy"
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-6}  # of the largest value: two ways round differently


@dataclass(frozen=True)
class FanOutTimes:
    """What one dtype and memory format gave: seconds of forward and of forward+backward, and bytes kept between."""

    dtype: str
    memory_format: str
    passes: dict[str, list[Summary]]
    saved_bytes: dict[str, int]
    stream_bytes: int  # of all tasks' outputs

    def speedup(self, pass_: int) -> float:
        """How many times as fast fanning out is as expanding."""
        return self.passes["expand"][pass_].median / self.passes["fan-out"][pass_].median

    def copies(self, way: str, pass_: int) -> float:
        """Time in copies of all tasks' outputs."""
        return self.passes[way][pass_].median / self.passes[COPY][0].median


def fan_out_times(
    tasks: int, batch: int, dtype: str, memory_format: str, device: torch.device, effort: Effort
) -> FanOutTimes:
    """Compares the two ways, then times them in turns.

    Raises:
        MismatchError: their outputs or gradients differ by more than rounding.
    """
    generator = torch.Generator(device).manual_seed(0)

    def random(samples: int) -> Tensor:
        shape = FIRST.shape(1, samples)
        tensor = torch.randn(shape, generator=generator, dtype=DTYPES[dtype], device=device)
        return tensor.contiguous(memory_format=MEMORY_FORMATS[memory_format])

    x, dy = random(batch).requires_grad_(), random(tasks * batch)
    layer = FusedTSigmaBN2d(tasks, FIRST.channels, activation="relu", device=device)
    torch.nn.init.normal_(layer.weight, generator=generator)

    def expand() -> Tensor:
        return layer(x.expand(tasks, *x.shape)).flatten(0, 1)  # type: ignore[no-any-return]

    forwards: dict[str, Callable[[], Tensor]] = {"fan-out": lambda: layer(x, fan_out=True), "expand": expand}

    def backward(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, (x, layer.weight), dy)

    _compare(forwards, backward, dtype)
    saved = {way: _saved_bytes(forward) for way, forward in forwards.items()}
    candidates = {way: training_candidate(forward, backward) for way, forward in forwards.items()}
    candidates[COPY] = copy_candidate(dy)
    passes = summarize(measure(candidates, effort, timer_for(device)))
    return FanOutTimes(dtype, memory_format, passes, saved, dy.nbytes)


def _compare(
    forwards: dict[str, Callable[[], Tensor]], backward: Callable[[Tensor], tuple[Tensor, ...]], dtype: str
) -> None:
    results = {way: (forward(),) for way, forward in forwards.items()}
    ours, theirs = ((y.detach(), *backward(y)) for (y,) in results.values())
    for name, got, want in zip(("y", "dx", "dgamma"), ours, theirs, strict=True):
        # dx is a sum over the tasks, rounded once here and T times there.
        error = float((got.float() - want.float()).abs().max() / want.float().abs().max())
        if not error <= TOLERANCE[dtype]:
            raise MismatchError(f"fan-out is wrong: {name} in {dtype} differs by {error:.1e} of its largest value")


def _saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes that are kept for the backward pass: each memory once, expanded or not as it was given."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(kept.values())
