"""What the activations compute to values that are in registers.

A kernel is compiled with the functions of its own activation: another row changes nothing in it.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_BELL = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


class Functions(NamedTuple):
    """The value, of z and the tile; and dy times the derivative at z, of dy, z and the tile."""

    value: Any
    gradient: Any


@triton.jit
def _identity(z, tile):
    return z


@triton.jit
def _identity_gradient(gradient, z, tile):
    return gradient


@triton.jit
def _relu(z, tile):
    return tl.where(z <= 0.0, 0.0, z)  # NaN stays


@triton.jit
def _relu_gradient(gradient, z, tile):
    return tl.where(z > 0.0, gradient, 0.0)


@triton.jit
def _leaky_relu(z, tile):
    return tl.where(z > 0.0, z, z * tile.SLOPE)


@triton.jit
def _leaky_relu_gradient(gradient, z, tile):
    return tl.where(z > 0.0, gradient, gradient * tile.SLOPE)


@triton.jit
def _logistic(z):
    """``sigmoid(z)``. Where the exponential loses digits, the sigmoid does not depend on them."""
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _silu(z, tile):
    return z * _logistic(z)


@triton.jit
def _silu_gradient(gradient, z, tile):
    value = _logistic(z)
    return gradient * (value + value * (1.0 - value) * z)


@triton.jit
def _normal(z):
    """The probability that a normal value is below z, and ``exp(-z^2 / 2)``.

    In float32 by a polynomial in ``1 / (1 + 0.39 |z| / sqrt(2))`` times the latter, as in Abramowitz and Stegun 7.1.26,
    with an error below 2e-8: an error function has branches, and takes registers that so many values do not leave.
    """
    bell = tl.exp(-0.5 * z * z)
    if z.dtype == tl.float64:
        return 0.5 + 0.5 * tl.erf(z * _SQRT_HALF), bell
    t = 1.0 / (1.0 + tl.abs(z) * 0.2757716446627535)
    tail = -0.11331342702446412 * t + 0.44146988448710065
    tail = tail * t - 0.31467219937426125
    tail = tail * t + 0.32233510636445613
    tail = tail * t + 0.04667389034732442
    tail = (tail * t + 0.11750675210858418) * t * bell
    return tl.where(z > 0.0, 1.0 - tail, tail), bell


@triton.jit
def _gelu(z, tile):
    below, _ = _normal(z)
    return z * below


@triton.jit
def _gelu_gradient(gradient, z, tile):
    below, bell = _normal(z)
    return gradient * (below + z * bell * _BELL)


_LINEAR = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_CUBIC = tl.constexpr(0.07135481627260025)  # times 0.044715


@triton.jit
def _tanh_factor(z):
    """Of z in what the logistic function is taken of; beyond 24, where that has reached its ends, it stays finite."""
    return tl.minimum(z * z, 576.0) * _CUBIC + _LINEAR


@triton.jit
def _gelu_tanh(z, tile):
    return z * _logistic(z * _tanh_factor(z))


@triton.jit
def _gelu_tanh_gradient(gradient, z, tile):
    factor = _tanh_factor(z)
    power = tl.exp(-tl.abs(z * factor))
    near = 1.0 / (1.0 + power)
    far = near * power  # 1 - near has too few digits for what it is multiplied by
    return gradient * (tl.where(z < 0.0, far, near) + z * (near * far) * (3.0 * factor - 2.0 * _LINEAR))


@triton.jit
def _hardswish(z, tile):
    return z * (tl.minimum(tl.maximum(z + 3.0, 0.0), 6.0) * (1.0 / 6.0))


@triton.jit
def _hardswish_gradient(gradient, z, tile):
    between = gradient * ((2.0 * z + 3.0) * (1.0 / 6.0))
    return tl.where(z < 3.0, tl.where(z > -3.0, between, 0.0), gradient)


@triton.jit
def _relu6(z, tile):
    return tl.where(z <= 0.0, 0.0, tl.where(z >= 6.0, 6.0, z))


@triton.jit
def _relu6_gradient(gradient, z, tile):
    return tl.where((z > 0.0) & (z < 6.0), gradient, 0.0)


@triton.jit
def _hardtanh(z, tile):
    return tl.where(z <= -1.0, -1.0, tl.where(z >= 1.0, 1.0, z))


@triton.jit
def _hardtanh_gradient(gradient, z, tile):
    return tl.where((z > -1.0) & (z < 1.0), gradient, 0.0)


TABLE = {
    "none": Functions(_identity, _identity_gradient),
    "relu": Functions(_relu, _relu_gradient),
    "leaky_relu": Functions(_leaky_relu, _leaky_relu_gradient),
    "silu": Functions(_silu, _silu_gradient),
    "gelu": Functions(_gelu, _gelu_gradient),
    "gelu_tanh": Functions(_gelu_tanh, _gelu_tanh_gradient),
    "hardswish": Functions(_hardswish, _hardswish_gradient),
    "relu6": Functions(_relu6, _relu6_gradient),
    "hardtanh": Functions(_hardtanh, _hardtanh_gradient),
    "inverse_leaky_relu": Functions(_identity, _leaky_relu_gradient),
}
