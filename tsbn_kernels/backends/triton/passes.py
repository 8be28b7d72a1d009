"""The launches of a forward and of a backward pass over tensors of one shape, and their arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from tsbn_kernels.backends.plan import Plan
from tsbn_kernels.backends.plan import triton as rules
from tsbn_kernels.backends.triton.kernels import activations
from tsbn_kernels.backends.triton.kernels.tiles import Tile, View
from tsbn_kernels.backends.triton.launch import Launch
from tsbn_kernels.definition import layout
from tsbn_kernels.definition.activations import EPILOGUES, NONE
from tsbn_kernels.definition.batch_norm import accumulate_dtype
from tsbn_kernels.definition.layout import Family
from tsbn_kernels.definition.options import NOT_TRACKED, Gradients, Options, Running, Saved, of_input

Strides = tuple[int, int, int, int]

# The kernels that no epilogue ends: compiled once for all activations.
WITHOUT_EPILOGUE = ("forward_partial", "fan_out_sums", "fan_out_gradient")

ONE_LAUNCH = ("resident", "cluster", "streaming")  # of a slab: the variants in which nothing is left for a second

WORD = 8  # bytes: where runs are aligned less, each few values have an address, and steps between samples are constants


def view_strides(shape: Sequence[int], strides: tuple[int, ...], options: Options) -> Strides:
    """Strides of the ``[T, N, C, S]`` view of a tensor that a kernel family reads."""
    num_tasks, stacking = options.num_tasks, options.stacking
    axis = layout.channel_axis(stacking)
    positions = [d for d, size in zip(strides[axis + 1 :], shape[axis + 1 :], strict=True) if size != 1]
    position = min(positions, default=1)
    if stacking == "task_axis":
        return strides[0], strides[1], strides[2], position
    if stacking == "task_major":
        return shape[0] // num_tasks * strides[0], strides[0], strides[1], position
    return strides[0], num_tasks * strides[0], strides[1], position


def view_of(tensor: Tensor | None, strides: Strides) -> View | None:
    """The view of a tensor, if there is one."""
    return None if tensor is None else View(tensor, *strides)


def reach_of(family: Family, sizes: Strides, views: Sequence[Strides]) -> tuple[Any, int]:
    """The type of offsets within a slab, and how runs along the contiguous axis are aligned, in all such views.

    They begin and end at multiples of the widest power of two, up to 16, that divides the steps between them. In
    columns offsets of 32 bits save nothing, and take registers.
    """
    contiguous, between = (2, (0, 1, 3)) if family == "columns" else (3, (0, 1, 2))
    near = family == "rows" and all(n * (sizes[1] - 1) + sizes[3] <= 1 << 32 for _, n, _, _ in views)
    steps = [view[d] for view in views for d in between if sizes[d] > 1]
    return tl.uint32 if near else tl.int64, math.gcd(16, sizes[contiguous], *steps)


def tile_of(plan: Plan, activation: str = NONE, slope: float = 0.0) -> Tile:
    """The tile that the kernels of a plan are compiled for, wherever values lie."""
    work = plan.work
    index = tl.int64 if work.values >= 1 << 31 else tl.int32
    accumulate = tl.float64 if work.statistics_size == 8 else tl.float32
    a, b = plan.tile
    held = max(1, a * b // (plan.threads * plan.cluster))
    full = rules.is_full(work, plan.tile)
    kind = work.family == "columns", a, b, *full, all(full), work.expanded, index, tl.int64, 1, held
    end = accumulate, activation, EPILOGUES[activation].exponential, slope
    fields: list[Any] = [*map(tl.constexpr, (*kind, *end)), *activations.TABLE[activation]]
    return Tile(*fields)


class Pass:
    """A plan with the launches that carry it out, for tensors like x and those that are ``stacked`` like y.

    Attributes:
        views: strides as the kernels take them: of x, of fresh memory like it, of the tensors that are ``stacked`` (of
            fresh memory in the place of None), and of fresh memory like those.
        sizes: of all these views.
    """

    def __init__(self, plan: Plan, x: Tensor, options: Options, *stacked: Tensor | None) -> None:
        work = plan.work
        self.plan = plan
        self.options = options
        self.input = of_input(options)
        self.formula = options.eps, options.gate == "sigmoid"
        self.input_sizes = tuple(x.shape), layout.dense_strides(x, self.input.stacking)
        self.stacked_sizes = layout.output_sizes(x, options)
        self.split = plan.splits, plan.share
        self.accumulate = accumulate_dtype(x.dtype)
        self.sizes, self.views, reach = self._read(x, stacked)
        self.tile = tile_of(plan, work.activation, options.slope)._replace(**reach)

    def input_like(self, x: Tensor) -> Tensor:
        """Fresh memory for dx."""
        return x.new_empty_strided(*self.input_sizes)

    def stacked_like(self, x: Tensor) -> Tensor:
        """Fresh memory for y or dresidual."""
        return x.new_empty_strided(*self.stacked_sizes)

    def _read(
        self, x: Tensor, stacked: Sequence[Tensor | None]
    ) -> tuple[Strides, tuple[Strides, ...], dict[str, tl.constexpr]]:
        """The sizes and strides of all views, and what a tile knows of them.

        Where the positions of all columns follow one another from sample to sample they are read as samples of one
        position: no kernel divides by the number of positions, and ``[N, C]`` takes the same kernels.
        """
        work = self.plan.work
        tasks, samples, channels, positions = sizes = work.tasks, work.samples, work.channels, work.positions
        shape, dense = self.stacked_sizes
        all_strides = (dense if tensor is None else tensor.stride() for tensor in (*stacked, None))
        _, fresh = self.input_sizes
        views: tuple[Strides, ...] = (
            *(view_strides(x.shape, strides, self.input) for strides in (x.stride(), fresh)),
            *(view_strides(shape, strides, self.options) for strides in all_strides),
        )
        joined = all(samples == 1 or n == positions * s for _, n, _, s in views)
        if work.family == "columns" and positions > 1 and joined:
            sizes = tasks, samples * positions, channels, 1
            views = tuple((t, s, c, 1) for t, _, c, s in views)
        offset, run = reach_of(work.family, sizes, views)
        if work.gathers:
            offset = tl.int64  # beside a sum over tasks those of 32 bits take registers on AMD's GPUs
        if work.family == "rows" and run * work.item_size < WORD:
            offset, views = tl.int64, tuple((t, tl.constexpr(n), c, s) for t, n, c, s in views)
        return sizes, views, {"OFFSET": tl.constexpr(offset), "RUN": tl.constexpr(run)}

    def launch(self, kernel: str, *constants: Any, programs: int = 0) -> Launch:
        """A launch of one of the kernels of this pass, with as many programs as are planned where none are given."""
        plan = self.plan
        options = {"num_warps": plan.warps} | ({"maxnreg": plan.registers} if rules.limits_registers(plan) else {})
        options |= {"num_ctas": plan.cluster} if plan.cluster > 1 else {}
        tile = self.tile
        if kernel in WITHOUT_EPILOGUE:
            tile = tile_of(plan)._replace(OFFSET=tile.OFFSET, RUN=tile.RUN)
        programs = programs or plan.programs // plan.cluster
        return Launch(kernel, programs, options, tile, *map(tl.constexpr, constants))

    def partials(self, rows: int, streams: int, like: Tensor) -> Tensor:
        """What the splits leave for the second launch."""
        return like.new_empty((rows, self.plan.splits, streams, self.sizes[2]), dtype=self.accumulate)

    def workspace(self, dx: Tensor) -> Tensor:
        """Where the tasks' gradients of a shared x are added up: in dx itself if it has the dtype of the sums."""
        if dx.dtype == self.accumulate:
            return dx
        return torch.empty_strided(*self.input_sizes, dtype=self.accumulate, device=dx.device)


class Forward(Pass):
    """Statistics of x and every task's y, or y by given statistics."""

    def __init__(self, plan: Plan, x: Tensor, options: Options, residual: Tensor | None = None) -> None:
        super().__init__(plan, x, options, residual)
        self.x, _, self.residual, self.y = self.views
        if plan.variant in ("split", "elementwise"):
            self.first = self.launch("forward_partial")
            self.apply = self.launch("fan_out_apply" if options.fan_out else "forward_apply", *self.formula)
        elif options.fan_out:
            self.slab = self.launch("fan_out_slab", *self.formula)
        elif plan.variant == "cluster":
            self.slab = self.launch("forward_cluster", *self.formula)
        else:
            self.slab = self.launch("forward_slab", plan.variant == "resident", *self.formula)

    def __call__(self, saved: Saved, y: Tensor, running: Running = NOT_TRACKED) -> None:
        """Writes y, and mean, var and the running statistics where the plan reduces; else reads mean and var."""
        x, weight, bias, residual, mean, var = saved
        source = View(x, *self.x)
        tensors = source, view_of(residual, self.residual), View(y, *self.y), weight, bias, mean, var
        if self.plan.variant in ONE_LAUNCH:
            self.slab(*tensors, *running, *self.sizes)
            return
        partials = None
        if self.plan.variant == "split":
            streams, (_, *of_one) = self.plan.work.streams, self.sizes
            partials = self.partials(4, streams, weight)
            self.first(source, partials, streams, *of_one, *self.split)
        self.apply(*tensors, *running, partials, *self.sizes, *self.split)


class BackwardPass(Pass):
    """A pass that reads dy and what a forward pass saved, and writes dx and dresidual."""

    def __init__(self, plan: Plan, dy: Tensor, x: Tensor, options: Options, residual: Tensor | None = None) -> None:
        super().__init__(plan, x, options, dy, residual)
        self.x, self.dx, self.dy, self.residual, self.dresidual = self.views

    def activations(self, dy: Tensor, saved: Saved, dx: Tensor | None, dresidual: Tensor | None) -> tuple[Any, ...]:
        """The views of dy, x, residual, dx and dresidual, as the kernels take them."""
        given = View(dy, *self.dy), View(saved.x, *self.x), view_of(saved.residual, self.residual)
        return *given, view_of(dx, self.dx), view_of(dresidual, self.dresidual)


class Backward(BackwardPass):
    """Gradients of x, weight, bias and residual, those that are asked for."""

    def __init__(self, plan: Plan, dy: Tensor, x: Tensor, options: Options, residual: Tensor | None = None) -> None:
        super().__init__(plan, dy, x, options, residual)
        constants = plan.work.training, *self.formula
        self.done = plan.work.keeps_gradient and plan.variant in ("streaming", "split")
        if plan.variant == "cluster":
            self.slab = self.launch("backward_cluster", *self.formula)
        elif plan.variant in ONE_LAUNCH:
            self.slab = self.launch("backward_slab", plan.variant == "resident", self.done, *constants)
        else:
            self.first = self.launch("backward_partial", *constants)
            self.apply = self.launch("backward_apply", self.done, *constants)

    def __call__(self, dy: Tensor, saved: Saved, found: Gradients) -> None:
        """Writes the gradients that are given."""
        _, weight, bias, _, mean, var = saved
        dx, dweight, dbias, dresidual = found
        gradient, source, added, result, beside = self.activations(dy, saved, dx, dresidual)
        vectors, parameters = (weight, bias, mean, var), (dweight, dbias)
        if self.plan.variant in ONE_LAUNCH:
            self.slab(gradient, source, added, result, beside, *vectors, *parameters, *self.sizes)
            return
        partials = None
        if self.plan.variant == "split":
            partials = self.partials(2, self.sizes[0], weight)
            now = None if self.plan.work.training else result
            self.first(gradient, source, added, now, beside, *vectors, partials, *self.sizes, *self.split)
            if self.done and beside is not None:
                gradient, added = beside, None
            result, beside = None if now else result, None
        operands = gradient, source, added, result, beside
        self.apply(*operands, *vectors, *parameters, partials, *self.sizes, *self.split)


class FanOutBackward(BackwardPass):
    """Gradients of one input that all tasks share (the sum over them), weight, bias and residual."""

    def __init__(self, plan: Plan, dy: Tensor, x: Tensor, options: Options, residual: Tensor | None = None) -> None:
        super().__init__(plan, dy, x, options, residual)
        self.gather = self.launch("fan_out_gather", plan.work.reduces, plan.work.training, *self.formula)
        self.sums = self.launch("fan_out_sums", *self.formula, programs=plan.slabs * options.num_tasks)
        self.gradient = self.launch("fan_out_gradient")

    def __call__(self, dy: Tensor, saved: Saved, found: Gradients) -> None:
        """Writes the gradients that are given."""
        _, weight, bias, _, mean, var = saved
        dx, dweight, dbias, dresidual = found
        work, counts = self.plan.work, (*self.sizes, self.plan.splits)
        split = self.plan.variant == "split"
        incomplete = split and work.training and dx is not None
        gathered = self.workspace(dx) if dx is not None and incomplete else dx
        partials = self.partials(2, work.tasks, weight) if split else None
        now = (None, None, partials) if split else (dweight, dbias, None)
        activations = self.activations(dy, saved, gathered, dresidual)
        self.gather(*activations, weight, bias, mean, var, *now, *counts)
        if split:
            terms = weight.new_empty((2, *weight.shape), dtype=self.accumulate) if incomplete else None
            self.sums(weight, mean, var, dweight, dbias, partials, terms, *counts)
            if incomplete:
                _, source, _, sums, _ = activations
                self.gradient(source, sums, view_of(dx, self.dx), mean, terms, *counts)
