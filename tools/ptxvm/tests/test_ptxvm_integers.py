"""Integer and bit instructions against numpy and Python integers."""

from __future__ import annotations

import numpy as np
import pytest

from tools.ptxvm.tests.ptxvm_bench import evaluate

RANDOM = np.random.default_rng(0)
TYPES = {"u16": np.uint16, "s16": np.int16, "u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64}


def numbers(kind: str, count: int = 200) -> np.ndarray:
    info = np.iinfo(TYPES[kind])
    corners = [
        v for v in (0, 1, 2, -1, -2, 7, info.max, info.min, info.max - 1, info.min + 1) if info.min <= v <= info.max
    ]
    repeated = np.repeat(np.array(corners, TYPES[kind]), len(corners))
    return np.concatenate([repeated, RANDOM.integers(info.min, info.max, count, TYPES[kind])])


def pairs(kind: str) -> tuple[np.ndarray, np.ndarray]:
    a = numbers(kind)
    count = round((len(a) - 200) ** 0.5)
    b = a.copy()
    b[: count * count] = np.tile(a[: count * count : count], count)
    b[count * count :] = RANDOM.permutation(b[count * count :])
    return a, b


def wrap(value: int, kind: str) -> int:
    width = int(kind[1:])
    value &= (1 << width) - 1
    return value - (1 << width) if kind[0] == "s" and value >> width - 1 else value


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


BINARY = {
    "add.{}": lambda a, b, k: a + b,
    "sub.{}": lambda a, b, k: a - b,
    "mul.lo.{}": lambda a, b, k: a * b,
    "mul.hi.{}": lambda a, b, k: a * b >> int(k[1:]),
    "div.{}": lambda a, b, k: truncated(a, b) if b else None,
    "rem.{}": lambda a, b, k: a - b * truncated(a, b) if b else None,
    "min.{}": lambda a, b, k: min(a, b),
    "max.{}": lambda a, b, k: max(a, b),
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("form", BINARY)
def test_binary(form: str, kind: str) -> None:
    a, b = pairs(kind)
    result = evaluate(form.format(kind) + " d, a, b;", a, b, out=TYPES[kind])
    for x, y, got in zip(a.tolist(), b.tolist(), result.tolist(), strict=True):
        want = BINARY[form](x, y, kind)
        assert want is None or got == wrap(want, kind), f"{form.format(kind)} {x}, {y}: {got}"


@pytest.mark.parametrize("kind", TYPES)
def test_mad_neg_abs_sad(kind: str) -> None:
    a, b = pairs(kind)
    c = a[::-1].copy()
    run = lambda text: evaluate(text.format(kind) + ";", a, b, c, out=TYPES[kind]).tolist()  # noqa: E731
    low, high, sad = run("mad.lo.{} d, a, b, c"), run("mad.hi.{} d, a, b, c"), run("sad.{} d, a, b, c")
    for k, (x, y, z) in enumerate(zip(a.tolist(), b.tolist(), c.tolist(), strict=True)):
        assert low[k] == wrap(x * y + z, kind)
        assert high[k] == wrap((x * y >> int(kind[1:])) + z, kind)
        assert sad[k] == wrap(abs(x - y) + z, kind)
    if kind[0] == "s":
        assert run("neg.{} d, a") == [wrap(-x, kind) for x in a.tolist()]
        assert run("abs.{} d, a") == [wrap(abs(x), kind) for x in a.tolist()]


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_wide_products(kind: str) -> None:
    a, b = pairs(kind)
    wide = kind[0] + str(2 * int(kind[1:]))
    product = evaluate(f"mul.wide.{kind} d, a, b;", a, b, out=TYPES[wide]).tolist()
    assert product == [wrap(x * y, wide) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    c = numbers(wide)[: len(a)]
    c = np.resize(c, len(a))
    total = evaluate(f"mad.wide.{kind} d, a, b, c;", a, b, c, out=TYPES[wide]).tolist()
    assert total == [wrap(x * y + z, wide) for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]


@pytest.mark.parametrize("kind", TYPES)
def test_shifts_clamp(kind: str) -> None:
    a = numbers(kind)
    width = int(kind[1:])
    for n in (0, 1, 5, width - 1, width, width + 1, 200):
        right = evaluate(f"shr.{kind} d, a, {n};", a, out=TYPES[kind]).tolist()
        left = evaluate(f"shl.b{width} d, a, {n};", a, out=TYPES[kind]).tolist()
        for x, r, s in zip(a.tolist(), right, left, strict=True):
            assert r == x >> n
            assert s == wrap(x << n, kind)


@pytest.mark.parametrize("width", [16, 32, 64])
def test_bitwise(width: int) -> None:
    kind = f"u{width}"
    a, b = pairs(kind)
    for name, reference in {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}.items():
        assert (evaluate(f"{name}.b{width} d, a, b;", a, b, out=TYPES[kind]) == reference(a, b)).all()
    assert (evaluate(f"not.b{width} d, a;", a, out=TYPES[kind]) == ~a).all()
    assert (evaluate(f"cnot.b{width} d, a;", a, out=TYPES[kind]) == (a == 0)).all()


@pytest.mark.parametrize("width", [32, 64])
def test_counting_and_fields(width: int) -> None:
    kind, signed = f"u{width}", f"s{width}"
    a, b = pairs(kind)
    ones = evaluate(f"popc.b{width} d, a;", a).tolist()
    zeros = evaluate(f"clz.b{width} d, a;", a).tolist()
    mirrored = evaluate(f"brev.b{width} d, a;", a, out=TYPES[kind]).tolist()
    for k, x in enumerate(a.tolist()):
        assert ones[k] == x.bit_count()
        assert zeros[k] == width - x.bit_length()
        assert mirrored[k] == int(f"{x:0{width}b}"[::-1], 2)
    for start, length in [
        (0, 0),
        (0, 8),
        (5, 7),
        (width - 1, 1),
        (width - 4, 9),
        (width, 3),
        (0, width),
        (3, 255),
        (255, 255),
    ]:
        field = evaluate(f"bfe.{kind} d, a, {start}, {length};", a, out=TYPES[kind]).tolist()
        extended = evaluate(f"bfe.{signed} d, a, {start}, {length};", a, out=TYPES[signed]).tolist()
        inserted = evaluate(f"bfi.b{width} d, a, b, {start}, {length};", a, b, out=TYPES[kind]).tolist()
        for k, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
            # The ISA's loops over bits.
            top = min(start + length - 1, width - 1)
            sign = length > 0 and x >> top & 1
            plain, spread, into = 0, 0, y
            for position in range(width):
                inside = position < length and start + position < width
                bit = x >> start + position & 1 if inside else 0
                plain |= bit << position
                spread |= (bit if inside else sign) << position
            for position in range(length):
                if start + position < width:
                    into = into & ~(1 << start + position) | (x >> position & 1) << start + position
            assert field[k] == plain
            assert extended[k] == wrap(spread, signed)
            assert inserted[k] == into


def test_lop3_is_the_truth_table() -> None:
    a, b, c = (RANDOM.integers(0, 2**32, 50, np.uint64).astype(np.uint32) for _ in range(3))
    for table in (0, 0x80, 0xEA, 0x96, 0x1E, 0xFF, 0x78):
        result = evaluate(f"lop3.b32 d, a, b, c, {table:#x};", a, b, c).tolist()
        for x, y, z, got in zip(a.tolist(), b.tolist(), c.tolist(), result, strict=True):
            want = sum((table >> (x >> k & 1) * 4 + (y >> k & 1) * 2 + (z >> k & 1) & 1) << k for k in range(32))
            assert got == want


def test_prmt_picks_bytes_and_signs() -> None:
    a, b = np.array([0x83828180], np.uint32), np.array([0x07060504], np.uint32)
    for selector, want in {
        0x3210: 0x83828180,
        0x7654: 0x07060504,
        0x0123: 0x80818283,
        0x4444: 0x04040404,
        0x8C90: 0xFF00FF80,
    }.items():
        assert int(evaluate(f"prmt.b32 d, a, b, {selector:#x};", a, b)[0]) == want


def test_funnel_shifts() -> None:
    a, b = np.array([0x89ABCDEF], np.uint32), np.array([0x01234567], np.uint32)
    both = 0x0123456789ABCDEF
    for n in (0, 4, 31, 32, 36):
        for mode, shift in {"wrap": n & 31, "clamp": min(n, 32)}.items():
            assert int(evaluate(f"shf.l.{mode}.b32 d, a, b, {n};", a, b)[0]) == both << shift >> 32 & 0xFFFFFFFF
            assert int(evaluate(f"shf.r.{mode}.b32 d, a, b, {n};", a, b)[0]) == both >> shift & 0xFFFFFFFF


@pytest.mark.parametrize("kind", TYPES)
def test_comparisons(kind: str) -> None:
    a, b = pairs(kind)
    relations = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    }
    if kind[0] == "u":
        relations |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
    for name, reference in relations.items():
        assert (evaluate(f"setp.{name}.{kind} p, a, b; selp.u32 d, 1, 0, p;", a, b) == reference(a, b)).all(), name
    assert (evaluate(f"set.gt.u32.{kind} d, a, b;", a, b) == np.where(a > b, 0xFFFFFFFF, 0)).all()


def test_setp_combines_with_a_predicate() -> None:
    a, b = np.array([1, 1, 2, 2], np.uint32), np.array([0, 1, 0, 1], np.uint32)
    expected = {"and": [0, 1, 0, 0], "or": [1, 1, 0, 1], "xor": [1, 0, 0, 1]}
    for name, want in expected.items():
        text = f"setp.ne.u32 q, b, 0; setp.eq.{name}.u32 p, a, 1, q; selp.u32 d, 1, 0, p;"
        assert evaluate(text, a, b).tolist() == want
    negated = "setp.ne.u32 q, b, 0; setp.eq.and.u32 p, a, 1, !q; selp.u32 d, 1, 0, p;"
    assert evaluate(negated, a, b).tolist() == [1, 0, 0, 0]


def test_predicate_logic_and_guards() -> None:
    a, b = np.array([0, 0, 1, 1], np.uint32), np.array([0, 1, 0, 1], np.uint32)
    start = "setp.ne.u32 p, a, 0; setp.ne.u32 q, b, 0; "
    for name, reference in {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.items():
        assert (evaluate(start + f"{name}.pred p, p, q; selp.u32 d, 1, 0, p;", a, b) == reference(a, b)).all()
    assert evaluate(start + "not.pred p, p; mov.u32 d, 5; @p mov.u32 d, 6; @!q add.u32 d, d, 10;", a, b).tolist() == [
        16,
        6,
        15,
        5,
    ]


@pytest.mark.parametrize("source", ["u8", "s8", *TYPES])
@pytest.mark.parametrize("target", ["u8", "s8", *TYPES])
def test_integer_conversions(source: str, target: str) -> None:
    dtype = np.dtype({"u8": np.uint8, "s8": np.int8}.get(source, TYPES.get(source)))
    info = np.iinfo(dtype)
    x = np.unique(
        np.array(
            [
                v
                for v in (0, 1, -1, 127, 128, 255, 256, -128, -129, 65535, 2**31, info.max, info.min)
                if info.min <= v <= info.max
            ],
            dtype,
        )
    )
    wide = np.int64 if target[0] == "s" else np.uint64
    carried = x.astype(np.int16 if source == "s8" else np.uint16) if dtype.itemsize == 1 else x
    clipped = evaluate(f"cvt.sat.{target}.{source} d, a;", carried, out=wide).tolist()
    plain = evaluate(f"cvt.{target}.{source} d, a;", carried, out=wide).tolist()
    width = int(target[1:])
    low, high = (-(1 << width - 1), (1 << width - 1) - 1) if target[0] == "s" else (0, (1 << width) - 1)
    for v, c, p in zip(x.tolist(), clipped, plain, strict=True):
        assert c == max(low, min(high, v))
        assert p == wrap(v, target)


def test_registers_come_apart_and_together() -> None:
    a, b = np.array([0x11223344], np.uint32), np.array([0x55667788], np.uint32)
    assert int(evaluate("mov.b64 d, {a, b};", a, b, out=np.uint64)[0]) == 0x5566778811223344
    halves = "{ .reg .b16 l, h; mov.b32 {l, h}, a; mov.b32 d, {h, l}; }"
    assert int(evaluate(halves, a)[0]) == 0x33441122
    assert (
        int(
            evaluate(
                "{ .reg .b16 w, x, y, z; mov.b64 {w, x, y, z}, a; mov.b64 d, {z, y, x, w}; }",
                np.array([0x0123456789ABCDEF], np.uint64),
                out=np.uint64,
            )[0]
        )
        == 0xCDEF89AB45670123
    )


def test_saturating_addition() -> None:
    a, b = np.array([2**31 - 1, -(2**31), 5], np.int32), np.array([1, -1, 6], np.int32)
    assert evaluate("add.sat.s32 d, a, b;", a, b, out=np.int32).tolist() == [2**31 - 1, -(2**31), 11]
    assert evaluate("sub.sat.s32 d, a, b;", b, a, out=np.int32).tolist() == [-(2**31) + 2, 2**31 - 1, 1]
