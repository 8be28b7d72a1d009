"""The kernels of layer normalisation of mixed batches: a batch of one stream, whose samples are of any tasks.

Forward, rows are gone through as they lie, each with the vectors of its sample's task. Backward, a program has a block
of samples of one task through an order of the batch, or a piece of a long one, and leaves what it sums in a row of
``[programs, C]``. A launch of one program for each task and block of channels adds its rows in their order.
"""

import triton
import triton.language as tl

from tsbn_kernels.backends.triton.kernels.fan_out import of_task
from tsbn_kernels.backends.triton.kernels.layer_norm import (
    add_parts,
    gates,
    normalize_rows,
    normalized,
    offsets,
    rows_in,
    store_dx,
)
from tsbn_kernels.backends.triton.kernels.mixed import block_at, row_of
from tsbn_kernels.backends.triton.kernels.tiles import (
    Place,
    gate_slope,
    load,
    slab_at,
    store,
    store_vector,
    tile_at,
    tiles_of,
    total,
    vector,
)

SIZES = ["N", "S", "T", "splits", "share", "pieces"]
UNALIGNED = ["tasks", "mean", "rstd", "dweight", "dbias", "dots", "sums"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def mixed_layer_norm_forward(
    x, residual, y, added, tasks, weight, bias, mean, rstd, N, S, splits, share, tile,
    C: tl.constexpr, EPS: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """Y and the statistics of a split of the rows; ``tasks`` are those of the N samples.

    With a residual ``added = x + residual`` is normalised; without ``mean`` it is the RMS form.
    """
    split = tl.program_id(0)
    slab = slab_at(0, 1, N, C, S, tile)
    first = split * share
    last = tl.minimum(first + share, tiles_of(slab, tile))
    for k in range(first, last):
        place = tile_at(k, slab, tile)
        own = of_task(tl.load(tasks + place.n, mask=place.n < N, other=0), 1, slab)
        xhat = normalize_rows(x, residual, added, mean, rstd, slab, place, tile, True, EPS)
        result = xhat * gates(weight, own, tile, SIGMOID) + offsets(bias, own, tile)
        store(rows_in(y, slab, True), result, slab, place, tile)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def mixed_layer_norm_backward(
    dy, ds, x, dx, weight, mean, rstd, dots, sums, mix, S, pieces, tile,
    C: tl.constexpr, SAMPLES: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """The dx of a piece of a block of samples, and its sums of ``dy * xhat`` and ``dy``, those that are asked for.

    ``ds`` is added to dx.
    """
    program = tl.program_id(0)
    slab, block = block_at(program // pieces, mix, C, S, tile, SAMPLES)
    if slab.N > 0:
        gate = gates(weight, slab, tile, SIGMOID)
        dot = tl.zeros((tile.A, tile.B), tile.ACC)
        sum = tl.zeros((tile.A, tile.B), tile.ACC)
        tiles = tiles_of(slab, tile)
        share = tl.cdiv(tiles, pieces)
        first = program % pieces * share
        for k in range(first, tl.minimum(first + share, tiles)):
            at = tile_at(k, slab, tile)
            sample = tl.load(mix.order + block.sample + at.n, mask=at.n < slab.N, other=0)
            place = Place(sample, at.s, at.inside, at.real)
            if dx is not None or dots is not None:
                xhat, scale = normalized(x, mean, rstd, slab, place, tile, True)
            gradient = load(rows_in(dy, slab, True), slab, place, tile)
            if dots is not None:
                dot += gradient * xhat
            if sums is not None:
                sum += gradient
            if dx is not None:
                gradient *= gate
                store_dx(dx, ds, gradient, xhat, scale, mean, slab, place, tile, True)
        row = row_of(program, slab)
        if dots is not None:
            store_vector(dots, total(dot, tile), row)
        if sums is not None:
            store_vector(sums, total(sum, tile), row)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def mixed_layer_norm_parameters(
    weight, dweight, dbias, dots, sums, mix, T, pieces, tile, C: tl.constexpr, SIGMOID: tl.constexpr
):  # fmt: skip
    """The parameters' gradients of a task in a block of channels, 0 without a sample."""
    slab = slab_at(tl.program_id(0), T, 1, C, 1, tile)
    first = tl.load(mix.block + slab.t) * pieces
    programs = (tl.load(mix.blocks + slab.t) * pieces).to(tl.int32)
    if dweight is not None:
        dot = add_parts(dots + first * C, programs, of_task(0, 1, slab), tile)
        slope = gate_slope(vector(weight, slab, tile), SIGMOID)
        store_vector(dweight, tl.where(programs > 0, dot * slope, 0.0), slab)
    if dbias is not None:
        store_vector(dbias, add_parts(sums + first * C, programs, of_task(0, 1, slab), tile), slab)
