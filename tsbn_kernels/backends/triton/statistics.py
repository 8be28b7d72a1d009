"""Mean and sum of squared deviations of a slab, by tiles and by splits, with nothing lost where |mean| >> std."""

import triton
import triton.language as tl

from tsbn_kernels.backends.triton.tiles import load, tile_at, total

LANES = tl.constexpr(16)  # splits whose partial sums are read at a time


@triton.jit
def merge_lanes(means, squares, counts, slab, tile):
    """Mean and squared deviations of a tile whose lanes hold those of ``counts`` values each, and the count of all.

    The mean is refined once: equal values give exactly that value, and no deviation.
    """
    lanes = tl.zeros((tile.A, 1 if tile.COLUMNS else tile.B), tile.ACC) + counts
    count = total(lanes, tile)
    first = total(means * counts, tile) / count
    mean = first + total((means - first) * counts, tile) / count
    deviation = means - mean
    return mean, total(squares + deviation * deviation * counts, tile), count


@triton.jit
def slab_statistics(x, slab, first, last, tile):
    """Mean, squared deviations and count of the tiles ``first`` to ``last``: each lane by Welford, then all by Chan."""
    means = tl.zeros((tile.A, tile.B), tile.ACC)
    squares = tl.zeros((tile.A, tile.B), tile.ACC)
    counts = tl.zeros((1 if tile.EVEN else tile.A, 1 if tile.EVEN or tile.COLUMNS else tile.B), tile.ACC)
    for k in tl.range(first, last, loop_unroll_factor=2 if tile.EVEN else 1):  # more loads in flight
        place = tile_at(k, slab, tile)
        values = load(x, slab, place, tile)
        counts += place.real
        deviation = values - means
        means += deviation * (place.real / tl.maximum(counts, 1.0))
        squares += deviation * (values - means) * place.real
    return merge_lanes(means, squares, counts, slab, tile)


@triton.jit
def splits_at(first, slab):
    """Where the partial sums of ``LANES`` splits lie within ``[splits, T, C]``, and which splits these are."""
    i = first + tl.arange(0, LANES)[:, None]
    size = tl.cast(slab.T, tl.int64) * slab.C
    return i * size + slab.t.to(tl.int64) * slab.C + slab.channel, i


@triton.jit
def merge_splits(partials, splits, slab, tile):
    """Mean and variance from the means, squared deviations and counts ``[3, splits, T, C]`` of the splits."""
    shape: tl.constexpr = (LANES, tile.B if tile.COLUMNS else 1)
    means, squares, counts = tl.zeros(shape, tile.ACC), tl.zeros(shape, tile.ACC), tl.zeros(shape, tile.ACC)
    step = splits * (tl.cast(slab.T, tl.int64) * slab.C)
    for first in range(0, splits, LANES):
        index, i = splits_at(first, slab)
        inside = (i < splits) & (slab.channel < slab.C)
        more = tl.load(partials + 2 * step + index, mask=inside, other=0.0)
        deviation = tl.load(partials + index, mask=inside, other=0.0) - means
        before = counts
        counts += more
        share = more / tl.maximum(counts, 1.0)
        means += deviation * share
        squares += tl.load(partials + step + index, mask=inside, other=0.0) + deviation * deviation * before * share
    count = tl.maximum(total(counts, tile), 1.0)
    first = total(means * counts, tile) / count
    mean = first + total((means - first) * counts, tile) / count
    deviation = means - mean
    return mean, total(squares + deviation * deviation * counts, tile) / count


@triton.jit
def add_splits(partials, splits, slab, tile):
    """Sums of the two sums ``[2, splits, T, C]`` of the splits."""
    shape: tl.constexpr = (LANES, tile.B if tile.COLUMNS else 1)
    sums, dots = tl.zeros(shape, tile.ACC), tl.zeros(shape, tile.ACC)
    step = splits * (tl.cast(slab.T, tl.int64) * slab.C)
    for first in range(0, splits, LANES):
        index, i = splits_at(first, slab)
        inside = (i < splits) & (slab.channel < slab.C)
        sums += tl.load(partials + index, mask=inside, other=0.0)
        dots += tl.load(partials + step + index, mask=inside, other=0.0)
    return total(sums, tile), total(dots, tile)
