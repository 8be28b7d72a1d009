"""Mean and sum of squared deviations of a slab, by tiles and by splits, with nothing lost where |mean| >> std.

Not even the digits of the mean that its type cannot hold: they come as a second number, ``rest``.
"""

import triton
import triton.language as tl

from tsbn_kernels.backends.triton.kernels.tiles import load, tile_at, total, totals, vector, within

LANES = tl.constexpr(16)  # splits whose partial sums are read at a time


@triton.jit
def exact_sum(a, b):
    """The sum of two numbers, and what rounding takes from it."""
    both = a + b
    part = both - a
    return both, (a - (both - part)) + (b - part)


@triton.jit
def counted_mean(values, counts, tile):
    """The mean over a tile whose lanes count values, and their number: in rows by one exchange between threads.

    In columns all channels share the counts, which are summed apart.
    """
    if tile.COLUMNS:
        count = total(tl.zeros((tile.A, 1), tile.ACC) + counts, tile)
        sums = total(values * counts, tile)
    else:
        sums, count = totals(values * counts, tl.zeros((tile.A, tile.B), tile.ACC) + counts, tile)
    return sums / count, count


@triton.jit
def around(deviation, squares, counts, count, tile):
    """Of deviations from about the mean: their mean, and the squares around the mean itself.

    By one exchange, for squares are summed around what they deviate from; what that adds is as small as the mean of
    the deviations.
    """
    sums, squares = totals(deviation * counts, squares + deviation * deviation * counts, tile)
    rest = sums / count
    return rest, tl.maximum(squares - sums * rest, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def merge_lanes(means, squares, counts, slab, tile):
    """Mean, rest and squared deviations of a tile whose lanes hold those of ``counts`` values; the count of all."""
    first, count = counted_mean(means, counts, tile)
    rest, squares = around(means - first, squares, counts, count, tile)
    mean, rest = exact_sum(first, rest)
    return mean, rest, squares, count


@triton.jit
def tile_statistics(values, place, slab, tile):
    """Deviations of a slab that is one tile, from about the mean; that, its rest, squared deviations and the count.

    There are two exchanges between threads: the second finds what the first mean lacks, beside the squares. Deviations
    are zero where there are no values: a lane has one or none, so nobody counts, and masks take the place of counts.
    """
    count = tl.cast(slab.N * slab.S, tile.ACC)
    about = total(values, tile) / count
    deviation = within(values - about, place, tile)
    rest, squares = around(deviation, 0.0, 1.0, count, tile)
    return deviation, about, rest, squares, count


@triton.jit
def slab_statistics(x, slab, first, last, tile):
    """Mean, rest, squared deviations and count of the tiles ``first`` to ``last``.

    Each lane by Welford, then all by Chan; relative to the first tile's mean, so that no lane's mean is far from zero.
    """
    place = tile_at(first, slab, tile)
    values = load(x, slab, place, tile)
    counts = place.real
    shift, _ = counted_mean(values, counts, tile)
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
    sums, count = totals(means * counts, counts, tile)
    count = tl.maximum(count, 1.0)
    first = sums / count
    centre, squares = around(means - first, squares, counts, count, tile)
    average, rest = exact_sum(shift, first + centre)
    return average, rest, squares / count


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
    return totals(sums, dots, tile)
