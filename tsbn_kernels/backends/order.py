"""The order in which kernels walk the samples of a mixed batch.

It comes of sorts and sums on the device, without a look at them, so a CUDA graph may hold it all. Samples of a task are
ordered by keys that their bits give: so no sum depends on where a sample lies in the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tsbn_kernels.definition import layout
from tsbn_kernels.definition.mixed_batch_norm import samples_of

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


class Order(NamedTuple):
    """Where the samples of each task are; int64, on the device. The last task of the four vectors has no sample."""

    order: Tensor  # [N] samples, those of a task one after the other
    task: Tensor  # [G] of each block, T of those that are too many
    samples: Tensor  # [T+1] how many a task has
    sample: Tensor  # [T+1] where they begin in the order
    blocks: Tensor  # [T+1] how many a task has
    block: Tensor  # [T+1] its first one


def words_of(activation: Tensor, columns: bool) -> Tensor:
    """The bits of an activation, as integers ``[N, outer, inner]``, as wide as they lie in memory; a view."""
    view = layout.task_view(activation, 1, "task_major")[0]
    view = view.transpose(1, 2) if columns else view
    if view[0].is_contiguous():
        view = view.flatten(1).unsqueeze(1)
    size = activation.element_size()
    steps = view.shape[2], view.stride(0), view.stride(1), view.data_ptr() // size
    wide = next(w for w in _WORDS if w == size or (w > size and not any(step * size % w for step in steps)))
    return view.view(_WORDS[wide])


def order_of(task_of_sample: Tensor, num_tasks: int, keys: Tensor | None, block: int, blocks: int) -> Order:
    """Which samples and blocks each task has; its samples in the order of their keys, if there are any.

    Args:
        block, blocks: samples of a block, and how many blocks there are for them, at most.
    """
    if keys is None:
        order = task_of_sample.argsort(stable=True)
    else:
        by_key = keys.argsort(stable=True)
        order = by_key[task_of_sample[by_key].argsort(stable=True)]
    samples = functional.pad(samples_of(task_of_sample, num_tasks), (0, 1))
    own = (samples + (block - 1)) // block
    sample, end = samples.cumsum(0) - samples, own.cumsum(0)
    programs = torch.arange(blocks, device=order.device)
    task = torch.searchsorted(end[:-1], programs, right=True)
    return Order(order, task, samples, sample, own, end - own)
