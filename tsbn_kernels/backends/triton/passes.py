"""The launches of a forward and of a backward pass over tensors of one shape, and their arguments."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from tsbn_kernels import layout
from tsbn_kernels.backends.triton.launch import Launch
from tsbn_kernels.backends.triton.tiles import Tile, View
from tsbn_kernels.plan import Plan, Work
from tsbn_kernels.plan import triton as rules
from tsbn_kernels.reference import accumulate_dtype

Strides = tuple[int, int, int, int]


def view_strides(shape: torch.Size, strides: tuple[int, ...], num_tasks: int, stacking: str) -> Strides:
    """Strides of the ``[T, N, C, S]`` view of a tensor that a kernel family reads."""
    axis = layout.channel_axis(stacking)
    positions = [d for d, size in zip(strides[axis + 1 :], shape[axis + 1 :], strict=True) if size != 1]
    position = min(positions, default=1)
    if stacking == "task_axis":
        return strides[0], strides[1], strides[2], position
    if stacking == "task_major":
        return shape[0] // num_tasks * strides[0], strides[0], strides[1], position
    return strides[0], num_tasks * strides[0], strides[1], position


def work_of(x: Tensor, num_tasks: int, stacking: str, **details: Any) -> Work:
    """The work that a pass over ``x`` is."""
    axis = layout.channel_axis(stacking)
    positions = x.shape[axis + 1 :].numel()
    samples = x.numel() // (num_tasks * x.shape[axis] * positions)
    shared = num_tasks > 1 and view_strides(x.shape, x.stride(), num_tasks, stacking)[0] == 0
    family = layout.family(x, stacking) or "rows"
    sizes = num_tasks, samples, x.shape[axis], positions, x.element_size()
    return Work(*sizes, family, shared_input=shared, **details)


class Pass:
    """A plan with the launches that carry it out."""

    def __init__(self, plan: Plan, dtype: torch.dtype, output: tuple[int, ...]) -> None:
        work = plan.work
        self.plan = plan
        self.output_strides = output
        self.sizes = work.tasks, work.samples, work.channels, work.positions
        self.split = plan.splits, plan.share
        self.accumulate = accumulate_dtype(dtype)
        self.tile = Tile(*map(tl.constexpr, self._tile()))
        if plan.programs >= 1 << 31:
            raise ValueError(f"{plan.programs} programs are too many for one launch; the most are 2^31 - 1")

    def output(self, x: Tensor) -> Tensor:
        """Fresh memory for y or dx."""
        return torch.empty_strided(x.shape, self.output_strides, dtype=x.dtype, device=x.device)

    def _tile(self) -> tuple[Any, ...]:
        plan, work = self.plan, self.plan.work
        index = tl.int64 if work.values >= 1 << 31 else tl.int32
        accumulate = tl.float64 if self.accumulate == torch.float64 else tl.float32
        even = rules.is_even(work, plan.tile)
        return work.family == "columns", *plan.tile, even, work.shared_input, index, accumulate

    def views(self, *views: Strides) -> tuple[Strides, ...]:
        """The strides as the kernels take them.

        Where the positions of all columns follow one another from sample to sample they are read as samples of one
        position: no kernel divides by the number of positions, and ``[N, C]`` takes the same kernels.
        """
        tasks, samples, channels, positions = self.sizes
        joined = all(samples == 1 or n == positions * s for _, n, _, s in views)
        if self.plan.work.family == "rows" or positions == 1 or not joined:
            return views
        self.sizes = tasks, samples * positions, channels, 1
        return tuple((t, s, c, 1) for t, _, c, s in views)

    def launch(self, kernel: str, *constants: Any) -> Launch:
        """A launch of one of the kernels of this pass."""
        plan = self.plan
        options = {"num_warps": plan.warps} | ({"maxnreg": plan.registers} if rules.limits_registers(plan) else {})
        return Launch(kernel, plan.programs, options, self.tile, *map(tl.constexpr, constants))

    def partials(self, rows: int, like: Tensor) -> Tensor:
        """What the splits leave for the second launch."""
        tasks, _, channels, _ = self.sizes
        return like.new_empty((rows, self.plan.splits, tasks, channels), dtype=self.accumulate)


class Forward(Pass):
    """Statistics and y, or y by given statistics."""

    def __init__(self, plan: Plan, x: Tensor, num_tasks: int, stacking: str, eps: float, gate: str) -> None:
        super().__init__(plan, x.dtype, layout.dense_strides(x, stacking))
        strides = x.stride(), self.output_strides
        self.x, self.y = self.views(*(view_strides(x.shape, s, num_tasks, stacking) for s in strides))
        sigmoid = gate == "sigmoid"
        if plan.variant in ("resident", "streaming"):
            self.slab = self.launch("forward_slab", plan.variant == "resident", eps, sigmoid)
        else:
            self.first = self.launch("forward_partial")
            self.apply = self.launch("forward_apply", eps, sigmoid)

    def __call__(self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor, var: Tensor) -> None:
        """Writes y, and mean and var where the plan reduces; reads them where it does not."""
        source, result = View(x, *self.x), View(y, *self.y)
        vectors = weight, bias, mean, var
        if self.plan.variant in ("resident", "streaming"):
            self.slab(source, result, *vectors, *self.sizes)
            return
        partials = None
        if self.plan.variant == "split":
            partials = self.partials(4, weight)
            self.first(source, partials, *self.sizes, *self.split)
        self.apply(source, result, *vectors, partials, *self.sizes, *self.split)


class Backward(Pass):
    """Gradients of x, weight and bias, those that are asked for."""

    def __init__(self, plan: Plan, dy: Tensor, x: Tensor, num_tasks: int, stacking: str, eps: float, gate: str) -> None:
        super().__init__(plan, x.dtype, layout.dense_strides(x, stacking))
        strides = dy.stride(), x.stride(), self.output_strides
        self.dy, self.x, self.dx = self.views(*(view_strides(x.shape, s, num_tasks, stacking) for s in strides))
        training, sigmoid = plan.work.training, gate == "sigmoid"
        if plan.variant in ("resident", "streaming"):
            self.slab = self.launch("backward_slab", plan.variant == "resident", training, eps, sigmoid)
        else:
            self.first = self.launch("backward_partial", training, eps, sigmoid)
            self.apply = self.launch("backward_apply", training, eps, sigmoid)

    def __call__(
        self, dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, dx: Tensor | None,
        dweight: Tensor | None, dbias: Tensor | None,
    ) -> None:  # fmt: skip
        """Writes the gradients that are given."""
        gradient, source = View(dy, *self.dy), View(x, *self.x)
        result = None if dx is None else View(dx, *self.dx)
        vectors, parameters = (weight, mean, var), (dweight, dbias)
        if self.plan.variant in ("resident", "streaming"):
            self.slab(gradient, source, result, *vectors, *parameters, *self.sizes)
            return
        partials = None
        if self.plan.variant == "split":
            partials = self.partials(2, weight)
            on_the_way = None if self.plan.work.training else result
            self.first(gradient, source, on_the_way, *vectors, partials, *self.sizes, *self.split)
            result = result if self.plan.work.training else None
        self.apply(gradient, source, result, *vectors, *parameters, partials, *self.sizes, *self.split)
