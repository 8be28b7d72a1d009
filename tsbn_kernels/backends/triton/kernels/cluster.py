"""The kernels of a slab that the blocks of a cluster keep in their registers, in rows.

To a program a cluster is one block of more threads: the slab is one tile, which Triton divides among the blocks, and
sums meet in distributed shared memory. Each sum is exchanged by itself: two that lie side by side do not compile there.
"""

import triton
import triton.language as tl

from tsbn_kernels.backends.triton.kernels import backward, forward
from tsbn_kernels.backends.triton.kernels.running import TRACKED, Tracked, batches_with_this, own_row, track, tracked
from tsbn_kernels.backends.triton.kernels.tiles import (
    COUNTS,
    VECTORS,
    load,
    slab_at,
    store,
    store_vector,
    tile_at,
    total,
    within,
)


@triton.jit
def cumulative(before, batches, rows, slab, tile):
    """The statistics as they were, with a share of the batch that is one of all batches."""
    share = 1.0 / batches_with_this(batches, own_row(rows, slab), tile).to(tile.ACC)
    return Tracked(before.index, before.inside, share, before.mean, before.var)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=TRACKED)
def forward_cluster(
    x, residual, y, weight, bias, mean, var, running_mean, running_var, batches, momentum, rows, T, N, C, S, tile,
    EPS: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """Statistics and y of a slab, as by ``forward_slab`` and ``tile_statistics``.

    The running statistics are read before the blocks meet, for one block writes them after that. The count of batches
    is read last: Triton 3.8 lets a block sum in the memory from which the others still fetch what an atomic returned.
    """
    slab = slab_at(tl.program_id(0), T, N, C, S, tile)
    place = tile_at(0, slab, tile)
    values = load(x, slab, place, tile)
    counted = None if momentum is None else batches
    before = tracked(running_mean, running_var, counted, momentum, rows, slab, tile)
    gate, shift = forward.parameters(weight, bias, slab, tile, SIGMOID)
    count = tl.cast(slab.N * slab.S, tile.ACC)
    about = total(values, tile) / count
    deviation = within(values - about, place, tile)
    sums = total(deviation, tile)
    squares = total(deviation * deviation, tile)
    rest = sums / count
    average = about + rest
    variance = tl.maximum(squares - sums * rest, 0.0, propagate_nan=tl.PropagateNan.ALL) / count
    store_vector(mean, average, slab)
    store_vector(var, variance, slab)
    if momentum is None and batches is not None:
        before = cumulative(before, batches, rows, slab, tile)
    track(running_mean, running_var, before, average, variance, slab, tile)
    scale, offset = forward.coefficients(gate, shift, rest, variance, EPS)
    forward.store_outcome(y, deviation, residual, scale, offset, slab, place, tile)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=VECTORS)
def backward_cluster(
    dy, x, residual, dx, dresidual, weight, bias, mean, var, dweight, dbias, T, N, C, S, tile,
    EPS: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """All gradients of a slab in training, as by ``backward_slab``."""
    slab = slab_at(tl.program_id(0), T, N, C, S, tile)
    raw, average, rstd, scale, shift = backward.normalization(weight, bias, mean, var, slab, tile, EPS, SIGMOID)
    place = tile_at(0, slab, tile)
    gradient, deviation = backward.gradient_at(dy, x, residual, slab, place, average, scale, shift, tile)
    deviation = within(deviation, place, tile)
    if dresidual is not None:
        store(dresidual, gradient, slab, place, tile)
    sums = total(gradient, tile)
    dots = total(gradient * deviation, tile)
    slope, offset = backward.coefficients(sums, dots, rstd, scale, slab, tile)
    store(dx, gradient * scale + (deviation * slope + offset), slab, place, tile)
    backward.store_parameters(raw, dweight, dbias, sums, dots, rstd, slab, SIGMOID)
