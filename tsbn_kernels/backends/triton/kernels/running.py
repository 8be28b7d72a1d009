"""Running statistics, updated by the program that has computed those of the batch."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from tsbn_kernels.backends.triton.kernels.tiles import VECTORS, Slab

TRACKED = [*VECTORS, "running_mean", "running_var", "batches", "rows"]  # of a kernel that updates them


class Tracked(NamedTuple):
    """The running statistics of a slab as they were: where they are, whose they are, and the batch's share of them."""

    index: Any
    inside: Any
    share: Any
    mean: Any
    var: Any


@triton.jit
def tracked(running_mean, running_var, batches, momentum, rows, slab, tile):
    """Reads those of a slab that are given, and counts the batch.

    Without a ``momentum`` they are the cumulative average, and all programs of a task read the count.
    """
    own = own_row(rows, slab)
    share = 0.0 if momentum is None else momentum
    if batches is not None:
        if momentum is None:
            share = 1.0 / batches_with_this(batches, own, tile).to(tile.ACC)
        else:
            tl.atomic_add(batches + own.t + 0 * own.channel, 1, mask=own.channel == 0, sem="relaxed")
    index, inside = own.t.to(tl.int64) * own.C + own.channel, own.channel < own.C
    # Where there is none, what nobody reads: Triton 3.6 returns no None in a tuple.
    old_mean = tl.load(running_mean + index, mask=inside, other=0.0) if running_mean is not None else inside
    old_var = tl.load(running_var + index, mask=inside, other=0.0) if running_var is not None else inside
    return Tracked(index, inside, share, old_mean, old_var)


@triton.jit
def track(running_mean, running_var, before, average, variance, slab, tile):
    """Moves those that are given from what they were towards the batch's."""
    tl.debug_barrier()  # all threads of a program read what one of them writes
    index, inside = before.index, before.inside
    if running_mean is not None:
        values = moved(before.mean, average, before.share)
        tl.store(running_mean + index, values.to(running_mean.dtype.element_ty), mask=inside)
    if running_var is not None:
        count = tl.cast(slab.N, tile.ACC) * slab.S
        values = moved(before.var, variance * (count / (count - 1.0)), before.share)
        tl.store(running_var + index, values.to(running_var.dtype.element_ty), mask=inside)


@triton.jit
def batches_with_this(batches, slab, tile):
    """The count of batches when this one is counted, which the last of a task's programs does.

    All of them must read the count before it changes, and none knows when the others do: so each adds one to its upper
    half as it reads it, and the one that completes their number takes that off again.
    """
    programs = tl.cast(tl.cdiv(slab.C, tile.B) if tile.COLUMNS else slab.C, tl.int64)
    seen = tl.atomic_add(batches + slab.t, 1 << 32, sem="relaxed")
    last = (seen >> 32) % programs == programs - 1
    tl.atomic_add(batches + slab.t, 1 - (programs << 32), mask=last, sem="relaxed")
    return (seen & 0xFFFFFFFF) + 1


@triton.jit
def own_row(rows, slab):
    """The slab in the row of its task."""
    row = slab.t if rows is None else tl.load(rows + slab.t)
    return Slab(row, slab.channel, slab.T, slab.N, slab.C, slab.S)


@triton.jit
def moved(before, batch, share):
    """``(1 - share) * before + share * batch``, from the nearer end: a share of 0 or 1 rounds nothing."""
    change = batch - before
    return tl.where(share < 0.5, before + share * change, batch - (1.0 - share) * change)
