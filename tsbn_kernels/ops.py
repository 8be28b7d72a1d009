"""The operators ``torch.ops.tsbn.*``: schemas, fake kernels, and which backend implements them on which device.

All are functional. ``x`` is a stacked activation that :func:`tsbn_kernels.layout.family` accepts, or where ``shared``
is set one input ``[N, C, *]`` for all tasks; ``residual`` and ``dy`` are stacked, of its family. Parameters and
statistics are ``[T, C]``; statistics are float64 for float64 input, else float32; moments are float64. ``activation``
is ``"none"`` or one of :data:`tsbn_kernels.activations.ACTIVATIONS`; the backward takes ``"inverse_leaky_relu"`` too
(see the reference).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tsbn_kernels import backends, layout, reference
from tsbn_kernels.backends import cpu, cuda, triton
from tsbn_kernels.reference import accumulate_dtype

_library = torch.library.Library("tsbn", "DEF")

_EPILOGUE = 'Tensor? residual=None, str activation="none", float slope=0.0, bool shared=False'

_library.define(
    "forward_training(Tensor x, Tensor weight, Tensor? bias, int num_tasks, float eps, str gate, str stacking,"
    f" {_EPILOGUE}) -> (Tensor y, Tensor mean, Tensor var)"
)
_library.define(
    "forward_eval(Tensor x, Tensor weight, Tensor? bias, Tensor mean, Tensor var, int num_tasks, float eps, str gate,"
    f" str stacking, {_EPILOGUE}) -> Tensor"
)
_library.define(
    "backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor var, int num_tasks, float eps, str gate,"
    " str stacking, bool training, bool need_dx, bool need_dweight, bool need_dbias, Tensor? bias=None,"
    f" {_EPILOGUE}, bool need_dresidual=False) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)"
)
# For a batch that is spread over processes: see tsbn_kernels/synchronized.py.
_library.define("moments(Tensor x, int num_tasks, str stacking, bool shared=False) -> (Tensor mean, Tensor var)")
_library.define(
    "input_gradient(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor var, Tensor dz_mean, Tensor dz_xhat_mean,"
    f" int num_tasks, float eps, str gate, str stacking, Tensor? bias=None, {_EPILOGUE}, bool need_dresidual=False)"
    " -> (Tensor dx, Tensor dresidual)"
)

# The reference serves every device for which no backend registers kernels of its own. On CUDA devices Triton comes
# first, CUDA C++ where Triton is missing or broken.
_NAMES = ("forward_training", "forward_eval", "backward", "moments", "input_gradient")
cuda.load()
for _name in _NAMES:
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
    for _key in triton.DISPATCH_KEYS:
        _otherwise = cuda if cuda.available and _key == cuda.DISPATCH_KEY else reference
        if triton.available:
            _library.impl(_name, triton.operator_or(_name, getattr(_otherwise, _name)), _key)
        elif _otherwise is cuda:
            _library.impl(_name, getattr(cuda, _name), _key)
cpu.load()
backends.force_from_environment()


class Operators(NamedTuple):
    """The functions that every backend implements."""

    forward_training: Callable[..., Any]
    forward_eval: Callable[..., Any]
    backward: Callable[..., Any]
    moments: Callable[..., Any]
    input_gradient: Callable[..., Any]


def _below_autograd(function: Callable[..., Any]) -> Callable[..., Any]:
    """As the dispatcher calls it: its results are no views of each other, so that they may be changed in place."""

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*arguments)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return function(*arguments)

    return call


_dispatched = Operators(*(getattr(torch.ops.tsbn, name).default for name in _NAMES))
_reference = Operators(*(_below_autograd(getattr(reference, name)) for name in _NAMES))
_cuda = Operators(*(getattr(cuda, name) for name in _NAMES))


@cache
def _triton() -> Operators:
    return Operators(*map(triton.operator, _NAMES))


def operators(backend: str | None) -> Operators:
    """The operators of a backend; of the one that the dispatcher picks where it is None."""
    if backend == "reference":
        return _reference
    if backend == "cuda":
        return _cuda
    return _triton() if backend == "triton" else _dispatched


@torch.library.register_fake("tsbn::forward_training", lib=_library)
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    num_tasks: int,
    eps: float,
    gate: str,
    stacking: str,
    residual: Tensor | None = None,
    activation: str = "none",
    slope: float = 0.0,
    shared: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    mean = weight.new_empty(weight.shape, dtype=accumulate_dtype(x.dtype))
    return layout.empty_output(x, num_tasks, stacking, shared), mean, torch.empty_like(mean)


@torch.library.register_fake("tsbn::forward_eval", lib=_library)
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    num_tasks: int,
    eps: float,
    gate: str,
    stacking: str,
    residual: Tensor | None = None,
    activation: str = "none",
    slope: float = 0.0,
    shared: bool = False,
) -> Tensor:
    return layout.empty_output(x, num_tasks, stacking, shared)


@torch.library.register_fake("tsbn::backward", lib=_library)
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    num_tasks: int,
    eps: float,
    gate: str,
    stacking: str,
    training: bool,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    slope: float = 0.0,
    shared: bool = False,
    need_dresidual: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = layout.empty_like(x, layout.input_stacking(stacking, shared)) if need_dx else x.new_empty(0)
    dweight, dbias = (weight.new_empty(weight.shape if needed else 0) for needed in (need_dweight, need_dbias))
    dresidual = layout.empty_output(x, num_tasks, stacking, shared) if need_dresidual else x.new_empty(0)
    return dx, dweight, dbias, dresidual


@torch.library.register_fake("tsbn::moments", lib=_library)
def _(x: Tensor, num_tasks: int, stacking: str, shared: bool = False) -> tuple[Tensor, Tensor]:
    channels = x.shape[layout.channel_axis(layout.input_stacking(stacking, shared))]
    mean = x.new_empty((num_tasks, channels), dtype=torch.float64)
    return mean, torch.empty_like(mean)


@torch.library.register_fake("tsbn::input_gradient", lib=_library)
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    dz_mean: Tensor,
    dz_xhat_mean: Tensor,
    num_tasks: int,
    eps: float,
    gate: str,
    stacking: str,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    slope: float = 0.0,
    shared: bool = False,
    need_dresidual: bool = False,
) -> tuple[Tensor, Tensor]:
    dresidual = layout.empty_output(x, num_tasks, stacking, shared) if need_dresidual else x.new_empty(0)
    return layout.empty_like(x, layout.input_stacking(stacking, shared)), dresidual
