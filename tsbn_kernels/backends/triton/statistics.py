"""Mean and sum of squared deviations of a slab, by tiles and by splits, with nothing lost where |mean| >> std."""

import triton
import triton.language as tl

from tsbn_kernels.backends.triton.tiles import load, tile_at, total


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
def merge_splits(partials, splits, slab, tile, P: tl.constexpr):
    """Mean and variance from the means, squared deviations and counts ``[3, splits, T, C]`` of the splits."""
    i = tl.arange(0, P)[:, None]
    inside = (i < splits) & (slab.channel < slab.C)
    size = tl.cast(slab.T, tl.int64) * slab.C
    data = partials + (i * size + slab.t.to(tl.int64) * slab.C + slab.channel)
    means = tl.load(data, mask=inside, other=0.0)
    squares = tl.load(data + splits * size, mask=inside, other=0.0)
    counts = tl.load(data + 2 * splits * size, mask=inside, other=0.0)
    count = tl.maximum(tl.sum(counts, 0, keep_dims=True), 1.0)
    first = tl.sum(means * counts, 0, keep_dims=True) / count
    mean = first + tl.sum((means - first) * counts, 0, keep_dims=True) / count
    deviation = means - mean
    return mean, tl.sum(squares + deviation * deviation * counts, 0, keep_dims=True) / count
