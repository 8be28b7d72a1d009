"""The launches of the passes over a mixed batch."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from tsbn_kernels.backends.order import order_of, words_of
from tsbn_kernels.backends.plan.mixed import KEYED, MERGED, MixedPlan
from tsbn_kernels.backends.plan.triton import ceil
from tsbn_kernels.backends.triton.kernels.mixed import Mix
from tsbn_kernels.backends.triton.kernels.tiles import View
from tsbn_kernels.backends.triton.launch import Launch
from tsbn_kernels.backends.triton.passes import tile_of, view_strides
from tsbn_kernels.definition import layout
from tsbn_kernels.definition.batch_norm import accumulate_dtype
from tsbn_kernels.definition.options import NOT_TRACKED, Gradients, Options, Running, Saved


class MixedPass:
    """A plan with the launches that carry it out, for tensors like x."""

    def __init__(self, plan: MixedPlan, x: Tensor, options: Options) -> None:
        work = plan.work
        self.plan, self.options = plan, options
        self.own = options._replace(num_tasks=1, stacking="task_major")
        self.columns = work.family == "columns"
        self.accumulate = accumulate_dtype(x.dtype)
        self.like = tuple(x.shape), layout.dense_strides(x, "task_major")
        self.formula = options.eps, options.gate == "sigmoid"
        self.sizes = work.channels, work.positions

        a, b = map(tl.constexpr, plan.keyed)
        kind = {"COLUMNS": tl.constexpr(False), "ACC": tl.constexpr(tl.int64), "HELD": tl.constexpr(1)}
        words = tile_of(plan)._replace(A=a, B=b, **kind)
        programs, (_, warps) = ceil(work.samples, plan.keyed[0]), KEYED
        self._keys = tuple(Launch("mixed_keys", programs, {"num_warps": warps}, words) for _ in range(3))
        self.tile, self.plain = tile_of(plan, work.activation, options.slope), tile_of(plan)

    def empty(self, x: Tensor) -> Tensor:
        """Fresh memory for what is like x."""
        return x.new_empty_strided(*self.like)

    def view(self, tensor: Tensor | None) -> View | None:
        """The view of an activation, if there is one: to the tasks it is one batch."""
        if tensor is None:
            return None
        _, *strides = view_strides(self.like[0], tensor.stride(), self.own)
        return View(tensor, 0, *strides)

    def launch(self, kernel: str, tile: Any, *constants: Any) -> Launch:
        """A launch of one program for each block and channel, or block of channels."""
        plan = self.plan
        options = {"num_warps": plan.warps} | ({"maxnreg": plan.registers} if plan.limits_registers else {})
        return Launch(kernel, plan.slabs, options, tile, *map(tl.constexpr, (plan.block, *constants)))

    def merge(self, kernel: str, *constants: Any) -> Launch:
        """A launch of one program for each task and block of channels."""
        channels, warps = MERGED
        work = self.plan.work
        one = tl.constexpr(1)
        tile = self.plain._replace(COLUMNS=tl.constexpr(True), A=one, B=tl.constexpr(channels), HELD=one)
        programs = work.tasks * ceil(work.channels, channels)
        return Launch(kernel, programs, {"num_warps": warps}, tile, *map(tl.constexpr, constants))

    def mix(self, task_of_sample: Tensor, *contents: Tensor | None) -> Mix:
        """The order of the samples; of those of a task by what is summed of them."""
        keys = None
        for launch, tensor in zip(self._keys, contents, strict=False):
            if tensor is not None:
                words, before = words_of(tensor, self.columns), keys
                keys = torch.empty(len(words), dtype=torch.int64, device=words.device)
                launch(View(words, 0, words.stride(0), words.stride(1), 1), before, keys, *words.shape)
        return Mix(*order_of(task_of_sample, self.options.num_tasks, keys, self.plan.block, self.plan.blocks))

    def parts(self, sums: int, like: Tensor) -> Tensor:
        """What blocks leave for the launch that adds it."""
        return like.new_empty((sums * self.plan.blocks, self.sizes[0]), dtype=self.accumulate)


class MixedForward(MixedPass):
    """Statistics and y, or y by given statistics."""

    def __init__(self, plan: MixedPlan, x: Tensor, options: Options) -> None:
        super().__init__(plan, x, options)
        self.first = self.launch("mixed_partial", self.plain)
        self.statistics = self.merge("mixed_statistics")
        self.apply = self.launch("mixed_forward", self.tile, *self.formula)

    def __call__(self, saved: Saved, task_of_sample: Tensor, y: Tensor, running: Running = NOT_TRACKED) -> None:
        """Writes y, and mean, var and the running statistics where the plan reduces; else reads mean and var."""
        x, weight, bias, residual, mean, var = saved
        source, rest = self.view(x), None
        mix = self.mix(task_of_sample, x if self.plan.work.reduces else None)
        if self.plan.work.reduces:
            partials, rest = self.parts(4, x), torch.empty_like(mean)
            self.first(source, partials, mix, *self.sizes)
            self.statistics(partials, mean, rest, var, *running, mix, self.options.num_tasks, *self.sizes)
        self.apply(source, self.view(residual), self.view(y), weight, bias, mean, rest, var, mix, *self.sizes)


class MixedBackward(MixedPass):
    """Gradients of x, weight, bias and residual, those that are asked for."""

    def __init__(self, plan: MixedPlan, x: Tensor, options: Options) -> None:
        super().__init__(plan, x, options)
        self.walk = self.launch("mixed_backward", self.tile, *self.formula)
        self.last = self.launch("mixed_gradient", self.tile, *self.formula)
        self.sums = self.merge("mixed_sums", *self.formula)

    def __call__(self, dy: Tensor, saved: Saved, task_of_sample: Tensor, found: Gradients) -> None:
        """Writes the gradients that are given."""
        x, weight, bias, residual, mean, var = saved
        dx, dweight, dbias, dresidual = found
        work = self.plan.work
        mix = self.mix(task_of_sample, *((x, dy, residual) if work.reduces else ()))
        operands, results = tuple(map(self.view, (dy, x, residual))), tuple(map(self.view, (dx, dresidual)))
        vectors = weight, bias, mean, var
        partials = self.parts(2, x) if work.reduces else None
        now = (None, None) if work.two_passes else results
        self.walk(*operands, *now, *vectors, partials, mix, *self.sizes)
        if partials is None:
            return
        slopes, offsets = (torch.empty_like(mean) if work.two_passes else None for _ in range(2))
        counts = self.options.num_tasks, *self.sizes
        self.sums(weight, var, dweight, dbias, slopes, offsets, partials, mix, *counts)
        if work.two_passes:
            self.last(*operands, *results, *vectors, slopes, offsets, mix, *self.sizes)
