"""The operators ``torch.ops.tsbn.*``: schemas, fake kernels, and which backend implements them on which device.

All are functional, and the forward ones differentiable (:mod:`tsbn_kernels.autograd`). ``x`` is a stacked activation,
or where ``shared`` is set one input ``[N, C, *]`` for all tasks; ``residual`` and ``dy`` are stacked. They may have any
strides: :func:`tsbn_kernels.layout.readable` tells which are copied. Parameters and statistics are ``[T, C]``;
statistics are float64 for float64 input, else float32; moments are float64. ``activation`` is ``"none"`` or one of
:data:`tsbn_kernels.activations.ACTIVATIONS`; the backward takes ``"inverse_leaky_relu"`` too (see the reference).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tsbn_kernels import backends, layout, reference
from tsbn_kernels.backends import cpu, cuda, triton
from tsbn_kernels.backends.fallback import guarded
from tsbn_kernels.reference import accumulate_dtype

library = torch.library.Library("tsbn", "DEF")

_EPILOGUE = 'Tensor? residual=None, str activation="none", float slope=0.0, bool shared=False'

# Inductor may pass any strides, and spares the copies that the traced ones would cost.
_TAGS = (torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag)

library.define(
    "forward_training(Tensor x, Tensor weight, Tensor? bias, int num_tasks, float eps, str gate, str stacking,"
    f" {_EPILOGUE}) -> (Tensor y, Tensor mean, Tensor var)",
    tags=_TAGS,
)
library.define(
    "forward_eval(Tensor x, Tensor weight, Tensor? bias, Tensor mean, Tensor var, int num_tasks, float eps, str gate,"
    f" str stacking, {_EPILOGUE}) -> Tensor",
    tags=_TAGS,
)
library.define(
    "backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor var, int num_tasks, float eps, str gate,"
    " str stacking, bool training, bool need_dx, bool need_dweight, bool need_dbias, Tensor? bias=None,"
    f" {_EPILOGUE}, bool need_dresidual=False) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
    tags=_TAGS,
)
# For a batch that is spread over processes: see tsbn_kernels/synchronized.py.
library.define(
    "moments(Tensor x, int num_tasks, str stacking, bool shared=False) -> (Tensor mean, Tensor var)", tags=_TAGS
)
library.define(
    "input_gradient(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor var, Tensor dz_mean, Tensor dz_xhat_mean,"
    f" int num_tasks, float eps, str gate, str stacking, Tensor? bias=None, {_EPILOGUE}, bool need_dresidual=False)"
    " -> (Tensor dx, Tensor dresidual)",
    tags=_TAGS,
)

# The reference serves every device for which no backend registers kernels of its own. On CUDA devices Triton comes
# first, then CUDA C++, then the reference: see fallback.py.
_NAMES = ("forward_training", "forward_eval", "backward", "moments", "input_gradient")
cuda.load()
for _name in _NAMES:
    library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
    for _key in triton.DISPATCH_KEYS:
        _chain = _last = getattr(reference, _name)
        if cuda.available and _key == cuda.DISPATCH_KEY:
            _chain = guarded(cuda.health, _name, partial(getattr, cuda), _chain)
        if triton.available:
            _chain = guarded(triton.health, _name, triton.operator, _chain)
        if _chain is not _last:
            library.impl(_name, _chain, _key)
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
    """Without autograd, which has an autograd.Function of its own in eager mode.

    The results of the reference are then no views of each other, so that they may be changed in place.
    """

    def call(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return function(*arguments)

    return call


_in_graphs = Operators(*(getattr(torch.ops.tsbn, name).default for name in _NAMES))
_reference_in_graphs = Operators(*(getattr(reference, name) for name in _NAMES))
_dispatched = Operators(*map(_below_autograd, _in_graphs))
_reference = Operators(*map(_below_autograd, _reference_in_graphs))
_cuda = Operators(*(getattr(cuda, name) for name in _NAMES))


@cache
def _triton() -> Operators:
    return Operators(*map(triton.operator, _NAMES))


def operators(backend: str | None) -> Operators:
    """The operators of a backend; of the one that the dispatcher picks where it is None.

    Those for a graph are differentiable. It holds the reference's formulas, or operators, of which the dispatcher picks
    the kernels when they run.

    Raises:
        RuntimeError: in a graph the dispatcher would not pick the backend.
    """
    if torch.compiler.is_compiling():
        if backend == "cuda" and triton.available:
            raise RuntimeError(
                "inside torch.compile and torch.export the backend 'cuda' runs only where Triton is not installed; "
                "compile without TSBN_BACKEND and use_backend, or call the layer outside of the compiled function"
            )
        plain = backend == "reference" or torch.onnx.is_in_onnx_export()  # ONNX knows none of our operators
        return _reference_in_graphs if plain else _in_graphs
    if backend == "reference":
        return _reference
    if backend == "cuda":
        return _cuda
    return _triton() if backend == "triton" else _dispatched


@torch.library.register_fake("tsbn::forward_training", lib=library)
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


@torch.library.register_fake("tsbn::forward_eval", lib=library)
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


@torch.library.register_fake("tsbn::backward", lib=library)
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


@torch.library.register_fake("tsbn::moments", lib=library)
def _(x: Tensor, num_tasks: int, stacking: str, shared: bool = False) -> tuple[Tensor, Tensor]:
    channels = x.shape[layout.channel_axis(layout.input_stacking(stacking, shared))]
    mean = x.new_empty((num_tasks, channels), dtype=torch.float64)
    return mean, torch.empty_like(mean)


@torch.library.register_fake("tsbn::input_gradient", lib=library)
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
