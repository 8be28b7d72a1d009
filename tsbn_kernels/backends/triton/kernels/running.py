"""Running statistics, updated by the program that has computed those of the batch."""

import triton
import triton.language as tl

from tsbn_kernels.backends.triton.kernels.tiles import VECTORS, Slab

TRACKED = [*VECTORS, "running_mean", "running_var", "batches", "rows"]  # of a kernel that updates them


@triton.jit
def track(running_mean, running_var, batches, momentum, rows, average, variance, slab, tile):
    """Moves those of a slab that are given towards the batch's; without a ``momentum`` it is the cumulative average."""
    own = own_row(rows, slab)
    share = momentum
    if batches is not None and momentum is None:
        share = 1.0 / (tl.load(batches + own.t) + 1).to(tile.ACC)
    if running_mean is not None:
        move(running_mean, average, share, own)
    if running_var is not None:
        values = tl.cast(slab.N, tile.ACC) * slab.S
        move(running_var, variance * (values / (values - 1.0)), share, own)


@triton.jit
def count_batch(batches, momentum, rows, slab):
    """Counts the batch, by the program of a task's first channel; not where all programs read the count."""
    if batches is not None and momentum is not None:
        place, first = batches + own_row(rows, slab).t + 0 * slab.channel, slab.channel == 0
        tl.store(place, tl.load(place, mask=first, other=0) + 1, mask=first)


@triton.jit
def own_row(rows, slab):
    """The slab in the row of its task."""
    row = slab.t if rows is None else tl.load(rows + slab.t)
    return Slab(row, slab.channel, slab.T, slab.N, slab.C, slab.S)


@triton.jit
def move(data, batch, share, slab):
    """``data = (1 - share) * data + share * batch``, from the nearer end: a share of 0 or 1 rounds nothing."""
    index = data + (slab.t.to(tl.int64) * slab.C + slab.channel)
    before = tl.load(index, mask=slab.channel < slab.C, other=0.0)
    change = batch - before
    after = tl.where(share < 0.5, before + share * change, batch - (1.0 - share) * change)
    tl.store(index, after.to(data.dtype.element_ty), mask=slab.channel < slab.C)
