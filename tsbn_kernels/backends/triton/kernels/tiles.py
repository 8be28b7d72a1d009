"""What the kernels share: how a slab is cut into tiles, loads and stores, sums over a tile, gates.

A slab is what has statistics of its own: one (task, channel) in the rows family; a task and a block of channels in the
columns family. A tile is ``[A, B]`` values of a slab, contiguous along B: samples by positions in rows, positions by
channels in columns. The vectors of a slab are scalars in rows and ``[1, B]`` in columns: one kernel serves both.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Arguments that a kernel is not compiled anew for: sizes that no access depends on, and the alignment of vectors.
COUNTS = ["T", "N", "splits", "share"]
VECTORS = ["weight", "bias", "mean", "var", "dweight", "dbias", "partials", "terms"]


class View(NamedTuple):
    """An activation ``[T, N, C, S]``: its first value and its strides in elements."""

    data: Any
    t: Any
    n: Any
    c: Any
    s: Any


class Tile(NamedTuple):
    """What a kernel is compiled for."""

    COLUMNS: tl.constexpr
    A: tl.constexpr
    B: tl.constexpr
    FULL_A: tl.constexpr  # no tile ends within A
    FULL_B: tl.constexpr
    EVEN: tl.constexpr  # both: every tile is full
    TASKS_INNER: tl.constexpr  # programs that follow one another differ in the task: they read the same shared input
    INDEX: tl.constexpr  # of positions: int64 where a slab has 2^31 values and more
    OFFSET: tl.constexpr  # of values from the slab's first one
    RUN: tl.constexpr  # a power of two up to 16: each run along B begins and ends at a multiple of so many values
    HELD: tl.constexpr  # values of a thread, at least 1
    ACC: tl.constexpr  # of the arithmetic
    ACTIVATION: tl.constexpr  # that follows the layer, or "none"
    EXPONENTIAL: tl.constexpr  # it has one
    SLOPE: tl.constexpr  # of a leaky ReLU
    VALUE: Any  # the functions of its row in activations.py; inside a constexpr their source would be in no cache's key
    GRADIENT: Any


class Slab(NamedTuple):
    """The task and the channels of a slab (one, or ``[1, B]``), and the sizes of the view."""

    t: Any
    channel: Any
    T: Any
    N: Any
    C: Any
    S: Any


class Place(NamedTuple):
    """Sample and position of each value of a tile, and which of them exist."""

    n: Any
    s: Any
    inside: Any
    real: Any  # 1 or 0: whether the sample and the position exist; one shape for all channels of a column


_LOG2_E = tl.constexpr(1.4426950408889634)
_LN2_HIGH = tl.constexpr(0.693359375)  # 9 bits: its multiples by an exponent are exact
_LN2_LOW = tl.constexpr(-2.12194440054690583e-4)


@triton.jit
def slab_at(index, T, N, C, S, tile):
    """The slab of a program."""
    block: tl.constexpr = tile.B if tile.COLUMNS else 1
    blocks = tl.cdiv(C, block)
    if tile.TASKS_INNER:
        t = index % T
        c = index // T
    else:
        t = index // blocks
        c = index % blocks
    channel = c * block + tl.arange(0, block)[None, :] if tile.COLUMNS else c
    return Slab(t, channel, T, N, C, S)


@triton.jit
def program_from_last():
    """The number of a program, counted from the last one: it begins with what the launch before this one read last."""
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def tiles_of(slab, tile):
    """The number of tiles of a slab."""
    if tile.COLUMNS:
        return tl.cdiv(tl.cast(slab.N, tile.INDEX) * slab.S, tile.A).to(tl.int32)
    return tl.cast(tl.cdiv(slab.N, tile.A) * tl.cdiv(slab.S, tile.B), tl.int32)


@triton.jit
def whole_runs(values, tile):
    """The values, multiples of RUN, in a form that says so: a hint may outlive the shape that it was given for."""
    return values // tile.RUN * tile.RUN if tile.RUN > 1 and tile.RUN < 16 else values


@triton.jit
def tile_at(k, slab, tile):
    """The place of tile ``k``."""
    if tile.COLUMNS:
        values = tl.cast(slab.N, tile.INDEX) * slab.S
        start = tl.cast(k, tile.INDEX) * tile.A
        p = start + tl.arange(0, tile.A)[:, None]
        n = p // slab.S
        s = p - n * slab.S
        exists = p < values
        inside = exists if tile.FULL_B else exists & (slab.channel < whole_runs(slab.C, tile))
    else:
        runs = tl.cdiv(slab.S, tile.B)
        row = k // runs * tile.A
        start = tl.cast(k % runs, tile.INDEX) * tile.B
        n = row + tl.arange(0, tile.A)[:, None]
        s = start + tl.arange(0, tile.B)[None, :]
        if tile.FULL_A:
            exists = s < whole_runs(slab.S, tile)
        elif tile.FULL_B:
            exists = n < slab.N
        else:
            exists = (n < slab.N) & (s < whole_runs(slab.S, tile))
        inside = exists
    real = tl.full((1, 1), 1.0, tile.ACC) if tile.EVEN else exists.to(tile.ACC)
    return Place(n, s, inside, real)


@triton.jit
def pointers(view, slab, place, tile):
    """Where the values of a tile lie. The slab's own offset has 64 bits, for activations of 2^31 elements and more."""
    before = slab.t.to(tl.int64) * view.t
    n, s, channel = place.n.to(tile.OFFSET), place.s.to(tile.OFFSET), slab.channel
    runs = n * whole_runs(view.n, tile)
    if tile.COLUMNS:
        runs += s * whole_runs(view.s, tile)
        along = channel.to(tile.OFFSET) * view.c
    else:
        before += channel.to(tl.int64) * view.c
        along = s * view.s
    return view.data + whole_runs(before, tile) + (runs + along).to(tl.int64)


@triton.jit
def load(view, slab, place, tile):
    """The values of a tile, zero where there are none."""
    if tile.EVEN:
        values = tl.load(pointers(view, slab, place, tile))
    else:
        values = tl.load(pointers(view, slab, place, tile), mask=place.inside, other=0.0)
    return values.to(tile.ACC)


@triton.jit
def store(view, values, slab, place, tile):
    """Writes the values of a tile, rounded to the dtype of the view."""
    values = values.to(view.data.dtype.element_ty)
    if tile.EVEN:
        tl.store(pointers(view, slab, place, tile), values)
    else:
        tl.store(pointers(view, slab, place, tile), values, mask=place.inside)


@triton.jit
def within(values, place, tile):
    """The values of a tile, zero where there are none."""
    return values if tile.EVEN else tl.where(place.inside, values, 0.0)


@triton.jit
def vector(data, slab, tile):
    """The channels' values of a ``[T, C]`` tensor."""
    index = slab.t.to(tl.int64) * slab.C + slab.channel
    return tl.load(data + index, mask=slab.channel < slab.C, other=0.0).to(tile.ACC)


@triton.jit
def store_vector(data, values, slab):
    """Writes the channels' values of a ``[T, C]`` tensor."""
    index = slab.t.to(tl.int64) * slab.C + slab.channel
    tl.store(data + index, values.to(data.dtype.element_ty), mask=slab.channel < slab.C)


@triton.jit
def total(values, tile):
    """The sum over a tile, a channel: in rows over all of it as one axis."""
    return tl.sum(values, 0, keep_dims=True) if tile.COLUMNS else tl.sum(values)


@triton.jit
def _add(a, b, c, d):
    return a + c, b + d


@triton.jit
def totals(a, b, tile):
    """Two such sums by one exchange through shared memory.

    In rows each thread adds up its own values before the two lie side by side and are summed as one: Triton 3.7 and 3.8
    pair values wrongly where several operands of a reduction are first reshaped to one axis.
    """
    if tile.COLUMNS:
        a, b = tl.reduce((a, b), 0, _add, keep_dims=True)
    else:
        a, b = tl.split(tl.sum(tl.join(of_threads(a, tile), of_threads(b, tile)), 0))
    return a, b


@triton.jit
def of_threads(values, tile):
    """The sums of each thread's values."""
    held: tl.constexpr = min(tile.HELD, values.shape[0] * values.shape[1])
    return tl.sum(tl.reshape(values, [values.shape[0] * values.shape[1] // held, held], can_reorder=True), 1)


@triton.jit
def exponential(x):
    """``exp(x)`` to two units in the last place: the hardware's alone loses digits where |x| is large."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    power = tl.floor(x * _LOG2_E + 0.5)
    return tl.exp((x - power * _LN2_HIGH) - power * _LN2_LOW) * tl.exp2(power)


@triton.jit
def gate_value(weight, SIGMOID: tl.constexpr):
    """The gate: ``sigmoid(weight)`` or ``weight``."""
    return 1.0 / (1.0 + exponential(-weight)) if SIGMOID else weight


@triton.jit
def gate_slope(weight, SIGMOID: tl.constexpr):
    """Its derivative; ``1 - sigmoid`` is ``sigmoid(-weight)``, which keeps its digits."""
    return gate_value(weight, True) * gate_value(-weight, True) if SIGMOID else 1.0
