"""The kernels of one input that all tasks share: x is ``[N, C, S]``, the other activations are ``[T, N, C, S]``.

A slab is a channel of x, or a block of channels. A program reads a tile of x once and goes through the tasks with it;
to the view of x there is a single task.
"""

import triton
import triton.language as tl

from tsbn_kernels.backends.triton.kernels import backward, forward
from tsbn_kernels.backends.triton.kernels.epilogue import through
from tsbn_kernels.backends.triton.kernels.running import TRACKED, track, tracked
from tsbn_kernels.backends.triton.kernels.statistics import add_splits, merge_splits, tile_statistics
from tsbn_kernels.backends.triton.kernels.tiles import (
    COUNTS,
    VECTORS,
    Slab,
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
def of_task(t, T, slab):
    """The slab of a task's activations that a slab of x belongs to."""
    return Slab(tl.cast(t, tl.int64), slab.channel, T, slab.N, slab.C, slab.S)


@triton.jit
def store_statistics(
    mean, var, running_mean, running_var, batches, momentum, rows, average, variance, T, slab, tile
):  # fmt: skip
    """Writes the statistics of x for every task, and updates the running ones."""
    for t in range(T):
        task = of_task(t, T, slab)
        store_vector(mean, average, task)
        store_vector(var, variance, task)
        before = tracked(running_mean, running_var, batches, momentum, rows, task, tile)
        track(running_mean, running_var, before, average, variance, task, tile)


@triton.jit
def store_outcomes(
    values, residual, y, weight, bias, mean, var, average, rest, variance, T, slab, place, tile,
    EPS: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """Writes y of every task for a tile of x, by the statistics of x, or by the tasks' own where there are none."""
    for t in range(T):
        task = of_task(t, T, slab)
        gate, shift = forward.parameters(weight, bias, task, tile, SIGMOID)
        if average is None:
            deviation = values - vector(mean, task, tile)
            scale, offset = forward.coefficients(gate, shift, None, vector(var, task, tile), EPS)
        else:
            deviation = values - average
            scale, offset = forward.coefficients(gate, shift, rest, variance, EPS)
        forward.store_outcome(y, deviation, residual, scale, offset, task, place, tile)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=TRACKED)
def fan_out_slab(
    x, residual, y, weight, bias, mean, var, running_mean, running_var, batches, momentum, rows, T, N, C, S, tile,
    EPS: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """Statistics and every task's y of a slab of x that is one tile, which stays in registers."""
    slab = slab_at(tl.program_id(0), 1, N, C, S, tile)
    place = tile_at(0, slab, tile)
    values = load(x, slab, place, tile)
    _, about, rest, squares, count = tile_statistics(values, place, slab, tile)
    variance = squares / count
    store_statistics(
        mean, var, running_mean, running_var, batches, momentum, rows, about + rest, variance, T, slab, tile
    )
    store_outcomes(
        values, residual, y, weight, bias, mean, var, about, rest, variance, T, slab, place, tile, EPS, SIGMOID
    )


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=TRACKED)
def fan_out_apply(
    x, residual, y, weight, bias, mean, var, running_mean, running_var, batches, momentum, rows, partials,
    T, N, C, S, splits, share, tile, EPS: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """Every task's y of a split, by the statistics that ``partials`` give, or by those given where there are none."""
    program = program_from_last()
    split = program % splits
    slab = slab_at(program // splits, 1, N, C, S, tile)
    if partials is None:
        average, rest, variance = None, None, None
    else:
        average, rest, variance = merge_splits(partials, splits, slab, tile)
        if split == 0:
            store_statistics(
                mean, var, running_mean, running_var, batches, momentum, rows, average, variance, T, slab, tile
            )
    first = split * share
    last = tl.minimum(first + share, tiles_of(slab, tile))
    for i in range(first, last):
        place = tile_at(first + last - 1 - i, slab, tile)
        values = load(x, slab, place, tile)
        store_outcomes(
            values, residual, y, weight, bias, mean, var, average, rest, variance, T, slab, place, tile, EPS, SIGMOID
        )


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=VECTORS)
def fan_out_gather(
    dy, x, residual, dx, dresidual, weight, bias, mean, var, dweight, dbias, partials, T, N, C, S, splits, tile,
    SUMS: tl.constexpr, TRAINING: tl.constexpr, EPS: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """Goes through the tasks with a tile of x: the sum of their gradients of x stays in registers; SUMS of each task.

    With ``partials`` the sums go to ``[2, splits, T, C]``, and ``dx`` lacks in training what the statistics add to it.
    Without, the slab is one tile, or nothing is summed: dx is whole.
    """
    split = tl.program_id(0) % splits
    slab = slab_at(tl.program_id(0) // splits, 1, N, C, S, tile)
    place = tile_at(split, slab, tile)
    if SUMS or tile.ACTIVATION != "none":
        values = load(x, slab, place, tile)
    gathered = tl.zeros((tile.A, tile.B), tile.ACC)
    slope = tl.zeros((1, tile.B if tile.COLUMNS else 1), tile.ACC)
    offset = slope
    for t in range(T):
        task = of_task(t, T, slab)
        raw, average, rstd, scale, shift = backward.normalization(weight, bias, mean, var, task, tile, EPS, SIGMOID)
        gradient = load(dy, task, place, tile)
        if SUMS or tile.ACTIVATION != "none":
            deviation = values - average
            gradient = through(gradient, values, deviation, residual, scale, shift, task, place, tile)
        if dresidual is not None:
            store(dresidual, gradient, task, place, tile)
        gathered += gradient * scale
        if SUMS:
            sums, dots = totals(gradient, gradient * within(deviation, place, tile), tile)
            if partials is None:
                backward.store_parameters(raw, dweight, dbias, sums, dots, rstd, task, SIGMOID)
                slopes, offsets = backward.coefficients(sums, dots, rstd, scale, task, tile)
                slope += slopes
                offset += offsets
            else:
                size = tl.cast(T, tl.int64) * C
                store_vector(partials + split * size, sums, task)
                store_vector(partials + (split + splits) * size, dots, task)
    if dx is not None:
        if SUMS and TRAINING and partials is None:
            gathered += (values - vector(mean, slab, tile)) * slope + offset
        store(dx, gathered, slab, place, tile)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=VECTORS)
def fan_out_sums(
    weight, mean, var, dweight, dbias, partials, terms, T, N, C, S, splits, tile,
    EPS: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """Adds what the splits leave for a task: the parameters' gradients, and what it adds to dx into ``[2, T, C]``."""
    slab = slab_at(tl.program_id(0), T, N, C, S, tile)
    raw, _, rstd, scale, _ = backward.normalization(weight, None, mean, var, slab, tile, EPS, SIGMOID)
    sums, dots = add_splits(partials, splits, slab, tile)
    backward.store_parameters(raw, dweight, dbias, sums, dots, rstd, slab, SIGMOID)
    if terms is not None:
        slope, offset = backward.coefficients(sums, dots, rstd, scale, slab, tile)
        store_vector(terms, slope, slab)
        store_vector(terms + tl.cast(T, tl.int64) * C, offset, slab)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=VECTORS)
def fan_out_gradient(x, gathered, dx, mean, terms, T, N, C, S, splits, tile):
    """Dx of a split in training: the gathered gradients, and what the tasks' sums add."""
    program = program_from_last()
    slab = slab_at(program // splits, 1, N, C, S, tile)
    place = tile_at(program % splits, slab, tile)
    slope, offset = add_splits(terms, T, slab, tile)  # as if each task had been a split of one
    deviation = load(x, slab, place, tile) - vector(mean, slab, tile)
    store(dx, load(gathered, slab, place, tile) + deviation * slope + offset, slab, place, tile)
