"""Mean and sum of squared deviations of a slab, by tiles and by splits, with nothing lost where |mean| >> std.

Not even the digits of the mean that its type cannot hold: they come as a second number, ``rest``.
"""

import triton
import triton.language as tl

from tsbn_kernels.backends.triton.tiles import load, tile_at, total, within


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
def merge_splits(partials, splits, slab, tile, P: tl.constexpr):
    """Mean, rest and variance from the means, rests, squared deviations and counts ``[4, splits, T, C]`` of splits."""
    i = tl.arange(0, P)[:, None]
    inside = (i < splits) & (slab.channel < slab.C)
    size = tl.cast(slab.T, tl.int64) * slab.C
    data = partials + (i * size + slab.t.to(tl.int64) * slab.C + slab.channel)
    means = tl.load(data, mask=inside, other=0.0)
    rests = tl.load(data + splits * size, mask=inside, other=0.0)
    squares = tl.load(data + 2 * splits * size, mask=inside, other=0.0)
    counts = tl.load(data + 3 * splits * size, mask=inside, other=0.0)
    count = tl.maximum(tl.sum(counts, 0, keep_dims=True), 1.0)
    first = tl.sum(means * counts, 0, keep_dims=True) / count
    mean, rest = exact_sum(first, tl.sum((means - first + rests) * counts, 0, keep_dims=True) / count)
    deviation = means - mean + rests
    return mean, rest, tl.sum(squares + deviation * deviation * counts, 0, keep_dims=True) / count
