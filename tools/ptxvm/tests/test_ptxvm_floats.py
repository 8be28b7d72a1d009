"""Float arithmetic and conversions against exact rational arithmetic, with every corner case."""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest

from tools.ptxvm.tests.ptxvm_bench import (
    FORMATS,
    UNSIGNED,
    bits,
    corners,
    evaluate,
    exact,
    is_nan,
    round_exactly,
    samples,
    to_bf16,
)

KINDS = {"f16": np.uint16, "bf16": np.uint16, "f32": np.uint32, "f64": np.uint64}
CANONICAL = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF}


def check(form: str, codes: np.ndarray, result: np.ndarray, expected: list[int], what: str) -> None:
    for k, want in enumerate(expected):
        got = int(result[k])
        operands = [hex(int(c[k])) for c in codes]
        if is_nan(want, form):
            assert is_nan(got, form), f"{what}{operands}: {got:#x}, not NaN"
            if form in CANONICAL:
                assert got == CANONICAL[form], f"{what}{operands}: NaN {got:#x} is not canonical"
        else:
            assert got == want, f"{what}{operands}: {got:#x}, not {want:#x}"


def special(form: str, value: float) -> int:
    """The bits of an infinity, a NaN or a zero."""
    precision, _, width = FORMATS[form]
    infinity = ((1 << width) - 1) << precision - 1
    sign = (math.copysign(1, value) < 0) << precision + width - 1
    return infinity | 1 << precision - 2 if math.isnan(value) else sign | (infinity if math.isinf(value) else 0)


def arithmetic(operation: str, form: str, mode: str, *codes: int) -> int:
    """An operation by its definition: exact, then rounded; infinities, NaN and signed zeros as IEEE 754 has them."""
    values = [exact(c, form) for c in codes]
    finite = all(isinstance(v, Fraction) for v in values)
    sign_bit = 1 << FORMATS[form][0] + FORMATS[form][2] - 1
    # Stand-ins that make the same infinities and NaN: every finite number but zero acts as one.
    sizes = [0.0 if v == 0 else 1.0 if isinstance(v, Fraction) else abs(v) for v in values]
    floats = [math.copysign(size, -1 if c & sign_bit else 1) for size, c in zip(sizes, codes, strict=True)]
    if operation == "fma":
        product_sign = bool(codes[0] & sign_bit) != bool(codes[1] & sign_bit)
        if finite:
            total = values[0] * values[1] + values[2]
            if total == 0:
                third = bool(codes[2] & sign_bit)
                both = values[0] * values[1] == 0 and values[2] == 0
                negative = (
                    product_sign
                    if both and product_sign == third
                    else mode == "rm" and (values[0] * values[1] != 0 or product_sign != third)
                )
                return round_exactly(Fraction(0), form, mode, negative)
            return round_exactly(total, form, mode)
        return special(form, floats[0] * floats[1] + floats[2])
    a, b = values
    if not finite or (operation == "div" and b == 0):
        with np.errstate(all="ignore"):
            x, y = np.float64(floats[0]), np.float64(floats[1])
            return special(form, float({"add": x + y, "sub": x - y, "mul": x * y, "div": x / y}[operation]))
    negative = bool(codes[0] & sign_bit) != bool(codes[1] & sign_bit)
    if operation in ("add", "sub"):
        total = a + b if operation == "add" else a - b
        second = bool(codes[1] & sign_bit) != (operation == "sub")
        same = bool(codes[0] & sign_bit) == second
        both_zero = a == 0 and b == 0
        return round_exactly(total, form, mode, bool(codes[0] & sign_bit) if both_zero and same else mode == "rm")
    return round_exactly(a * b if operation == "mul" else a / b, form, mode, negative)


OPERATIONS = [(o, f) for f in FORMATS for o in ("add", "sub", "mul", "div") if o != "div" or f in ("f32", "f64")]


@pytest.mark.parametrize(("operation", "form"), OPERATIONS)
def test_binary_operations_round_exactly(operation: str, form: str) -> None:
    a, b = samples(form, 300)
    for mode in ["rn"] if form in ("f16", "bf16") else ["rn", "rz", "rm", "rp"]:
        result = evaluate(f"{operation}.{mode}.{form} d, a, b;", a, b, out=KINDS[form])
        expected = [arithmetic(operation, form, mode, int(x), int(y)) for x, y in zip(a, b, strict=True)]
        check(form, np.stack([a, b]), result, expected, f"{operation}.{mode}.{form} ")


@pytest.mark.parametrize("form", ["f16", "bf16", "f32", "f64"])
def test_fma_rounds_once(form: str) -> None:
    a, b = samples(form, 500)
    random = np.random.default_rng(1)
    c = np.concatenate(
        [random.choice(np.array(corners(form), KINDS[form]), 900), samples(form, 500, 2)[0][-(len(a) - 900) :]]
    )[: len(a)]
    for mode in ["rn"] if form in ("f16", "bf16") else ["rn", "rz", "rm", "rp"]:
        result = evaluate(f"fma.{mode}.{form} d, a, b, c;", a, b, c, out=KINDS[form])
        expected = [arithmetic("fma", form, mode, int(x), int(y), int(z)) for x, y, z in zip(a, b, c, strict=True)]
        check(form, np.stack([a, b, c]), result, expected, f"fma.{mode}.{form} ")


def test_bf16_fma_with_a_tie_broken_far_below() -> None:
    # (1 + 2^-7) * (1 + 2^-1) = 1.51171875 is a tie between two bf16; 2^-100 must break it upwards.
    a, b = to_bf16(np.array([1 + 2**-7])), to_bf16(np.array([1.5]))
    for tiny, want in [(2.0**-100, 0x3FC2), (-(2.0**-100), 0x3FC1)]:
        result = evaluate("fma.rn.bf16 d, a, b, c;", a, b, to_bf16(np.array([tiny])), out=np.uint16)
        assert int(result[0]) == want


@pytest.mark.parametrize(("source", "target"), [("f32", "f16"), ("f32", "bf16"), ("f64", "f32"), ("f64", "f16")])
def test_narrowing_conversions(source: str, target: str) -> None:
    codes = samples(source, 800)[0]
    # Values at, just below and just above the midpoints of the narrow format.
    narrow = (
        np.arange(0, 0x7C00 if target == "f16" else 0x7F80, 37)
        if target != "f32"
        else np.arange(0, 0x7F800000, 7919177)
    )
    middles = []
    for code in narrow:
        low, high = exact(int(code), target), exact(int(code) + 1, target)
        middle = (low + (high if isinstance(high, Fraction) else low)) / 2
        centre = round_exactly(middle, source)
        middles += [max(centre - 1, 0), centre, centre + 1]
    codes = np.concatenate([codes, np.array(middles, KINDS[source])])
    for mode in ["rn", "rz", "rm", "rp"]:
        result = evaluate(f"cvt.{mode}.{target}.{source} d, a;", codes, out=KINDS[target])
        expected = []
        for code in codes:
            value = exact(int(code), source)
            negative = bool(int(code) >> 8 * codes.itemsize - 1)
            expected.append(
                special(target, value) if isinstance(value, float) else round_exactly(value, target, mode, negative)
            )
        check(target, codes[None], result, expected, f"cvt.{mode}.{target}.{source} ")


def test_narrowing_agrees_with_numpy_and_torch() -> None:
    x = np.random.default_rng(3).integers(0, 2**32, 20000, np.uint64).astype(np.uint32).view(np.float32)
    x = x[~np.isnan(x)]
    with np.errstate(over="ignore"):
        assert (evaluate("cvt.rn.f16.f32 d, a;", x, out=np.uint16) == x.astype(np.float16).view(np.uint16)).all()
    assert (evaluate("cvt.rn.bf16.f32 d, a;", x, out=np.uint16) == to_bf16(x)).all()


@pytest.mark.parametrize("form", ["f16", "bf16"])
def test_widening_is_exact_for_every_value(form: str) -> None:
    codes = np.arange(65536).astype(np.uint16)
    result = evaluate(f"cvt.f32.{form} d, a;", codes, out=np.uint32)
    expected = [
        special("f32", v)
        if isinstance(v := exact(int(c), form), float)
        else round_exactly(v, "f32", "rn", bool(c & 0x8000))
        for c in codes
    ]
    check("f32", codes[None], result, expected, f"cvt.f32.{form} ")


@pytest.mark.parametrize("form", ["f16", "bf16"])
def test_pairs_take_both_halves(form: str) -> None:
    a, b = samples(form, 100)
    packed = lambda x: x.astype(np.uint32) | np.roll(x, 1).astype(np.uint32) << 16  # noqa: E731
    for text in [
        "add.rn.{}{} d, a, b;",
        "mul.rn.{}{} d, a, b;",
        "min.{}{} d, a, b;",
        "max.NaN.{}{} d, a, b;",
        "fma.rn.relu.{}{} d, a, b, a;",
    ]:
        one = evaluate(text.format(form, ""), a, b, out=np.uint16)
        two = evaluate(text.format(form, "x2"), packed(a), packed(b), out=np.uint32)
        assert (two == packed(one)).all(), text


def test_pairs_of_f32() -> None:
    a, b = samples("f32", 100)
    packed = lambda x: x.astype(np.uint64) | np.roll(x, 1).astype(np.uint64) << np.uint64(32)  # noqa: E731
    for text in [
        "add{}.f32{} d, a, b;",
        "sub{}.f32{} d, a, b;",
        "mul{}.ftz.f32{} d, a, b;",
        "fma.rn{}.f32{} d, a, b, a;",
    ]:
        one = evaluate(text.format("", ""), a, b, out=np.uint32)
        two = evaluate(text.format("", "x2"), packed(a), packed(b), out=np.uint64)
        assert (two == packed(one)).all(), text


def test_packed_conversion_puts_the_first_operand_high() -> None:
    a, b = (samples("f32", 100)[k].view(np.float32) for k in (0, 1))
    for form in ("f16", "bf16"):
        high, low = (evaluate(f"cvt.rn.{form}.f32 d, a;", x, out=np.uint16).astype(np.uint32) for x in (a, b))
        assert (evaluate(f"cvt.rn.{form}x2.f32 d, a, b;", a, b) == (high << 16 | low)).all()


def test_relu_conversion_clears_negatives_and_keeps_nan() -> None:
    x = np.array([-1, -0.0, 0.0, 2, np.nan, -np.inf], np.float32)
    assert evaluate("cvt.rn.relu.bf16.f32 d, a;", x, out=np.uint16).tolist() == [0, 0, 0, 0x4000, 0x7FFF, 0]


def test_relu_of_fma_clears_negatives_and_keeps_nan() -> None:
    x, one, zero = np.array([[0xBC00, 0x8000, 0, 0x4000, 0x7E00], [0x3C00] * 5, [0x8000] * 5], np.uint16)
    assert evaluate("fma.rn.relu.f16 d, a, b, c;", x, one, zero, out=np.uint16).tolist() == [0, 0, 0, 0x4000, 0x7FFF]


@pytest.mark.parametrize("form", ["f16", "bf16"])
def test_mixed_precision_arithmetic(form: str) -> None:
    a = np.random.default_rng(4).normal(size=500).astype(np.float32)
    narrow = a.astype(np.float16).view(np.uint16) if form == "f16" else to_bf16(a)
    wide = evaluate(f"cvt.f32.{form} d, a;", narrow, out=np.float32)
    c = np.random.default_rng(5).normal(size=500).astype(np.float32)
    assert (evaluate(f"sub.rn.f32.{form} d, a, b;", narrow, c, out=np.float32) == wide - c).all()
    assert (evaluate(f"add.f32.{form} d, a, b;", narrow, c, out=np.float32) == wide + c).all()
    fused = evaluate("fma.rn.f32 d, a, b, c;", wide, wide, c, out=np.float32)
    assert (evaluate(f"fma.rn.f32.{form} d, a, b, c;", narrow, narrow, c, out=np.float32) == fused).all()


FUNCTIONS = {
    "ex2.approx.f32": lambda x: mpmath.mpf(2) ** x,
    "lg2.approx.f32": lambda x: mpmath.log(x, 2),
    "rcp.approx.f32": lambda x: 1 / x,
    "rcp.rn.f32": lambda x: 1 / x,
    "rsqrt.approx.f32": lambda x: 1 / mpmath.sqrt(x),
    "sqrt.approx.f32": mpmath.sqrt,
    "sqrt.rn.f32": mpmath.sqrt,
    "tanh.approx.f32": mpmath.tanh,
    "sin.approx.f32": mpmath.sin,
    "cos.approx.f32": mpmath.cos,
    "sqrt.rn.f64": mpmath.sqrt,
    "rsqrt.approx.f64": lambda x: 1 / mpmath.sqrt(x),
    "rcp.approx.ftz.f64": lambda x: 1 / x,
    "tanh.approx.bf16": mpmath.tanh,
    "ex2.approx.f16": lambda x: mpmath.mpf(2) ** x,
}


@pytest.mark.parametrize("opcode", FUNCTIONS)
def test_functions_are_correctly_rounded(opcode: str) -> None:
    form = opcode.rsplit(".", 1)[1]
    mpmath.mp.prec = 200
    x = np.abs(np.random.default_rng(6).normal(size=300) * 3) + 1e-3
    codes = np.array([round_exactly(Fraction(v), form) for v in x], KINDS[form])
    result = evaluate(f"{opcode} d, a;", codes, out=KINDS[form])
    expected = []
    for code in codes:
        value = exact(int(code), form)
        y = FUNCTIONS[opcode](mpmath.mpf(value.numerator) / value.denominator)
        man, exponent = int(mpmath.ldexp(y, 150)), 150
        expected.append(round_exactly(Fraction(man, 2**exponent), form))
    check(form, codes[None], result, expected, opcode + " ")


@pytest.mark.parametrize(("opcode", "cases"), [
    ("ex2.approx.ftz.f32", [(np.inf, np.inf), (-np.inf, 0.0), (np.nan, np.nan), (0.0, 1.0), (-1e-40, 1.0), (-200.0, 0.0), (-127.0, 0.0)]),
    ("ex2.approx.f32", [(-127.0, 2.0**-127)]),
    ("lg2.approx.f32", [(0.0, -np.inf), (-0.0, -np.inf), (np.inf, np.inf), (-1.0, np.nan), (1e-40, float(np.float32(math.log2(np.float32(1e-40)))))]),
    ("lg2.approx.ftz.f32", [(1e-40, -np.inf)]),
    ("rcp.approx.ftz.f32", [(0.0, np.inf), (-0.0, -np.inf), (np.inf, 0.0), (-1e-40, -np.inf), (3e38, 0.0)]),
    ("rsqrt.approx.f32", [(0.0, np.inf), (-0.0, -np.inf), (np.inf, 0.0), (-1.0, np.nan)]),
    ("sqrt.rn.f32", [(-0.0, -0.0), (np.inf, np.inf), (-1.0, np.nan)]),
    ("tanh.approx.f32", [(np.inf, 1.0), (-np.inf, -1.0), (-0.0, -0.0)]),
    ("neg.f32", [(0.0, -0.0), (np.inf, -np.inf)]),
    ("abs.ftz.f32", [(-1e-40, 0.0), (-2.0, 2.0)]),
])  # fmt: skip
def test_function_corners(opcode: str, cases: list[tuple[float, float]]) -> None:
    x, want = np.array(cases, np.float32).T.copy()
    got = evaluate(f"{opcode} d, a;", x, out=np.float32)
    same = (bits(got) == bits(want)) | (np.isnan(got) & np.isnan(want))
    assert same.all(), f"{opcode}: {x[~same]} gives {got[~same]}, not {want[~same]}"


def test_flush_to_zero_takes_inputs_and_results() -> None:
    tiny, least = np.float32(1e-40), np.float32(2.0**-126)
    a, b = np.array([tiny, least, -tiny, least], np.float32), np.array([1.0, 0.5, 1.0, 1.0], np.float32)
    assert bits(evaluate("mul.ftz.f32 d, a, b;", a, b, out=np.float32)).tolist() == [0, 0, 0x80000000, 0x00800000]
    assert evaluate("mul.f32 d, a, b;", a, b, out=np.float32).tolist() == [tiny, least / 2, -tiny, least]
    assert evaluate("setp.eq.ftz.f32 p, a, 0f00000000; selp.u32 d, 1, 0, p;", a).tolist() == [1, 0, 1, 0]


def test_flush_to_zero_of_f16_begins_at_its_own_least_normal() -> None:
    a = np.array([2.0**-15, -(2.0**-24), 2.0**-14], np.float16).view(np.uint16)
    zero = np.zeros_like(a)
    assert evaluate("add.ftz.f16 d, a, b;", a, zero, out=np.uint16).tolist() == [0, 0, int(a[2])]
    assert evaluate("add.f16 d, a, b;", a, zero, out=np.uint16).tolist() == a.tolist()


def test_ties_round_away_from_zero_where_asked_for() -> None:
    ties = np.array([1 + 2**-8, -(1 + 2**-8), 1 + 3 * 2**-8], np.float32)
    away = [0x3F81, 0xBF81, 0x3F82]
    assert evaluate("cvt.rna.bf16.f32 d, a;", ties, out=np.uint16).tolist() == away
    assert evaluate("cvt.rn.bf16.f32 d, a;", ties, out=np.uint16).tolist() == [0x3F80, 0xBF80, 0x3F82]


def test_saturation_clamps_and_turns_nan_into_zero() -> None:
    a = np.array([0.25, 2, -1, np.nan, -0.0], np.float32)
    assert evaluate("add.sat.f32 d, a, 0f00000000;", a, out=np.float32).tolist() == [0.25, 1, 0, 0, 0]


@pytest.mark.parametrize("form", ["f16", "bf16", "f32", "f64"])
def test_min_max_order_zeros_and_drop_nan(form: str) -> None:
    a, b = samples(form, 0)
    for operation, choose in [("min", min), ("max", max)]:
        result = evaluate(f"{operation}.{form} d, a, b;", a, b, out=KINDS[form])
        key = lambda c: (exact(c, form), not c >> (8 * a.itemsize - 1))  # noqa: E731  -0 before +0
        for x, y, got in zip(a.tolist(), b.tolist(), result.tolist(), strict=True):
            if is_nan(x, form) and is_nan(y, form):
                assert is_nan(got, form)
            else:
                want = y if is_nan(x, form) else x if is_nan(y, form) else choose(x, y, key=key)
                assert got == want, f"{operation} {x:#x} {y:#x}: {got:#x}, not {want:#x}"


def test_min_max_with_nan_and_three_operands() -> None:
    a, b, c = np.array([1, np.nan, 5], np.float32), np.array([2, 3, 4], np.float32), np.array([0, 9, 7], np.float32)
    assert np.isnan(evaluate("max.NaN.f32 d, a, b;", a, b, out=np.float32)).tolist() == [False, True, False]
    assert evaluate("max.f32 d, a, b, c;", a, b, c, out=np.float32).tolist() == [2, 9, 7]
    assert evaluate("min.f32 d, a, b, c;", a, b, c, out=np.float32).tolist() == [0, 3, 4]


RELATIONS = {
    "eq": lambda o, a, b: o and a == b,
    "ne": lambda o, a, b: o and a != b,
    "lt": lambda o, a, b: o and a < b,
    "le": lambda o, a, b: o and a <= b,
    "gt": lambda o, a, b: o and a > b,
    "ge": lambda o, a, b: o and a >= b,
    "equ": lambda o, a, b: not o or a == b,
    "neu": lambda o, a, b: not o or a != b,
    "ltu": lambda o, a, b: not o or a < b,
    "leu": lambda o, a, b: not o or a <= b,
    "gtu": lambda o, a, b: not o or a > b,
    "geu": lambda o, a, b: not o or a >= b,
    "num": lambda o, a, b: o,
    "nan": lambda o, a, b: not o,
}


@pytest.mark.parametrize("form", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("relation", RELATIONS)
def test_float_comparisons(relation: str, form: str) -> None:
    a, b = samples(form, 0)
    got = evaluate(f"setp.{relation}.{form} p|q, a, b; selp.u32 d, 1, 0, p; @q add.u32 d, d, 2;", a, b)
    for x, y, result in zip(a.tolist(), b.tolist(), got.tolist(), strict=True):
        ordered = not is_nan(x, form) and not is_nan(y, form)
        want = bool(RELATIONS[relation](ordered, exact(x, form), exact(y, form)))
        assert result == (1 if want else 2), f"{relation} {x:#x} {y:#x}"


def test_comparisons_of_pairs_and_values() -> None:
    a, b = np.array([1.5, -2], np.float16), np.array([1, 3], np.float16)
    pair = lambda x: x.view(np.uint32)  # noqa: E731
    assert evaluate("setp.gt.f16x2 p|q, a, b; selp.u32 d, 1, 0, p; @q add.u32 d, d, 2;", pair(a), pair(b)).tolist() == [
        1
    ]
    x = np.array([1, np.nan, 3], np.float32)
    assert evaluate("set.lt.f32.f32 d, a, 0f40000000;", x, out=np.float32).tolist() == [1, 0, 0]
    assert evaluate("set.ltu.u32.f32 d, a, 0f40000000;", x).tolist() == [0xFFFFFFFF, 0xFFFFFFFF, 0]


@pytest.mark.parametrize("kind", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("form", ["f32", "f64"])
def test_float_to_integer_clamps(form: str, kind: str) -> None:
    width, signed = int(kind[1:]), kind[0] == "s"
    low, high = (-(1 << width - 1), (1 << width - 1) - 1) if signed else (0, (1 << width) - 1)
    values = [
        0.5,
        1.5,
        2.5,
        -0.5,
        -1.5,
        3.7,
        -3.7,
        1e30,
        -1e30,
        np.inf,
        -np.inf,
        127.5,
        255.5,
        65535.5,
        float(2**31),
        float(2**63),
        np.nan,
    ]
    x = np.array(values, np.float32 if form == "f32" else np.float64)
    rounders = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
    for mode, rounder in rounders.items():
        result = evaluate(f"cvt.{mode}.{kind}.{form} d, a;", x, out=np.int64 if signed else np.uint64)
        for v, got in zip(x.tolist(), result.tolist(), strict=True):
            if math.isnan(v):
                want = (1 << width - 1) - (1 << width) * signed if form == "f64" or width == 64 else 0
            else:
                want = max(low, min(high, rounder(v))) if math.isfinite(v) else (high if v > 0 else low)
            assert got == want, f"cvt.{mode}.{kind}.{form} {v}: {got}, not {want}"


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_integer_to_float_rounds(kind: str, mode: str) -> None:
    dtype = np.dtype({"s": "i", "u": "u"}[kind[0]] + str(int(kind[1:]) // 8))
    info = np.iinfo(dtype)
    x = np.concatenate(
        [
            np.array([0, 1, info.max, info.min, 2**24 + 1, 2**25 + 2], dtype),
            np.random.default_rng(7).integers(info.min, info.max, 300, dtype),
        ]
    )
    for form in ("f32", "f64") if "64" in kind else ("f32",):
        result = evaluate(f"cvt.{mode}.{form}.{kind} d, a;", x, out=KINDS[form])
        check(
            form,
            x[None].view(UNSIGNED[x.itemsize]),
            result,
            [round_exactly(Fraction(int(v)), form, mode) for v in x],
            f"cvt.{mode}.{form}.{kind} ",
        )


def test_rounding_to_integral_floats() -> None:
    x = np.array([0.5, 1.5, -0.5, -2.5, 3.2, -3.7, 1e10, np.inf], np.float32)
    for mode, reference in [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)]:
        assert (bits(evaluate(f"cvt.{mode}.f32.f32 d, a;", x, out=np.float32)) == bits(reference(x))).all(), mode


def test_copysign_takes_the_sign_of_the_first_operand() -> None:
    sign, size = np.array([-0.0, 2.0, -3.0], np.float32), np.array([1.5, -2.5, -np.inf], np.float32)
    assert evaluate("copysign.f32 d, a, b;", sign, size, out=np.float32).tolist() == [-1.5, 2.5, -np.inf]
