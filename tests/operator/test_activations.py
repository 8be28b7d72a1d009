"""The table of activations: each row says the truth about PyTorch's module, and all other tables have the same rows."""

from __future__ import annotations

import re
from typing import get_args

import pytest
import torch
from support.processes import ROOT
from torch import Tensor, nn

from tsbn_kernels.definition.activations import (
    ACTIVATIONS,
    EPILOGUES,
    TABLE,
    Name,
    activation_slope,
    as_module,
    of_module,
)

SLOPE = 0.125
names = pytest.mark.parametrize("name", ACTIVATIONS)


def values() -> Tensor:
    """From -30 to 30; no kink, but both sides of all."""
    return torch.arange(-30, 30, 1 / 16, dtype=torch.float64) + 1 / 64


def test_the_names_for_type_checkers_are_those_of_the_rows() -> None:
    assert get_args(Name) == ACTIVATIONS


def test_rows_of_cpp_are_the_same() -> None:
    header = (ROOT / "csrc" / "activations.h").read_text()
    assert re.findall(r"^ *row\((\w+),", header, re.MULTILINE) == list(EPILOGUES)


@names
def test_value_and_derivatives_are_those_of_the_module(name: str) -> None:
    module, row = as_module(name, SLOPE), TABLE[name]
    z = torch.cat([values(), torch.tensor(row.kinks, dtype=torch.float64)]).requires_grad_()
    y = module(z)
    torch.testing.assert_close(row.value(z, SLOPE), y, rtol=1e-14, atol=1e-14)
    (gradient,) = torch.autograd.grad(y, z, torch.ones_like(z), create_graph=True)
    torch.testing.assert_close(activation_slope(z, name, SLOPE), gradient, rtol=1e-14, atol=1e-14)
    if row.kinks and not gradient.requires_grad:
        return
    second = torch.autograd.grad(gradient, z, torch.ones_like(z), allow_unused=True, materialize_grads=True)
    got = torch.autograd.grad(
        (activation_slope(z, name, SLOPE) + 0 * z).sum(), z, allow_unused=True, materialize_grads=True
    )
    torch.testing.assert_close(got[0][: len(values())], second[0][: len(values())], rtol=1e-12, atol=1e-12)


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivatives_far_from_zero_are_numbers(name: str, dtype: torch.dtype) -> None:
    z = torch.tensor([-1e30, -1e4, -88.0, 88.0, 1e4, 1e30], dtype=dtype)
    slope = activation_slope(z, name, SLOPE)
    assert slope.isfinite().all()
    wanted = torch.autograd.functional.jacobian(as_module(name, SLOPE), z.double()).diagonal()
    torch.testing.assert_close(slope.double(), wanted, rtol=1e-6, atol=1e-6)


@names
def test_properties(name: str) -> None:
    row, z = TABLE[name], values()
    slopes = activation_slope(z, name, SLOPE)
    at_kinks = torch.tensor(row.kinks, dtype=torch.float64)
    jumps = [activation_slope(at_kinks + side, name, SLOPE) for side in (-1e-9, 1e-9)]
    assert all((jumps[0] - jumps[1]).abs() > 0.1)
    far = torch.ones_like(z, dtype=torch.bool)
    for kink in row.kinks:
        far &= (z - kink).abs() > 1e-3
    change = (activation_slope(z + 1e-4, name, SLOPE) - activation_slope(z - 1e-4, name, SLOPE)).abs()
    assert (change[far] < 1e-3).all(), "a kink is missing"
    assert row.homogeneous == torch.allclose(row.value(3 * z, SLOPE), 3 * row.value(z, SLOPE))
    assert row.selects == bool(((slopes == 0) | (slopes == 1)).all())
    assert row.sloped == (not torch.equal(row.value(z, 0.5), row.value(z, 0.25)))
    y = row.value(z, SLOPE)
    assert row.invertible == torch.allclose(torch.where(y > 0, y, y / SLOPE), z)


@names
def test_modules_are_found(name: str) -> None:
    assert of_module(as_module(name, 0.3)) == (name, 0.3 if TABLE[name].sloped else 0.0)

    class Other(type(as_module(name, 0.3))):  # type: ignore[misc]
        """May compute anything."""

    assert of_module(Other()) is None


def test_other_modules_are_not_found() -> None:
    for module in (nn.Identity(), nn.PReLU(), nn.Tanh(), nn.Hardtanh(-2.0, 2.0), nn.Hardtanh(0.0, 20.0)):
        assert of_module(module) is None


def test_bounds_tell_a_module() -> None:
    """As do other attributes: nn.Hardtanh of 0 to 6 is nn.ReLU6, and one that was changed is not."""
    assert of_module(nn.Hardtanh(0, 6)) == ("relu6", 0.0)
    changed = nn.ReLU6()
    changed.max_val = 5.0
    assert of_module(changed) is None


@names
def test_functions_compute_it(name: str) -> None:
    z = torch.randn(20)
    for function in TABLE[name].functions:
        assert torch.allclose(function(z.clone()), as_module(name, 0.01)(z))
    for method in TABLE[name].methods:
        assert torch.equal(getattr(z.clone(), method)(), as_module(name, 0.01)(z))
