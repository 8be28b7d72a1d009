"""The activations that a layer can end in: a table, from which all lists of them follow.

How to add one: docs/adding_an_activation.md. The same names have rows in csrc/activations.h and, for Triton, in
backends/triton/activations.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from tsbn_kernels.definition.plain import is_plain

# The names of the rows, for type checkers.
Name = Literal["relu", "leaky_relu", "silu", "gelu", "gelu_tanh", "hardswish", "relu6", "hardtanh"]
Function = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Activation:
    """What an activation computes, and what else depends on which one it is.

    Attributes:
        value: ``act(z)``, of z and the slope of negative values. Differentiable to any order; NaN stays NaN.
        derivative: ``act'(z)``, of the same, with PyTorch's values at kinks.
        module: makes the module of PyTorch's, of the slope.
        types: modules of these types compute it, where they have
        settings: these attributes.
        functions, methods: PyTorch's functions that compute it, and the names of a tensor's methods that do.
        kinks: where the derivative jumps.
        sloped: whether it has a slope of its own for negative values.
        homogeneous: whether ``act(k * z) = k * act(z)`` for k > 0.
        invertible: whether ``act(z)`` tells z where the slope is positive: the inverse is that of a leaky ReLU.
        selects: whether the derivative is 0 or 1: the gradient before it is then as exact as the one behind.
        exponential: whether it has an exponential, whose terms take registers.
    """

    value: Function
    derivative: Function
    module: Callable[[float], nn.Module]
    types: tuple[type[nn.Module], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    functions: tuple[Callable[..., Any], ...] = ()
    methods: tuple[str, ...] = ()
    kinks: tuple[float, ...] = ()
    sloped: bool = False
    homogeneous: bool = False
    invertible: bool = False
    selects: bool = False
    exponential: bool = False


def _silu_derivative(z: Tensor, _: float) -> Tensor:
    gate = torch.sigmoid(z)
    derivative: Tensor = gate * (1 + z * (1 - gate))
    return derivative


def _gelu_derivative(z: Tensor, _: float) -> Tensor:
    derivative: Tensor = torch.special.ndtr(z) + z * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return derivative


def _gelu_tanh_derivative(z: Tensor, _: float) -> Tensor:
    linear = 2 * math.sqrt(2 / math.pi)
    factor = linear + 0.044715 * linear * z.square().clamp(max=576)  # beyond that the derivative is 0 or 1
    both = z * factor  # (1 + tanh(u)) / 2 is the sigmoid of 2 u
    gate, rest = torch.sigmoid(both), torch.sigmoid(-both)
    derivative: Tensor = gate + z * (gate * rest) * (3 * factor - 2 * linear)
    return derivative


TABLE: dict[Name, Activation] = {
    "relu": Activation(
        value=lambda z, _: torch.relu(z),
        derivative=lambda z, _: (z > 0).to(z.dtype),
        module=lambda _: nn.ReLU(),
        types=(nn.ReLU,),
        functions=(functional.relu, torch.relu, torch.relu_),
        methods=("relu", "relu_"),
        kinks=(0.0,),
        homogeneous=True,
        selects=True,
    ),
    "leaky_relu": Activation(
        value=functional.leaky_relu,
        derivative=lambda z, slope: torch.where(z > 0, torch.ones_like(z), slope),
        module=nn.LeakyReLU,
        types=(nn.LeakyReLU,),
        functions=(functional.leaky_relu,),
        kinks=(0.0,),
        sloped=True,
        homogeneous=True,
        invertible=True,
    ),
    "silu": Activation(
        value=lambda z, _: functional.silu(z),
        derivative=_silu_derivative,
        module=lambda _: nn.SiLU(),
        types=(nn.SiLU,),
        functions=(functional.silu,),
        exponential=True,
    ),
    "gelu": Activation(
        value=lambda z, _: functional.gelu(z),
        derivative=_gelu_derivative,
        module=lambda _: nn.GELU(),
        types=(nn.GELU,),
        settings={"approximate": "none"},
        functions=(functional.gelu,),
        exponential=True,
    ),
    "gelu_tanh": Activation(
        value=lambda z, _: functional.gelu(z, approximate="tanh"),
        derivative=_gelu_tanh_derivative,
        module=lambda _: nn.GELU("tanh"),
        types=(nn.GELU,),
        settings={"approximate": "tanh"},
        exponential=True,
    ),
    "hardswish": Activation(
        value=lambda z, _: functional.hardswish(z),
        derivative=lambda z, _: torch.where(z <= -3, torch.zeros_like(z), torch.where(z < 3, z / 3 + 0.5, 1.0)),
        module=lambda _: nn.Hardswish(),
        types=(nn.Hardswish,),
        functions=(functional.hardswish,),
        kinks=(-3.0, 3.0),
    ),
    "relu6": Activation(
        value=lambda z, _: functional.relu6(z),
        derivative=lambda z, _: ((z > 0) & (z < 6)).to(z.dtype),
        module=lambda _: nn.ReLU6(),
        types=(nn.ReLU6, nn.Hardtanh),
        settings={"min_val": 0.0, "max_val": 6.0},
        functions=(functional.relu6,),
        kinks=(0.0, 6.0),
        selects=True,
    ),
    "hardtanh": Activation(
        value=lambda z, _: functional.hardtanh(z),
        derivative=lambda z, _: ((z > -1) & (z < 1)).to(z.dtype),
        module=lambda _: nn.Hardtanh(),
        types=(nn.Hardtanh,),
        settings={"min_val": -1.0, "max_val": 1.0},
        functions=(functional.hardtanh,),
        kinks=(-1.0, 1.0),
        selects=True,
    ),
}


class _Rows(dict[str, Activation]):
    """Rows by name, and an error that says which there are."""

    def __missing__(self, name: str) -> Activation:
        raise ValueError(f"unknown activation {name!r}, expected one of {', '.join(self)}")


ACTIVATIONS = tuple(TABLE)
FUNCTION_NAMES = {function.__name__ for row in TABLE.values() for function in row.functions} | {
    method for row in TABLE.values() for method in row.methods
}
NONE, INVERSE = "none", "inverse_leaky_relu"
# What the operators take. The last is of a backward whose x is what a leaky ReLU made of the layer's input.
EPILOGUES = _Rows(
    {
        NONE: Activation(
            value=lambda z, _: z,
            derivative=lambda z, _: torch.ones_like(z),
            module=lambda _: nn.Identity(),
            homogeneous=True,
            invertible=True,
            selects=True,
        ),
        **{str(name): row for name, row in TABLE.items()},
        INVERSE: TABLE["leaky_relu"],
    }
)


def activate(z: Tensor, activation: str, slope: float) -> Tensor:
    """Computes ``act(z)``; ``slope`` is leaky ReLU's for negative z."""
    return EPILOGUES[activation].value(z, slope)


def activation_slope(z: Tensor, activation: str, slope: float) -> Tensor:
    """Computes ``act'(z)``."""
    return EPILOGUES[activation].derivative(z, slope)


def as_module(activation: str, slope: float) -> nn.Module:
    """Makes the activation as a module of PyTorch's."""
    return EPILOGUES[activation].module(slope)


def of_module(module: nn.Module) -> tuple[Name, float] | None:
    """Finds the activation that a module of PyTorch's computes, and its slope; None where it is not one of ours."""
    for name, row in TABLE.items():
        if is_plain(module, row.types) and all(getattr(module, key) == value for key, value in row.settings.items()):
            return name, float(module.negative_slope) if row.sloped else 0.0  # type: ignore[arg-type]
    return None


def of_function(target: Any, /, *args: Any, **options: Any) -> tuple[Name, float] | None:
    """Finds the activation that a function, or a method by its name, computes; None where it is not one of ours.

    ``args`` and ``options`` are those of the call, of which the first is the tensor.
    """
    for name, row in TABLE.items():
        if target not in row.functions + row.methods:
            continue
        given, more = {key: value for key, value in options.items() if key != "inplace"}, list(args[1:])
        slope = 0.0
        if row.sloped:
            slope = given.pop("negative_slope", more.pop(0) if more else 0.01)
        known = all(type(value) is bool for value in more) and given.items() <= row.settings.items()  # in place, or not
        return (name, float(slope)) if known and isinstance(slope, (int, float)) else None
    return None
