"""The kernels of layer normalisation: rows of ``C`` values, which are normalised each by itself.

To the tiles such an activation is one in columns: a slab is a task, its positions are the rows, its channels the values
of a row. A row lies in a tile as a whole, so all of it stays in registers between its statistics and its result. Of a
task's rows ``S`` follow one another, ``N`` times. Of one input for all tasks (ONE) x has the rows of a single task.
"""

import triton
import triton.language as tl

from tsbn_kernels.backends.triton.kernels.fan_out import of_task
from tsbn_kernels.backends.triton.kernels.statistics import LANES, splits_at
from tsbn_kernels.backends.triton.kernels.tiles import (
    COUNTS,
    View,
    gate_slope,
    gate_value,
    load,
    slab_at,
    store,
    store_vector,
    tile_at,
    tiles_of,
    total,
    vector,
    within,
)

SIZES = [*COUNTS, "S"]
UNALIGNED = ["mean", "rstd", "dweight", "dbias", "dots", "sums"]


@triton.jit
def rows_in(data, slab, ONE: tl.constexpr):
    """The view of a stacked activation, or of ONE input for all tasks.

    As ``C`` is a constant, the compiler knows how rows are aligned.
    """
    run = tl.cast(slab.S, tl.int64) * slab.C
    return View(data, 0, run, 1, slab.C) if ONE else View(data, run, run * slab.T, 1, slab.C)


@triton.jit
def row_numbers(slab, place, ONE: tl.constexpr):
    """Which rows of the activation a tile holds, ``[A, 1]``."""
    n = place.n.to(tl.int64)
    return (n if ONE else n * slab.T + slab.t) * slab.S + place.s


@triton.jit
def load_rows(data, slab, place, ONE: tl.constexpr):
    """A statistic of the rows of a tile."""
    return tl.load(data + row_numbers(slab, place, ONE), mask=place.real > 0.0, other=0.0)


@triton.jit
def store_rows(data, values, slab, place, ONE: tl.constexpr):
    """Writes a statistic of the rows of a tile."""
    tl.store(data + row_numbers(slab, place, ONE), values, mask=place.real > 0.0)


@triton.jit
def _add(a, b, c, d):
    return a + c, b + d


@triton.jit
def row_mean(values, slab):
    """The mean over each row."""
    return tl.sum(values, 1, keep_dims=True) / slab.C


@triton.jit
def row_means(a, b, slab):
    """Two means over each row by one exchange between threads."""
    a, b = tl.reduce((a, b), 1, _add, keep_dims=True)
    return a / slab.C, b / slab.C


@triton.jit
def gates(weight, slab, tile, SIGMOID: tl.constexpr):
    """The gates of a task."""
    return gate_value(vector(weight, slab, tile), SIGMOID)


@triton.jit
def offsets(bias, slab, tile):
    """The bias of a task."""
    return tl.zeros((1, 1), tile.ACC) if bias is None else vector(bias, slab, tile)


@triton.jit
def normalize_rows(x, residual, added, mean, rstd, slab, place, tile, ONE: tl.constexpr, EPS: tl.constexpr):
    """``xhat`` of a tile; its rows' statistics are written, and with a residual the sum that is normalised.

    Without ``mean`` it is the RMS form.
    """
    values = load(rows_in(x, slab, ONE), slab, place, tile)
    if residual is not None:
        values += load(rows_in(residual, slab, ONE), slab, place, tile)
        values = values.to(x.dtype.element_ty).to(tile.ACC)
        store(rows_in(added, slab, ONE), values, slab, place, tile)
    if mean is None:
        variance = row_mean(values * values, slab)
    else:
        average = row_mean(values, slab)
        values = within(values - average, place, tile)
        rest, squares = row_means(values, values * values, slab)  # what rounding took from the mean
        variance = tl.maximum(squares - rest * rest, 0.0, propagate_nan=tl.PropagateNan.ALL)
        values -= rest
        store_rows(mean, average + rest, slab, place, ONE)
    scale = tl.rsqrt(variance + EPS)
    store_rows(rstd, scale, slab, place, ONE)
    return values * scale


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def layer_norm_forward(
    x, residual, y, added, weight, bias, mean, rstd, T, N, S, splits, share, tile,
    C: tl.constexpr, ONE: tl.constexpr, CROWDED: tl.constexpr, EPS: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """Y and the statistics of a split of a task's rows; with a residual ``added = x + residual`` is normalised.

    Without ``mean`` it is the RMS form. Gates and bias are loaded once, but the bias for each tile where the registers
    are CROWDED; of ONE input each tile meets all tasks.
    """
    split = tl.program_id(0) % splits
    slab = slab_at(tl.program_id(0) // splits, 1 if ONE else T, N, C, S, tile)
    if not ONE:
        gate = gates(weight, slab, tile, SIGMOID)
        if not CROWDED:
            shift = offsets(bias, slab, tile)
    first = split * share
    last = tl.minimum(first + share, tiles_of(slab, tile))
    for k in range(first, last):
        place = tile_at(k, slab, tile)
        xhat = normalize_rows(x, residual, added, mean, rstd, slab, place, tile, ONE, EPS)
        if ONE:
            for t in range(T):
                task = of_task(t, T, slab)
                gate, shift = gates(weight, task, tile, SIGMOID), offsets(bias, task, tile)
                store(rows_in(y, task, False), xhat * gate + shift, task, place, tile)
        else:
            if CROWDED:
                shift = offsets(bias, slab, tile)
            store(rows_in(y, slab, False), xhat * gate + shift, slab, place, tile)


@triton.jit
def normalized(x, mean, rstd, slab, place, tile, ONE: tl.constexpr):
    """``xhat`` of a tile, and ``rstd`` of its rows."""
    scale = load_rows(rstd, slab, place, ONE)
    values = load(rows_in(x, slab, ONE), slab, place, tile)
    if mean is not None:
        values = within(values - load_rows(mean, slab, place, ONE), place, tile)
    return values * scale, scale


@triton.jit
def store_parameters(weight, dweight, dbias, dots, sums, slab, tile, SIGMOID: tl.constexpr):
    """Gradients of weight and bias, where asked for, from ``[1, B]`` sums of ``dy * xhat`` and ``dy``."""
    if dweight is not None:
        store_vector(dweight, dots * gate_slope(vector(weight, slab, tile), SIGMOID), slab)
    if dbias is not None:
        store_vector(dbias, sums, slab)


@triton.jit
def store_dx(dx, ds, gradient, xhat, scale, mean, slab, place, tile, ONE: tl.constexpr):
    """Writes the dx of a tile from the gradient of ``xhat``, with ``ds`` added."""
    if mean is None:
        result = gradient - xhat * row_mean(gradient * xhat, slab)
    else:
        average, slope = row_means(gradient, gradient * xhat, slab)
        result = gradient - average - xhat * slope
    result *= scale
    if ds is not None:
        result += load(rows_in(ds, slab, ONE), slab, place, tile)
    store(rows_in(dx, slab, ONE), result, slab, place, tile)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def layer_norm_backward(
    dy, ds, x, dx, weight, mean, rstd, dweight, dbias, T, N, S, splits, share, tile,
    C: tl.constexpr, ONE: tl.constexpr, PARTIAL: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """The gradients that are asked for of a split of a task's rows; ``ds`` is added to that of x.

    PARTIAL: ``dweight`` and ``dbias`` are ``[splits, T, C]``, and take the sums of ``dy * xhat`` and ``dy``. Where no
    dx is asked for no row needs to be whole, and a slab is a block of channels. The dx of ONE input is that of all
    tasks' dy: each tile meets them all, and the parameters' gradients are for another launch.
    """
    GATHERS: tl.constexpr = ONE and dx is not None
    split = tl.program_id(0) % splits
    slab = slab_at(tl.program_id(0) // splits, 1 if GATHERS else T, N, C, S, tile)
    dots = tl.zeros((tile.A, tile.B), tile.ACC)
    sums = tl.zeros((tile.A, tile.B), tile.ACC)
    if dx is not None and not GATHERS:
        gate = gates(weight, slab, tile, SIGMOID)
    first = split * share
    last = tl.minimum(first + share, tiles_of(slab, tile))
    for k in range(first, last):
        place = tile_at(k, slab, tile)
        if dx is not None or dweight is not None:
            xhat, scale = normalized(x, mean, rstd, slab, place, tile, ONE)
        if GATHERS:
            gradient = tl.zeros((tile.A, tile.B), tile.ACC)
            for t in range(T):
                task = of_task(t, T, slab)
                gate = gates(weight, task, tile, SIGMOID)
                gradient += load(rows_in(dy, task, False), task, place, tile) * gate
        else:
            gradient = load(rows_in(dy, slab, False), slab, place, tile)
            if dweight is not None:
                dots += gradient * xhat
            if dbias is not None:
                sums += gradient
            if dx is not None:
                gradient *= gate
        if dx is not None:
            store_dx(dx, ds, gradient, xhat, scale, mean, slab, place, tile, ONE)
    if PARTIAL:
        offset = split * (tl.cast(T, tl.int64) * C)
        if dweight is not None:
            store_vector(dweight + offset, total(dots, tile), slab)
        if dbias is not None:
            store_vector(dbias + offset, total(sums, tile), slab)
    else:
        store_parameters(weight, dweight, dbias, total(dots, tile), total(sums, tile), slab, tile, SIGMOID)


@triton.jit
def add_parts(parts, splits, slab, tile):
    """The sum ``[1, B]`` of what the splits left in ``[splits, T, C]``."""
    result = tl.zeros((LANES, tile.B), tile.ACC)
    for first in range(0, splits, LANES):
        index, i = splits_at(first, slab)
        result += tl.load(parts + index, mask=(i < splits) & (slab.channel < slab.C), other=0.0)
    return total(result, tile)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=UNALIGNED)
def layer_norm_parameters(
    weight, dweight, dbias, dots, sums, T, splits, tile, C: tl.constexpr, SIGMOID: tl.constexpr
):  # fmt: skip
    """The parameters' gradients in a task's block of channels, from the sums that the splits left."""
    slab = slab_at(tl.program_id(0), T, 1, C, 1, tile)
    if dots is not None:
        dots = add_parts(dots, splits, slab, tile)
    if sums is not None:
        sums = add_parts(sums, splits, slab, tile)
    store_parameters(weight, dweight, dbias, dots, sums, slab, tile, SIGMOID)


@triton.jit
def _add_three(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def three_row_means(a, b, c, slab):
    """Three means over each row by one exchange between threads."""
    a, b, c = tl.reduce((a, b, c), 1, _add_three, keep_dims=True)
    return a / slab.C, b / slab.C, c / slab.C


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["mean", "rstd", "factors", "partials"])
def layer_norm_double_backward(
    ddx, dy, x, ddy, ds, mean, rstd, factors, partials, T, N, S, splits, share, tile,
    C: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """Five tensors of dy's size are moved: ddx, dy and x are read once, ddy and ds are written, by splits of rows.

    They are those of :func:`tsbn_kernels.definition.layer_norm.layer_norm_double_backward`; ``factors [3, T, C]`` are
    its own, and a split leaves its two sums in ``partials [2, splits, T, C]``. A row stays in registers beside its six
    sums, which take two exchanges between threads. Of ONE input each task reads x and ddx, and has a ds of its own.
    """
    split = tl.program_id(0) % splits
    slab = slab_at(tl.program_id(0) // splits, T, N, C, S, tile)
    size = tl.cast(T, tl.int64) * C
    gate, slope = vector(factors, slab, tile), vector(factors + size, slab, tile)
    offset = vector(factors + 2 * size, slab, tile)
    rests, dots = tl.zeros((tile.A, tile.B), tile.ACC), tl.zeros((tile.A, tile.B), tile.ACC)
    first = split * share
    last = tl.minimum(first + share, tiles_of(slab, tile))
    for k in range(first, last):
        place = tile_at(k, slab, tile)
        xhat, scale = normalized(x, mean, rstd, slab, place, tile, ONE)
        rest = load(rows_in(ddx, slab, ONE), slab, place, tile)
        gradient = load(rows_in(dy, slab, False), slab, place, tile)
        average, along, slant = three_row_means(rest, rest * xhat, gradient * gate * xhat, slab)
        if mean is not None:
            rest -= average
        rest = (rest - xhat * along) * scale
        store(rows_in(ddy, slab, False), rest * gate + (xhat * slope + offset), slab, place, tile)
        rests += gradient * rest
        dots += gradient * xhat
        result = gradient * (slope - gate * (scale * along))
        average, bend, cross = three_row_means(result, result * xhat, gradient * gate * rest, slab)
        if mean is not None:
            result -= average
        result = (result - xhat * (bend + cross) - rest * slant) * scale
        store(rows_in(ds, slab, False), result, slab, place, tile)
    partials += split * size
    store_vector(partials, total(rests, tile), slab)
    store_vector(partials + splits * size, total(dots, tile), slab)
