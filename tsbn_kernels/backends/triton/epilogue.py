"""What follows a layer, done to its values while they are in registers: ``y = activation(z + residual)``.

The activation is a constant of the tile. ``inverse_leaky_relu`` is one of backward passes alone: it reads the layer's
input v from ``u = leaky_relu(v)``.
"""

import triton
import triton.language as tl

from tsbn_kernels.backends.triton.tiles import load, within

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_BELL = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)


@triton.jit
def _logistic(z):
    """``sigmoid(z)``. Where the exponential loses digits, the sigmoid does not depend on them."""
    return 1.0 / (1.0 + tl.exp(-z))


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
def activate(z, tile):
    """The activation of z."""
    if tile.ACTIVATION == "relu":
        return tl.where(z <= 0.0, 0.0, z)  # NaN stays
    if tile.ACTIVATION == "leaky_relu":
        return tl.where(z > 0.0, z, z * tile.SLOPE)
    if tile.ACTIVATION == "silu":
        return z * _logistic(z)
    if tile.ACTIVATION == "gelu":
        below, _ = _normal(z)
        return z * below
    return z


@triton.jit
def _slope(z, tile):
    """The derivative of the smooth activations at z."""
    if tile.ACTIVATION == "silu":
        value = _logistic(z)
        return value + value * (1.0 - value) * z
    below, bell = _normal(z)
    return below + z * bell * _BELL


@triton.jit
def before_activation(deviation, residual, scale, offset, slab, place, tile):
    """``z + residual`` of a tile, from its deviations from the mean."""
    z = deviation * scale + offset
    if residual is not None:
        z += load(residual, slab, place, tile)
    return z


@triton.jit
def restore(values, tile):
    """The layer's input, from what is read of it."""
    if tile.ACTIVATION == "inverse_leaky_relu":
        return tl.where(values > 0.0, values, values * (1.0 / tile.SLOPE))
    return values


@triton.jit
def through(gradient, values, deviation, residual, scale, offset, slab, place, tile):
    """The gradient before the activation, from the one after it; z is computed anew."""
    if tile.ACTIVATION == "none":
        return gradient
    if tile.ACTIVATION == "inverse_leaky_relu":
        return tl.where(values > 0.0, gradient, gradient * tile.SLOPE)
    z = before_activation(deviation, residual, scale, offset, slab, place, tile)
    if tile.ACTIVATION == "relu":
        return tl.where(z > 0.0, gradient, 0.0)
    if tile.ACTIVATION == "leaky_relu":
        return tl.where(z > 0.0, gradient, gradient * tile.SLOPE)
    return within(gradient * _slope(z, tile), place, tile)  # where there is no value, z may be anything
