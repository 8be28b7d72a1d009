"""Evaluates single PTX instructions on arrays, and rounds exactly, for the tests of the semantics."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch

from tools import ptxvm

FORMATS = {
    "f16": (11, -14, 5),
    "bf16": (8, -126, 8),
    "f32": (24, -126, 8),
    "f64": (53, -1022, 11),
}  # precision, emin, bits
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def evaluate(text: str, *inputs: np.ndarray, out: type = np.uint32, target: str = "sm_100a") -> np.ndarray:
    """Runs `text` in one thread for each element: registers a, b, c, e hold the inputs, d takes the result.

    Predicates p, q and the 32-bit register t are free to use.
    """
    n = len(inputs[0])
    padded = [np.resize(np.asarray(x), -(-n // 64) * 64) for x in inputs]
    size = np.dtype(out).itemsize
    result = np.zeros(len(padded[0]), out)
    names = "abce"[: len(inputs)]
    loads = "".join(
        f"""
    ld.param.u64 %address, [in_{r}];
    mad.wide.u32 %address, %index, {x.itemsize}, %address;
    ld.global.b{8 * x.itemsize} {r}, [%address];"""
        for r, x in zip(names, padded, strict=True)
    )
    declarations = "".join(f".reg .b{max(16, 8 * x.itemsize)} {r};" for r, x in zip(names, padded, strict=True))
    ptx = f"""
.version 8.6
.target {target}
.address_size 64
.visible .entry evaluate(.param .u64 result{"".join(f", .param .u64 in_{r}" for r in names)})
{{
    .reg .b64 %address; .reg .b32 %index; .reg .b32 %block; .reg .b32 t; .reg .pred p, q; .reg .b{max(16, 8 * size)} d;
    {declarations}
    mov.u32 %index, %tid.x;
    mov.u32 %block, %ctaid.x;
    mad.lo.u32 %index, %block, 64, %index;{loads}
    {text}
    ld.param.u64 %address, [result];
    mad.wide.u32 %address, %index, {size}, %address;
    st.global.b{8 * size} [%address], d;
    ret;
}}"""
    ptxvm.launch(ptx, "evaluate", len(result) // 64, 64, [ptxvm.Out(result), *padded])
    return result[:n]


def bits(x: np.ndarray) -> np.ndarray:
    """The bits of floats, for exact comparison."""
    return x.view(UNSIGNED[x.itemsize])


def to_bf16(x: np.ndarray) -> np.ndarray:
    """The bits of floats as bf16, as PyTorch rounds them."""
    return torch.from_numpy(np.ascontiguousarray(x, np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def exact(code: int, form: str) -> Fraction | float:
    """The value of a float's bits: a Fraction, or an infinity or NaN."""
    precision, emin, width = FORMATS[form]
    fraction_bits = precision - 1
    exponent, fraction = code >> fraction_bits & (1 << width) - 1, code & (1 << fraction_bits) - 1
    sign = -1 if code >> fraction_bits + width & 1 else 1
    if exponent == (1 << width) - 1:
        return float("nan") if fraction else sign * float("inf")
    significand = fraction if exponent == 0 else fraction | 1 << fraction_bits
    return sign * Fraction(significand) * Fraction(2) ** (emin - fraction_bits + max(0, exponent - 1))


def round_exactly(value: Fraction, form: str, mode: str = "rn", negative_zero: bool = False) -> int:
    """The bits of the float nearest to a value in a rounding direction, by the definition."""
    precision, emin, width = FORMATS[form]
    fraction_bits = precision - 1
    negative = value < 0 or (value == 0 and negative_zero)
    sign = int(negative) << fraction_bits + width
    magnitude = abs(value)
    exponent = emin
    if magnitude:
        estimate = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()  # right or one too large
        exponent = max(emin, estimate - (magnitude < Fraction(2) ** estimate))
    scaled = magnitude / Fraction(2) ** (exponent - fraction_bits)
    floor, rest = divmod(scaled, 1)
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and floor % 2 == 1),
        "rna": rest >= Fraction(1, 2),
        "rz": False,
        "rm": negative and rest > 0,
        "rp": not negative and rest > 0,
    }[mode]
    code = (exponent - emin << fraction_bits) + int(floor) + up
    infinity = ((1 << width) - 1) << fraction_bits
    if code >= infinity:
        clips = mode == "rz" or (mode == "rm" and not negative) or (mode == "rp" and negative)
        code = infinity - 1 if clips else infinity
    return sign | code


def corners(form: str) -> list[int]:
    """Bits of zeros, subnormals, ones, powers, extremes, infinities and a NaN of a format."""
    precision, _, width = FORMATS[form]
    fraction_bits = precision - 1
    infinity = ((1 << width) - 1) << fraction_bits
    one = ((1 << width - 1) - 1) << fraction_bits
    positive = [
        0,
        1,
        2,
        3,
        (1 << fraction_bits) - 1,
        1 << fraction_bits,
        (1 << fraction_bits) + 1,
        one - 1,
        one,
        one + 1,
        one + (1 << fraction_bits),
        one + (3 << fraction_bits - 1),
        infinity - 1,
        infinity,
    ]
    return positive + [c | 1 << fraction_bits + width for c in positive] + [infinity | 1 << fraction_bits - 1]


def samples(form: str, count: int, seed: int = 0) -> np.ndarray:
    """Corner cases in all pairs and random bits, as arrays [2, n] of bits."""
    precision, _, width = FORMATS[form]
    kind = UNSIGNED[(precision + width) // 8]
    cases = corners(form)
    pairs = np.array([(a, b) for a in cases for b in cases], kind).T
    random = np.random.default_rng(seed)
    one = ((1 << width - 1) - 1) << precision - 1
    near = (random.integers(0, 1 << precision + 1, (2, count)) + one).astype(kind)
    anything = random.integers(0, np.iinfo(kind).max, (2, count), kind, endpoint=True)
    return np.concatenate([pairs, near, anything], 1)


def is_nan(code: int, form: str) -> bool:
    """Whether bits are a NaN."""
    value = exact(code, form)
    return isinstance(value, float) and math.isnan(value)
