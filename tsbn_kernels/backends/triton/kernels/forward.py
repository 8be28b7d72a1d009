"""The forward kernels: one program a slab, or several in two launches."""

import triton
import triton.language as tl

from tsbn_kernels.backends.triton.kernels.epilogue import before_activation
from tsbn_kernels.backends.triton.kernels.running import TRACKED, track, tracked
from tsbn_kernels.backends.triton.kernels.statistics import merge_splits, slab_statistics, tile_statistics
from tsbn_kernels.backends.triton.kernels.tiles import (
    COUNTS,
    VECTORS,
    gate_value,
    load,
    program_from_last,
    slab_at,
    store,
    store_vector,
    tile_at,
    tiles_of,
    vector,
)


@triton.jit
def parameters(weight, bias, slab, tile, SIGMOID: tl.constexpr):
    """Gate and bias."""
    shift = tl.cast(0.0, tile.ACC) if bias is None else vector(bias, slab, tile)
    return gate_value(vector(weight, slab, tile), SIGMOID), shift


@triton.jit
def coefficients(gate, shift, rest, variance, EPS: tl.constexpr):
    """Scale and offset of ``y = (x - mean) * scale + offset``; the offset makes good for the rest of the mean."""
    scale = gate * tl.rsqrt(variance + EPS)
    return scale, shift if rest is None else shift - rest * scale


@triton.jit
def store_outcome(y, deviation, residual, scale, offset, slab, place, tile):
    """Writes y of a tile, from its deviations from the mean."""
    z = before_activation(deviation, residual, scale, offset, slab, place, tile)
    store(y, tile.VALUE(z, tile), slab, place, tile)


@triton.jit
def normalize_tiles(x, residual, y, slab, first, last, mean, scale, offset, tile):
    """Writes y of the tiles ``first`` to ``last``, the last one first: the cache may still hold it."""
    for i in range(first, last):
        place = tile_at(first + last - 1 - i, slab, tile)
        store_outcome(y, load(x, slab, place, tile) - mean, residual, scale, offset, slab, place, tile)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=TRACKED)
def forward_slab(
    x, residual, y, weight, bias, mean, var, running_mean, running_var, batches, momentum, rows, T, N, C, S, tile,
    RESIDENT: tl.constexpr, EPS: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """Statistics and y of a slab by one program. RESIDENT: the slab is one tile, which stays in registers.

    What a channel has, in rows one number each, is asked for while x is on its way, so that nothing waits for it later.
    """
    slab = slab_at(tl.program_id(0), T, N, C, S, tile)
    if RESIDENT:
        place = tile_at(0, slab, tile)
        values = load(x, slab, place, tile)
    if not tile.COLUMNS:
        before = tracked(running_mean, running_var, batches, momentum, rows, slab, tile)
        gate, shift = parameters(weight, bias, slab, tile, SIGMOID)
    if RESIDENT:
        deviation, about, rest, squares, count = tile_statistics(values, place, slab, tile)
        average = about + rest
    else:
        tiles = tiles_of(slab, tile)
        average, rest, squares, count = slab_statistics(x, slab, 0, tiles, tile)
    variance = squares / count
    store_vector(mean, average, slab)
    store_vector(var, variance, slab)
    if tile.COLUMNS:
        before = tracked(running_mean, running_var, batches, momentum, rows, slab, tile)
        gate, shift = parameters(weight, bias, slab, tile, SIGMOID)
    track(running_mean, running_var, before, average, variance, slab, tile)
    scale, offset = coefficients(gate, shift, rest, variance, EPS)
    if RESIDENT:
        store_outcome(y, deviation, residual, scale, offset, slab, place, tile)
    else:
        normalize_tiles(x, residual, y, slab, 0, tiles, average, scale, offset, tile)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=VECTORS)
def forward_partial(x, partials, T, N, C, S, splits, share, tile):
    """First launch for split slabs: mean, rest, squared deviations and count of a split into ``[4, splits, T, C]``.

    A split has ``share`` tiles, the last one fewer.
    """
    split = tl.program_id(0) % splits
    slab = slab_at(tl.program_id(0) // splits, T, N, C, S, tile)
    first = split * share
    last = tl.minimum(first + share, tiles_of(slab, tile))
    average, rest, squares, count = slab_statistics(x, slab, first, last, tile)
    size = tl.cast(T, tl.int64) * C
    data = partials + split * size
    store_vector(data, average, slab)
    store_vector(data + splits * size, rest, slab)
    store_vector(data + 2 * splits * size, squares, slab)
    store_vector(data + 3 * splits * size, count, slab)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=TRACKED)
def forward_apply(
    x, residual, y, weight, bias, mean, var, running_mean, running_var, batches, momentum, rows, partials,
    T, N, C, S, splits, share, tile, EPS: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """Y of a split, by the statistics that the splits' ``partials`` give, or by those given where there are none."""
    program = program_from_last()
    split = program % splits
    slab = slab_at(program // splits, T, N, C, S, tile)
    if partials is None:
        average, rest, variance = vector(mean, slab, tile), None, vector(var, slab, tile)
    else:
        average, rest, variance = merge_splits(partials, splits, slab, tile)
        if split == 0:
            store_vector(mean, average, slab)
            store_vector(var, variance, slab)
            before = tracked(running_mean, running_var, batches, momentum, rows, slab, tile)
            track(running_mean, running_var, before, average, variance, slab, tile)
    gate, shift = parameters(weight, bias, slab, tile, SIGMOID)
    scale, offset = coefficients(gate, shift, rest, variance, EPS)
    first = split * share
    last = tl.minimum(first + share, tiles_of(slab, tile))
    normalize_tiles(x, residual, y, slab, first, last, average, scale, offset, tile)
