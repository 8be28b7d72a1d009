"""The kinds of work that a backend's rules tell apart on a device, and the smallest call of each. Launches nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from support.epilogues import Call, make_call

from tsbn_kernels.backends import cuda
from tsbn_kernels.backends.plan import Device, Work
from tsbn_kernels.backends.plan import cuda as cuda_rules
from tsbn_kernels.backends.plan import triton as triton_rules
from tsbn_kernels.backends.plan.slots import pass_of
from tsbn_kernels.definition.layout import Family

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
TASKS, SAMPLES, CHANNELS = (1, 4, 40), (2, 16), (3, 64, 512)
POSITIONS: dict[int, tuple[int, ...]] = {
    1: (),
    49: (7, 7),
    64: (8, 8),
    1023: (31, 33),
    4096: (64, 64),
    65536: (256, 256),
}
MOST_ELEMENTS = 2**25


@dataclass(frozen=True)
class Spec:
    """A call by its options; ``residual`` goes with the activation ``"silu"``, which has no kinks."""

    tasks: int
    samples: int
    channels: int
    positions: int
    dtype: torch.dtype
    columns: bool
    fan_out: bool
    activation: str
    residual: bool
    training: bool
    sums: bool = True  # gradients of weight and bias are asked for

    @property
    def name(self) -> str:
        """How the call is named for people."""
        options = {"fan-out": self.fan_out, self.activation: self.activation != "none", "residual": self.residual}
        words = [word for word, said in options.items() if said]
        words.append("training" if self.training else "evaluation")
        if not self.sums:
            words.append("dx alone")
        order = "channels_last" if self.columns else "contiguous"
        size = f"{self.tasks} tasks {self.samples}x{self.channels}x{self.positions}"
        return ", ".join([size, str(self.dtype).removeprefix("torch."), order, *words])

    @property
    def elements(self) -> int:
        """How many elements y has."""
        return self.tasks * self.samples * self.channels * self.positions

    def call(self) -> Call:
        """Makes the call, with random values, on the CPU."""
        sizes = self.tasks, self.samples, self.channels, POSITIONS[self.positions]
        memory_format = "channels_last" if self.columns else "contiguous"
        epilogue: dict[str, Any] = {"activation": self.activation, "residual": self.residual}
        kind: dict[str, Any] = {"shared": self.fan_out, "training": self.training}
        return make_call(*sizes, dtype=self.dtype, memory_format=memory_format, **epilogue, **kind)

    def works(self) -> tuple[Work, Work]:
        """What its forward and its backward pass have to do."""
        family: Family = "columns" if self.columns or self.positions == 1 else "rows"
        own: dict[str, Any] = {"fan_out": self.fan_out, "parameter_size": 8 if self.dtype == torch.float64 else 4}
        own |= {"family": family, "training": self.training, "activation": self.activation, "residual": self.residual}
        sizes = self.tasks, self.samples, self.channels, self.positions, self.dtype.itemsize
        forward = Work(*sizes, bias=True, **own)
        needs: dict[str, Any] = {"needs_dweight": self.sums, "needs_dbias": self.sums}
        backward = replace(forward, direction="backward", **needs, needs_dresidual=self.residual)
        return forward, backward


def small(**options: Any) -> Spec:
    """A call of rows that is over at once, to be changed by options."""
    usual: dict[str, Any] = {"dtype": torch.float32, "columns": False, "fan_out": False, "activation": "none"}
    return Spec(4, 2, 3, 49, **usual | {"residual": False, "training": True} | options)


def specs() -> Iterator[Spec]:
    """All that are tried, the small ones first."""
    sizes = [
        size for size in itertools.product(TASKS, SAMPLES, CHANNELS, POSITIONS) if math.prod(size) <= MOST_ELEMENTS
    ]
    flags = (False, True)
    ends = (("none", False), ("silu", False), ("silu", True))
    modes = ((True, True), (False, True), (False, False))  # training, sums
    for size in sorted(sizes, key=math.prod):
        for dtype, columns, fan_out, end, mode in itertools.product(DTYPES, flags, flags, ends, modes):
            if not (columns and size[3] == 1):
                yield Spec(*size, dtype, columns, fan_out, *end, *mode)


def triton_kind(work: Work, variant: str) -> str:
    """Such as ``"rows forward split"``, the terms by which the Triton passes choose their kernels."""
    return f"{work.family} {work.direction} {variant}" + ", fan-out" * work.fan_out


def cuda_kind(plan: cuda_rules.CudaPlan) -> str:
    """Such as ``"columns backward_epilogue cluster"``: access, pass and variant of a CUDA C++ kernel."""
    return f"{plan.cut.access} {pass_of(plan.work)} {plan.variant}"


def triton_kinds(spec: Spec, device: Device) -> set[str]:
    """The kinds of both passes of a call."""
    return {triton_kind(work, triton_rules.plan(work, device).variant) for work in spec.works()}


def cuda_kinds(spec: Spec, device: Device, clusters: cuda_rules.Clusters = cuda_rules.clusters_on_paper) -> set[str]:
    """The kinds of both passes of a call, where so many clusters run at a time."""
    return {cuda_kind(cuda_rules.plan(work, device, clusters)) for work in spec.works()}


def layout_kinds(spec: Spec) -> set[str]:
    """The kinds of backends without plans: families and passes."""
    more = ", fan-out" * spec.fan_out + f", {spec.activation}" * (spec.activation != "none")
    return {f"{work.family} {work.direction}{more}" for work in spec.works()}


def smallest(kinds: Callable[[Spec], set[str]]) -> dict[Spec, set[str]]:
    """The calls that are the first of some kind, and the kinds that they are the first of."""
    seen: set[str] = set()
    found = {}
    for spec in specs():
        if new := kinds(spec) - seen:
            found[spec] = new
            seen |= new
    return found


def planned(backend: str, device: str) -> dict[Spec, set[str]]:
    """The calls that reach every kind of a backend's launches on a device that is here, and the kinds of each."""
    where = torch.empty(0, device=device).device  # with an index, as tensors have it
    if backend == "triton":
        from tsbn_kernels.backends.triton import ops

        return smallest(partial(triton_kinds, device=ops.device_of(where)))
    if backend == "cuda":
        return smallest(
            lambda spec: cuda_kinds(spec, cuda.launches.device_of(where), cuda.batch_norm.clusters(spec.dtype, where))
        )
    return smallest(layout_kinds)
