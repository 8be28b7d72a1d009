"""Mean and sum of squared deviations of a slab, by tiles and by splits, with nothing lost where |mean| >> std.

Not even the digits of the mean that its type cannot hold: they come as a second number, ``rest``.
"""

import triton
import triton.language as tl

from tsbn_kernels.backends.triton.kernels.tiles import load, tile_at, total, vector, within

LANES = tl.constexpr(16)  # splits whose partial sums are read at a time


@triton.jit
def exact_sum(a, b):
    """The sum of two numbers, and what rounding takes from it."""
    both = a + b
    part = both - a
    return both, (a - (both - part)) + (b - part)


@triton.jit
def lane_total(counts, tile):
    """The sum of what the lanes of a tile count."""
    return total(tl.zeros((tile.A, 1 if tile.COLUMNS else tile.B), tile.ACC) + counts, tile)


@triton.jit
def merge_lanes(means, squares, counts, slab, tile):
    """Mean, rest and squared deviations of a tile whose lanes hold those of ``counts`` values each; the count of all.

    The mean is refined once: equal values give exactly that value, and no deviation.
    """
    count = lane_total(counts, tile)
    first = total(means * counts, tile) / count
    mean, rest = exact_sum(first, total((means - first) * counts, tile) / count)
    deviation = means - mean
    return mean, rest, total(squares + deviation * deviation * counts, tile), count


@triton.jit
def tile_statistics(values, place, slab, tile):
    """The same of a slab that is one tile, zero where it has no values.

    A lane has one value or none: nobody counts, and masks take the place of counts, which would take registers.
    """
    count = tl.cast(slab.N * slab.S, tile.ACC)
    first = total(values, tile) / count
    mean, rest = exact_sum(first, total(within(values - first, place, tile), tile) / count)
    deviation = within(values - mean, place, tile)
    return mean, rest, total(deviation * deviation, tile), count


@triton.jit
def slab_statistics(x, slab, first, last, tile):
    """Mean, rest, squared deviations and count of the tiles ``first`` to ``last``.

    Each lane by Welford, then all by Chan; relative to the first tile's mean, so that no lane's mean is far from zero.
    """
    place = tile_at(first, slab, tile)
    values = load(x, slab, place, tile)
    counts = place.real
    shift = total(values, tile) / lane_total(counts, tile)
    means = within(values - shift, place, tile)
    squares = tl.zeros((tile.A, tile.B), tile.ACC)
    for k in tl.range(first + 1, last, loop_unroll_factor=2 if tile.EVEN else 1):  # more loads in flight
        place = tile_at(k, slab, tile)
        values = load(x, slab, place, tile) - shift
        counts += place.real
        deviation = values - means
        means += deviation * (place.real / tl.maximum(counts, 1.0))
        squares += deviation * (values - means) * place.real
    mean, rest, squares, count = merge_lanes(means, squares, counts, slab, tile)
    mean, lost = exact_sum(shift, mean)
    return mean, rest + lost, squares, count


@triton.jit
def splits_at(first, slab):
    """Where the partial sums of ``LANES`` splits lie within ``[splits, T, C]``, and which splits these are."""
    i = first + tl.arange(0, LANES)[:, None]
    size = tl.cast(slab.T, tl.int64) * slab.C
    return i * size + slab.t.to(tl.int64) * slab.C + slab.channel, i


@triton.jit
def merge_splits(partials, splits, slab, tile):
    """Mean, rest and variance from the means, rests, squared deviations and counts ``[4, splits, T, C]`` of splits.

    By Chan, relative to the first split's mean.
    """
    shape: tl.constexpr = (LANES, tile.B if tile.COLUMNS else 1)
    means, squares, counts = tl.zeros(shape, tile.ACC), tl.zeros(shape, tile.ACC), tl.zeros(shape, tile.ACC)
    shift = vector(partials, slab, tile)
    step = splits * (tl.cast(slab.T, tl.int64) * slab.C)
    for start in range(0, splits, LANES):
        index, i = splits_at(start, slab)
        inside = (i < splits) & (slab.channel < slab.C)
        mean = tl.where(inside, tl.load(partials + index, mask=inside, other=0.0) - shift, 0.0)
        deviation = mean + tl.load(partials + step + index, mask=inside, other=0.0) - means
        more = tl.load(partials + 3 * step + index, mask=inside, other=0.0)
        before = counts
        counts += more
        share = more / tl.maximum(counts, 1.0)
        means += deviation * share
        squares += tl.load(partials + 2 * step + index, mask=inside, other=0.0) + deviation * deviation * before * share
    count = tl.maximum(total(counts, tile), 1.0)
    first = total(means * counts, tile) / count
    centre = first + total((means - first) * counts, tile) / count
    deviation = means - centre
    average, rest = exact_sum(shift, centre)
    return average, rest, total(squares + deviation * deviation * counts, tile) / count


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
