"""The launches of layer normalisation of mixed batches, and the order in which the backward pass walks the samples.

Samples of a task are ordered by keys: of the statistics of their rows, and of where x and dy begin.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from tsbn_kernels.backends.order import order_of, words_of
from tsbn_kernels.backends.plan.layer_norm import MERGED
from tsbn_kernels.backends.plan.mixed import KEYED
from tsbn_kernels.backends.plan.mixed_layer_norm import MixedLayerPlan
from tsbn_kernels.backends.plan.triton import ceil
from tsbn_kernels.backends.triton.kernels.mixed import Mix
from tsbn_kernels.backends.triton.kernels.tiles import View
from tsbn_kernels.backends.triton.launch import Launch
from tsbn_kernels.backends.triton.passes import tile_of
from tsbn_kernels.definition.options import LayerGradients, LayerNormalized, LayerOptions, LayerSaved


class MixedLayerPass:
    """A plan with the launches that carry it out."""

    def __init__(self, plan: MixedLayerPlan, options: LayerOptions) -> None:
        self.plan, self.num_tasks = plan, options.num_tasks
        self.sigmoid = options.gate == "sigmoid"

    def launch(self, kernel: str, *constants: Any) -> Launch:
        """A launch of as many programs as are planned."""
        plan = self.plan
        options = {"num_warps": plan.warps} | ({"maxnreg": plan.registers} if plan.limits_registers else {})
        constants = plan.work.channels, *constants, self.sigmoid
        return Launch(kernel, plan.programs, options, tile_of(plan), *map(tl.constexpr, constants))


class MixedLayerForward(MixedLayerPass):
    """y, the sum that is normalised where there is a residual, and the rows' statistics."""

    def __init__(self, plan: MixedLayerPlan, options: LayerOptions) -> None:
        super().__init__(plan, options)
        self.rows = self.launch("mixed_layer_norm_forward", options.eps)
        self.sizes = plan.work.samples, plan.work.positions, plan.splits, plan.share

    def __call__(
        self,
        x: Tensor,
        task_of_sample: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        found: LayerNormalized,
    ) -> None:
        """Writes what is given to be found."""
        vectors = task_of_sample, weight, bias, found.mean, found.rstd
        self.rows(x, residual, found.y, found.s, *vectors, *self.sizes)


class MixedLayerBackward(MixedLayerPass):
    """Gradients of x, weight and bias, those that are asked for."""

    def __init__(self, plan: MixedLayerPlan, options: LayerOptions) -> None:
        super().__init__(plan, options)
        work = plan.work
        self.accumulate = torch.float64 if work.statistics_size == 8 else torch.float32
        self.rows = self.launch("mixed_layer_norm_backward", plan.block)
        channels, warps = MERGED
        fields, (_, key_warps) = tile_of(plan), KEYED
        self.merge = Launch(
            "mixed_layer_norm_parameters",
            self.num_tasks * ceil(work.channels, channels),
            {"num_warps": warps},
            fields._replace(B=tl.constexpr(channels)),
            *map(tl.constexpr, (work.channels, self.sigmoid)),
        )
        a, b = map(tl.constexpr, plan.keys)
        words = fields._replace(COLUMNS=tl.constexpr(False), A=a, B=b, ACC=tl.constexpr(tl.int64))
        programs = ceil(work.samples, plan.keys[0])
        self.keys = [Launch("mixed_keys", programs, {"num_warps": key_warps}, words) for _ in range(3)]

    def __call__(
        self, dy: Tensor, ds: Tensor | None, saved: LayerSaved, task_of_sample: Tensor, found: LayerGradients
    ) -> None:
        """Writes the gradients that are given."""
        x, weight, mean, rstd = saved
        dx, dweight, dbias = found
        keys = self._keys(dy, x, rstd) if self.plan.merges else None
        mix = Mix(*order_of(task_of_sample, self.num_tasks, keys, self.plan.block, self.plan.blocks))
        left = self._partial(dweight), self._partial(dbias)
        pieces = self.plan.splits
        ds = None if dx is None else ds
        self.rows(dy, ds, x, dx, weight, mean, rstd, *left, mix, self.plan.work.positions, pieces)
        if self.plan.merges:
            self.merge(weight, dweight, dbias, *left, mix, self.num_tasks, pieces)

    def _keys(self, dy: Tensor, x: Tensor, rstd: Tensor) -> Tensor | None:
        begins = self.plan.key_bytes // x.element_size()
        keys = None
        rows = rstd.view(len(x), -1)
        for launch, values in zip(self.keys, (rows, *(t.view(len(x), -1)[:, :begins] for t in (x, dy))), strict=True):
            words, before = words_of(values, columns=True), keys
            keys = torch.empty(len(x), dtype=torch.int64, device=x.device)
            launch(View(words, 0, words.stride(0), words.stride(1), 1), before, keys, *words.shape)
        return keys

    def _partial(self, gradient: Tensor | None) -> Tensor | None:
        """Where the programs leave their sums."""
        if gradient is None:
            return None
        return gradient.new_empty((self.plan.programs, self.plan.work.channels), dtype=self.accumulate)
