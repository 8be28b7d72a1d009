"""What follows a layer, done to its values while they are in registers: ``y = activation(z + residual)``.

The activation is a constant of the tile. ``inverse_leaky_relu`` is one of backward passes alone: it reads the layer's
input v from ``u = leaky_relu(v)``.
"""

import triton
import triton.language as tl

from tsbn_kernels.backends.triton.kernels.tiles import load, within


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
        return tile.GRADIENT(gradient, values, tile)
    z = before_activation(deviation, residual, scale, offset, slab, place, tile)
    gradient = tile.GRADIENT(gradient, z, tile)
    return within(gradient, place, tile) if tile.EXPONENTIAL else gradient  # where there is no value, z may be anything
