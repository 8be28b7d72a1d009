"""The kernels of mixed batches: programs walk the samples of one task through an order of the batch.

A program has a block of samples of one task, as many as are one tile, in one channel or a block of channels; no block
is longer, whatever the mix. What blocks leave of sums lies by tasks, each ``[sums, blocks, C]``, one after the other. A
launch of one program for each task and block of channels adds them in their order.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from tsbn_kernels.backends.triton.kernels import backward, forward
from tsbn_kernels.backends.triton.kernels.running import TRACKED, track, tracked
from tsbn_kernels.backends.triton.kernels.statistics import add_splits, merge_splits, tile_statistics
from tsbn_kernels.backends.triton.kernels.tiles import (
    COUNTS,
    VECTORS,
    Place,
    Slab,
    gate_value,
    load,
    program_from_last,
    slab_at,
    store,
    store_vector,
    totals,
    vector,
    within,
)

UNALIGNED = [*VECTORS, "rest", "slopes", "offsets", "before", "keys"]
_FIRST, _SECOND, _STEP = (
    tl.constexpr(0x3C6EF372FE94F82B),
    tl.constexpr(0x369DEA0F31A53F85),
    tl.constexpr(0x27BB2EE687B0B0FD),
)


class Mix(NamedTuple):
    """Where the samples of each task are; int64, on the device. The last task of the four vectors has no sample."""

    order: Any  # [N] samples, those of a task one after the other
    task: Any  # [G] of each block, T of those that are too many
    samples: Any  # [T+1] how many a task has
    sample: Any  # [T+1] where they begin in the order
    blocks: Any  # [T+1] how many a task has
    block: Any  # [T+1] its first one


class Block(NamedTuple):
    """A block of samples: which of its task's, and where they begin in the order."""

    number: Any
    sample: Any


@triton.jit
def block_at(index, mix, C, S, tile, SAMPLES: tl.constexpr):
    """The slab of a program and its block; no samples where there are more programs than blocks."""
    width: tl.constexpr = tile.B if tile.COLUMNS else 1
    widths = tl.cdiv(C, width)
    c = index % widths
    t = tl.load(mix.task + index // widths)
    number = index // widths - tl.load(mix.block + t)
    before = number * SAMPLES
    samples = tl.minimum(tl.load(mix.samples + t) - before, SAMPLES)
    channel = c * width + tl.arange(0, width)[None, :] if tile.COLUMNS else c
    return Slab(t, channel, 1, samples, C, S), Block(number, tl.load(mix.sample + t) + before)


@triton.jit
def place_of(block, mix, slab, tile):
    """The place of the one tile of a block."""
    a = tl.arange(0, tile.A)[:, None]
    if tile.COLUMNS:
        n = a // slab.S
        s = a - n * slab.S
    else:
        n = a
        s = tl.arange(0, tile.B)[None, :]
    exists = (n < slab.N) & (s < slab.S)
    sample = tl.load(mix.order + block.sample + n, mask=n < slab.N, other=0)
    return Place(sample, s, exists & (slab.channel < slab.C), exists.to(tile.ACC))


@triton.jit
def row_of(index, slab):
    """The slab in row ``index`` of what is ``[rows, C]``."""
    return Slab(index, slab.channel, 1, slab.N, slab.C, slab.S)


@triton.jit
def store_part(partials, values, k, block, parts, mix, slab):
    """Leaves sum ``k`` of ``parts`` of a block."""
    first = tl.load(mix.block + slab.t) * parts + tl.load(mix.blocks + slab.t) * k
    store_vector(partials, values, row_of(first + block.number, slab))


@triton.jit
def parts_of(partials, parts, mix, slab):
    """What the blocks of a task left, their number, and the slab in it."""
    blocks = tl.load(mix.blocks + slab.t).to(tl.int32)
    data = partials + tl.load(mix.block + slab.t) * parts * slab.C
    return data, blocks, row_of(tl.cast(slab.t * 0, tl.int64), slab)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=UNALIGNED)
def mixed_keys(words, before, keys, N, outer, inner, tile):
    """A key of each sample, which its bits alone give: words ``[N, outer, inner]`` of integers.

    Sums of what each word becomes by its place, modulo 2^64; ``before`` are the keys of other tensors.
    """
    n = tl.program_id(0).to(tl.int64) * tile.A + tl.arange(0, tile.A)[:, None]
    total = tl.zeros((tile.A, 1), tl.uint64)
    for o in range(outer):
        for first in range(0, inner, tile.B):
            i = first + tl.arange(0, tile.B)[None, :]
            inside = (n < N) & (i < inner)
            slab = Slab(tl.cast(0, tl.int64), tl.cast(o, tl.int64), 1, N, outer, inner)
            values = load(words, slab, Place(n, i, inside, inside), tile).to(tl.uint64, bitcast=True)
            place = (slab.channel * inner + i).to(tl.uint64, bitcast=True)
            values = (values ^ (place * _STEP + _SECOND)) * _FIRST
            values = (values ^ (values >> 32)) * _SECOND
            values ^= values >> 29
            total += tl.sum(tl.where(inside, values, 0), 1, keep_dims=True)
    if before is not None:
        total += tl.load(before + n, mask=n < N, other=0).to(tl.uint64, bitcast=True) * _STEP
    tl.store(keys + n, total.to(tl.int64, bitcast=True), mask=n < N)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=UNALIGNED)
def mixed_partial(x, partials, mix, C, S, tile, SAMPLES: tl.constexpr):
    """Mean, rest, squared deviations and count of a block."""
    slab, block = block_at(tl.program_id(0), mix, C, S, tile, SAMPLES)
    if slab.N > 0:
        place = place_of(block, mix, slab, tile)
        _, about, rest, squares, count = tile_statistics(load(x, slab, place, tile), place, slab, tile)
        store_part(partials, about, 0, block, 4, mix, slab)
        store_part(partials, rest, 1, block, 4, mix, slab)
        store_part(partials, squares, 2, block, 4, mix, slab)
        store_part(partials, count, 3, block, 4, mix, slab)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=[*TRACKED, "rest"])
def mixed_statistics(
    partials, mean, rest, var, running_mean, running_var, batches, momentum, rows, mix, T, C, S, tile
):  # fmt: skip
    """Mean, rest of the mean and variance of a task in a block of channels; 0 of a task without a sample.

    The running statistics that are given are updated, but those of a task without a sample.
    """
    slab = slab_at(tl.program_id(0), T, 1, C, 1, tile)
    data, blocks, own = parts_of(partials, 4, mix, slab)
    zero = tl.zeros((1, tile.B), tile.ACC)
    average, lost, variance = zero, zero, zero
    if blocks > 0:
        average, lost, variance = merge_splits(data, blocks, own, tile)
        sampled = Slab(slab.t, slab.channel, T, tl.load(mix.samples + slab.t), C, S)
        before = tracked(running_mean, running_var, batches, momentum, rows, sampled, tile)
        track(running_mean, running_var, before, average, variance, sampled, tile)
    store_vector(mean, average, slab)
    store_vector(rest, lost, slab)
    store_vector(var, variance, slab)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=UNALIGNED)
def mixed_forward(
    x, residual, y, weight, bias, mean, rest, var, mix, C, S, tile,
    SAMPLES: tl.constexpr, EPS: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """Y of a block, by the statistics of its task; ``rest`` is None where they are given."""
    slab, block = block_at(program_from_last(), mix, C, S, tile, SAMPLES)
    if slab.N > 0:
        place = place_of(block, mix, slab, tile)
        lost = None if rest is None else vector(rest, slab, tile)
        gate, shift = forward.parameters(weight, bias, slab, tile, SIGMOID)
        scale, offset = forward.coefficients(gate, shift, lost, vector(var, slab, tile), EPS)
        deviation = load(x, slab, place, tile) - vector(mean, slab, tile)
        forward.store_outcome(y, deviation, residual, scale, offset, slab, place, tile)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=UNALIGNED)
def mixed_backward(
    dy, x, residual, dx, dresidual, weight, bias, mean, var, partials, mix, C, S, tile,
    SAMPLES: tl.constexpr, EPS: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """The two sums of a block, and what else is given to be written: the gradients of x and residual in evaluation."""
    slab, block = block_at(tl.program_id(0), mix, C, S, tile, SAMPLES)
    if slab.N > 0:
        place = place_of(block, mix, slab, tile)
        _, average, _, scale, shift = backward.normalization(weight, bias, mean, var, slab, tile, EPS, SIGMOID)
        gradient, deviation = backward.gradient_at(dy, x, residual, slab, place, average, scale, shift, tile)
        if partials is not None:
            sums, dots = totals(gradient, gradient * within(deviation, place, tile), tile)
            store_part(partials, sums, 0, block, 2, mix, slab)
            store_part(partials, dots, 1, block, 2, mix, slab)
        if dresidual is not None:
            store(dresidual, gradient, slab, place, tile)
        if dx is not None:
            store(dx, gradient * scale, slab, place, tile)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=UNALIGNED)
def mixed_sums(
    weight, var, dweight, dbias, slopes, offsets, partials, mix, T, C, S, tile, EPS: tl.constexpr, SIGMOID: tl.constexpr
):  # fmt: skip
    """The parameters' gradients of a task in a block of channels, 0 without a sample, and what dx is made of."""
    slab = slab_at(tl.program_id(0), T, 1, C, S, tile)
    data, blocks, own = parts_of(partials, 2, mix, slab)
    zero = tl.zeros((1, tile.B), tile.ACC)
    sums, dots, raw = zero, zero, zero
    if blocks > 0:
        sums, dots = add_splits(data, blocks, own, tile)
        raw = vector(weight, slab, tile)
    rstd = tl.rsqrt(vector(var, slab, tile) + EPS)
    backward.store_parameters(raw, dweight, dbias, sums, dots, rstd, slab, SIGMOID)
    if slopes is not None:
        samples = tl.maximum(tl.load(mix.samples + slab.t), 1)
        scale = gate_value(raw, SIGMOID) * rstd
        slope, offset = backward.coefficients(
            sums, dots, rstd, scale, Slab(slab.t, slab.channel, T, samples, C, S), tile
        )
        store_vector(slopes, slope, slab)
        store_vector(offsets, offset, slab)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=UNALIGNED)
def mixed_gradient(
    dy, x, residual, dx, dresidual, weight, bias, mean, var, slopes, offsets, mix, C, S, tile,
    SAMPLES: tl.constexpr, EPS: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """The gradients of x and, where asked for, of the residual of a block in training."""
    slab, block = block_at(program_from_last(), mix, C, S, tile, SAMPLES)
    if slab.N > 0:
        place = place_of(block, mix, slab, tile)
        _, average, _, scale, shift = backward.normalization(weight, bias, mean, var, slab, tile, EPS, SIGMOID)
        gradient, deviation = backward.gradient_at(dy, x, residual, slab, place, average, scale, shift, tile)
        if dresidual is not None:
            store(dresidual, gradient, slab, place, tile)
        result = gradient * scale + deviation * vector(slopes, slab, tile) + vector(offsets, slab, tile)
        store(dx, result, slab, place, tile)
