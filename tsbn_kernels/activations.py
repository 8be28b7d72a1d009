"""The activations that a layer can end in, and their derivatives, in plain PyTorch and differentiable to any order."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Name = Literal["relu", "leaky_relu", "silu", "gelu"]
ACTIVATIONS: tuple[Name, ...] = ("relu", "leaky_relu", "silu", "gelu")
HOMOGENEOUS = (None, "relu", "leaky_relu")  # act(k * z) = k * act(z) for k > 0

Activation = Callable[[Tensor, float], Tensor]


def _gelu_slope(z: Tensor, _: float) -> Tensor:
    slope: Tensor = torch.special.ndtr(z) + z * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return slope


def _silu_slope(z: Tensor, _: float) -> Tensor:
    gate = torch.sigmoid(z)
    slope: Tensor = gate * (1 + z * (1 - gate))
    return slope


# Each with its derivative. NaN stays NaN, and both kinks have the derivative that PyTorch gives them.
_FUNCTIONS: dict[str, tuple[Activation, Activation]] = {
    "none": (lambda z, _: z, lambda z, _: torch.ones_like(z)),
    "relu": (lambda z, _: torch.relu(z), lambda z, _: (z > 0).to(z.dtype)),
    "leaky_relu": (functional.leaky_relu, lambda z, slope: torch.where(z > 0, torch.ones_like(z), slope)),
    "silu": (lambda z, _: functional.silu(z), _silu_slope),
    "gelu": (lambda z, _: functional.gelu(z), _gelu_slope),
}


def activate(z: Tensor, activation: str, slope: float) -> Tensor:
    """``act(z)``; ``slope`` is leaky ReLU's for negative z."""
    return _FUNCTIONS[activation][0](z, slope)


def activation_slope(z: Tensor, activation: str, slope: float) -> Tensor:
    """``act'(z)``."""
    return _FUNCTIONS[activation][1](z, slope)


def invert_leaky_relu(y: Tensor, slope: float) -> Tensor:
    """The z of which ``y`` is the leaky ReLU; ``slope`` is positive."""
    return torch.where(y > 0, y, y / slope)


def as_module(activation: str, slope: float) -> nn.Module:
    """The activation as a module of PyTorch's."""
    modules: dict[str, nn.Module] = {
        "relu": nn.ReLU(),
        "leaky_relu": nn.LeakyReLU(slope),
        "silu": nn.SiLU(),
        "gelu": nn.GELU(),
    }
    return modules[activation]


def of_module(module: nn.Module) -> tuple[Name, float] | None:
    """The activation that a module of PyTorch's computes, and its slope; None where it is not one of ours."""
    if type(module) is nn.LeakyReLU:
        return "leaky_relu", module.negative_slope
    if type(module) is nn.GELU and module.approximate != "none":
        return None
    names: dict[type[nn.Module], Name] = {nn.ReLU: "relu", nn.SiLU: "silu", nn.GELU: "gelu"}
    name = names.get(type(module))
    return None if name is None else (name, 0.0)
