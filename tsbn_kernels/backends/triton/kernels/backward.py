"""The backward kernels: one program a slab, or several in two launches."""

import triton
import triton.language as tl

from tsbn_kernels.backends.triton.kernels.epilogue import restore, through
from tsbn_kernels.backends.triton.kernels.statistics import add_splits
from tsbn_kernels.backends.triton.kernels.tiles import (
    COUNTS,
    VECTORS,
    gate_slope,
    gate_value,
    load,
    program_from_last,
    slab_at,
    store,
    store_vector,
    tile_at,
    tiles_of,
    totals,
    vector,
    within,
)


@triton.jit
def normalization(weight, bias, mean, var, slab, tile, EPS: tl.constexpr, SIGMOID: tl.constexpr):
    """The raw gate, mean, ``rstd``, ``gate * rstd`` and bias of the forward pass."""
    raw = vector(weight, slab, tile)
    rstd = tl.rsqrt(vector(var, slab, tile) + EPS)
    shift = tl.cast(0.0, tile.ACC) if bias is None else vector(bias, slab, tile)
    return raw, vector(mean, slab, tile), rstd, gate_value(raw, SIGMOID) * rstd, shift


@triton.jit
def coefficients(sums, dots, rstd, scale, slab, tile):
    """Slope and offset of ``dx = dy * scale + (x - mean) * slope + offset``."""
    count = tl.cast(slab.N, tile.ACC) * slab.S
    return -(dots * rstd / count) * rstd * scale, -(sums / count) * scale


@triton.jit
def gradient_at(dy, x, residual, slab, place, mean, scale, shift, tile):
    """The gradient of ``z = (x - mean) * scale + shift`` in a tile, and x - mean."""
    gradient = load(dy, slab, place, tile)
    values = restore(load(x, slab, place, tile), tile)
    deviation = values - mean
    return through(gradient, values, deviation, residual, scale, shift, slab, place, tile), deviation


@triton.jit
def slab_sums(
    dy, x, residual, dx, dresidual, slab, first, last, mean, scale, shift, tile, TRAINING: tl.constexpr
):  # fmt: skip
    """Sums of the gradient and of gradient * (x - mean) over tiles.

    On the way the residual's gradient is written where asked for, and so is dx in evaluation.
    """
    sums = tl.zeros((tile.A, tile.B), tile.ACC)
    dots = tl.zeros((tile.A, tile.B), tile.ACC)
    for k in range(first, last):
        place = tile_at(k, slab, tile)
        if tile.ACTIVATION == "none":
            gradient = load(dy, slab, place, tile)
            sums += gradient  # before x is loaded: fewer registers
            deviation = load(x, slab, place, tile) - mean
        else:
            gradient, deviation = gradient_at(dy, x, residual, slab, place, mean, scale, shift, tile)
            sums += gradient
        dots += gradient * within(deviation, place, tile)
        if dresidual is not None:
            store(dresidual, gradient, slab, place, tile)
        if not TRAINING and dx is not None:
            store(dx, gradient * scale, slab, place, tile)
    return totals(sums, dots, tile)


@triton.jit
def gradient_tiles(
    dy, x, residual, dx, dresidual, slab, first, last, mean, scale, shift, slope, offset, tile,
    TRAINING: tl.constexpr, DONE: tl.constexpr,
):  # fmt: skip
    """Writes dx of the tiles ``first`` to ``last``, the last one first: the cache may still hold it.

    DONE: the gradient has gone through the activation.
    """
    for i in range(first, last):
        place = tile_at(first + last - 1 - i, slab, tile)
        if DONE or tile.ACTIVATION == "none":
            gradient = load(dy, slab, place, tile)
            result = gradient * scale
            if TRAINING:
                deviation = load(x, slab, place, tile) - mean
        else:
            gradient, deviation = gradient_at(dy, x, residual, slab, place, mean, scale, shift, tile)
            result = gradient * scale
        if dresidual is not None:
            store(dresidual, gradient, slab, place, tile)
        if dx is not None:
            if TRAINING:
                result += deviation * slope + offset
            store(dx, result, slab, place, tile)


@triton.jit
def store_parameters(raw, dweight, dbias, sums, dots, rstd, slab, SIGMOID: tl.constexpr):
    """Gradients of weight and bias, where asked for."""
    if dweight is not None:
        store_vector(dweight, dots * rstd * gate_slope(raw, SIGMOID), slab)
    if dbias is not None:
        store_vector(dbias, sums, slab)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=VECTORS)
def backward_slab(
    dy, x, residual, dx, dresidual, weight, bias, mean, var, dweight, dbias, T, N, C, S, tile,
    RESIDENT: tl.constexpr, DONE: tl.constexpr, TRAINING: tl.constexpr, EPS: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """All gradients of a slab by one program. RESIDENT: the slab is one tile, which stays in registers.

    DONE: else dresidual serves in the second pass, in the place of dy and residual.
    """
    slab = slab_at(tl.program_id(0), T, N, C, S, tile)
    raw, average, rstd, scale, shift = normalization(weight, bias, mean, var, slab, tile, EPS, SIGMOID)
    if RESIDENT:
        place = tile_at(0, slab, tile)
        gradient, deviation = gradient_at(dy, x, residual, slab, place, average, scale, shift, tile)
        deviation = within(deviation, place, tile)
        if dresidual is not None:
            store(dresidual, gradient, slab, place, tile)
        sums, dots = totals(gradient, gradient * deviation, tile)
        if dx is not None:
            result = gradient * scale
            if TRAINING:
                slope, offset = coefficients(sums, dots, rstd, scale, slab, tile)
                result += deviation * slope + offset
            store(dx, result, slab, place, tile)
    else:
        tiles = tiles_of(slab, tile)
        sums, dots = slab_sums(dy, x, residual, dx, dresidual, slab, 0, tiles, average, scale, shift, tile, TRAINING)
        if TRAINING and dx is not None:
            slope, offset = coefficients(sums, dots, rstd, scale, slab, tile)
            if DONE:
                tl.debug_barrier()  # the first pass may have written with other threads
                dy = dresidual
            gradient_tiles(
                dy, x, residual, dx, None, slab, 0, tiles, average, scale, shift, slope, offset, tile, True, DONE
            )
    store_parameters(raw, dweight, dbias, sums, dots, rstd, slab, SIGMOID)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=VECTORS)
def backward_partial(
    dy, x, residual, dx, dresidual, weight, bias, mean, var, partials, T, N, C, S, splits, share, tile,
    TRAINING: tl.constexpr, EPS: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """First launch for split slabs: the two sums of a split into ``[2, splits, T, C]``; in evaluation also dx."""
    split = tl.program_id(0) % splits
    slab = slab_at(tl.program_id(0) // splits, T, N, C, S, tile)
    _, average, _, scale, shift = normalization(weight, bias, mean, var, slab, tile, EPS, SIGMOID)
    first = split * share
    last = tl.minimum(first + share, tiles_of(slab, tile))
    sums, dots = slab_sums(dy, x, residual, dx, dresidual, slab, first, last, average, scale, shift, tile, TRAINING)
    size = tl.cast(T, tl.int64) * C
    data = partials + split * size
    store_vector(data, sums, slab)
    store_vector(data + splits * size, dots, slab)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=VECTORS)
def backward_apply(
    dy, x, residual, dx, dresidual, weight, bias, mean, var, dweight, dbias, partials, T, N, C, S, splits, share, tile,
    DONE: tl.constexpr, TRAINING: tl.constexpr, EPS: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """Gradients by the sums that the splits' ``partials`` give: dx of a split, and the parameters' by the first one.

    Without ``partials`` nothing is summed: dx in evaluation. DONE: dy has gone through the activation.
    """
    program = program_from_last()
    split = program % splits
    slab = slab_at(program // splits, T, N, C, S, tile)
    raw, average, rstd, scale, shift = normalization(weight, bias, mean, var, slab, tile, EPS, SIGMOID)
    slope, offset = average, average
    if partials is not None:
        sums, dots = add_splits(partials, splits, slab, tile)
        slope, offset = coefficients(sums, dots, rstd, scale, slab, tile)
        if split == 0:
            store_parameters(raw, dweight, dbias, sums, dots, rstd, slab, SIGMOID)
    if dx is not None or dresidual is not None:
        first = split * share
        end = tl.minimum(first + share, tiles_of(slab, tile))
        gradient_tiles(
            dy, x, residual, dx, dresidual, slab, first, end, average, scale, shift, slope, offset, tile, TRAINING, DONE
        )
