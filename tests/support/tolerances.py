"""Tolerances against the definition in float64, and comparisons within them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """``|actual - expected| <= absolute * scale + units * (one unit in the last place of expected)``."""

    absolute: float
    units: float


# Against the definition in float64 on the same rounded input, for results of a size near 1 (`scale` says otherwise).
FORWARD = {
    torch.float64: Tolerance(1e-13, 2),  # sums of a few thousand terms
    torch.float32: Tolerance(5e-6, 0),  # the promise of the package for |mean| / std up to 1
    # Computed in float32 and rounded once: half a unit, and one where the float32 value lies near a midpoint. The
    # absolute part is float32's error where gate * xhat and bias cancel.
    torch.float16: Tolerance(5e-7, 1),
    torch.bfloat16: Tolerance(5e-7, 1),
}
BACKWARD = {
    torch.float64: Tolerance(1e-12, 4),
    torch.float32: Tolerance(1e-5, 0),  # dy - mean(dy) - xhat * mean(dy * xhat) cancels a little
    torch.float16: Tolerance(5e-6, 1),
    torch.bfloat16: Tolerance(5e-6, 1),
}
STATISTICS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6}  # relative


def unit_in_last_place(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance, in float64, between neighbours of ``dtype`` around ``values``."""
    info = torch.finfo(dtype)
    values = values.double().abs().clamp(info.smallest_normal, torch.finfo(torch.float64).max)
    power_of_two = (values.view(torch.int64) & 0x7FF0000000000000).view(torch.float64)  # the exponent alone
    return power_of_two * info.eps


def assert_within(actual: Tensor, expected: Tensor, tolerance: Tolerance, scale: float | Tensor = 1.0) -> None:
    """Elementwise comparison in float64; NaN and infinity never pass."""
    assert actual.shape == expected.shape
    wanted = expected.detach().double()
    error = (actual.detach().double() - wanted).abs()
    if (error <= tolerance.absolute * scale).all():
        return
    bound = tolerance.absolute * scale + tolerance.units * unit_in_last_place(wanted, actual.dtype)
    bad = ~(error <= bound)
    if bad.any():
        worst = int(torch.where(error.isnan(), torch.inf, error / bound).argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} values are out of bounds; worst at {index}: "
            f"got {actual[index].item()!r}, expected {wanted[index].item()!r}, error {error[index].item():.3g}"
        )


def assert_relative(actual: Tensor, expected: Tensor, bound: float) -> None:
    """``|actual - expected| <= bound * |expected|``, elementwise, in float64."""
    assert actual.shape == expected.shape
    wanted = expected.double()
    error = (actual.double() - wanted).abs()
    assert (error <= bound * wanted.abs()).all(), f"relative error {(error / wanted.abs()).max().item():.3g} > {bound}"


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds[actual.element_size()]
    assert torch.equal(actual.contiguous().view(kind), expected.contiguous().view(kind))
