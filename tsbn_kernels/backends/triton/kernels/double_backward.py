"""The kernels of the second derivative: sums over ddx, dy and x, and what is made of these by factors of the sums.

What the sums and factors are is said in :mod:`tsbn_kernels.definition.double_backward`. Any implementation reads three
tensors of x's size and writes two. As the factors lie between, each kernel reads ddx, dy and x: eight are moved.
"""

import triton
import triton.language as tl

from tsbn_kernels.backends.triton.kernels.tiles import (
    COUNTS,
    VECTORS,
    load,
    program_from_last,
    slab_at,
    store,
    store_vector,
    tile_at,
    tiles_of,
    total,
    totals,
    vector,
)


@triton.jit
def read(ddx, dy, x, slab, place, average, tile):
    """Values of ddx and dy in a tile, zero where there are none, and x - mean."""
    return load(ddx, slab, place, tile), load(dy, slab, place, tile), load(x, slab, place, tile) - average


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=VECTORS)
def double_backward_partial(ddx, dy, x, mean, partials, T, N, C, S, splits, share, tile):
    """The five sums of a split into ``[5, splits, T, C]``."""
    split = tl.program_id(0) % splits
    slab = slab_at(tl.program_id(0) // splits, T, N, C, S, tile)
    average = vector(mean, slab, tile)
    first = split * share
    last = tl.minimum(first + share, tiles_of(slab, tile))
    second, upstream = tl.zeros((tile.A, tile.B), tile.ACC), tl.zeros((tile.A, tile.B), tile.ACC)
    second_dots, upstream_dots = tl.zeros((tile.A, tile.B), tile.ACC), tl.zeros((tile.A, tile.B), tile.ACC)
    products = tl.zeros((tile.A, tile.B), tile.ACC)
    for k in range(first, last):
        u, dz, deviation = read(ddx, dy, x, slab, tile_at(k, slab, tile), average, tile)
        second += u
        upstream += dz
        second_dots += u * deviation
        upstream_dots += dz * deviation
        products += u * dz
    second, upstream = totals(second, upstream, tile)
    second_dots, upstream_dots = totals(second_dots, upstream_dots, tile)
    size = tl.cast(T, tl.int64) * C
    data, step = partials + split * size, splits * size
    store_vector(data, second, slab)
    store_vector(data + step, upstream, slab)
    store_vector(data + 2 * step, second_dots, slab)
    store_vector(data + 3 * step, upstream_dots, slab)
    store_vector(data + 4 * step, total(products, tile), slab)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=[*VECTORS, "factors"])
def double_backward_apply(ddx, dy, x, mean, factors, ddy, dx, T, N, C, S, splits, share, tile):
    """What a split has of ddy and dx by ``factors [7, T, C]``, the last tile first: the cache may still hold it."""
    program = program_from_last()
    split = program % splits
    slab = slab_at(program // splits, T, N, C, S, tile)
    average = vector(mean, slab, tile)
    size = tl.cast(T, tl.int64) * C
    f0, f1, f2 = vector(factors, slab, tile), vector(factors + size, slab, tile), vector(factors + 2 * size, slab, tile)
    f3, f4 = vector(factors + 3 * size, slab, tile), vector(factors + 4 * size, slab, tile)
    f5, f6 = vector(factors + 5 * size, slab, tile), vector(factors + 6 * size, slab, tile)
    first = split * share
    last = tl.minimum(first + share, tiles_of(slab, tile))
    for i in range(first, last):
        place = tile_at(first + last - 1 - i, slab, tile)
        u, dz, deviation = read(ddx, dy, x, slab, place, average, tile)
        store(ddy, u * f0 + (deviation * f1 + f2), slab, place, tile)
        store(dx, u * f3 + dz * f4 + (deviation * f5 + f6), slab, place, tile)
