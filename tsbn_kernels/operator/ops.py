"""The operators of batch normalisation: schemas, adapters and fake kernels.

Their arguments are flat; this file alone makes them of what a :class:`tsbn_kernels.definition.options.Backend` takes,
and back. ``x`` is a stacked activation, or where ``shared`` (``fan_out``) is set one input ``[N, C, *]`` for all tasks;
``residual`` and ``dy`` are stacked. They may have any strides: :func:`tsbn_kernels.definition.layout.readable` tells
which are copied. Parameters and statistics are ``[T, C]``; statistics are float64 for float64 input, else float32;
moments are float64. ``activation`` is ``"none"`` or one of
:data:`tsbn_kernels.definition.activations.ACTIVATIONS`; the backward takes ``"inverse_leaky_relu"`` too (see the
reference). A gradient that is not needed is an empty tensor. ``forward_tracked`` alone changes what it is given, the
running statistics: it is for eager code, and called below autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from tsbn_kernels.definition import layout
from tsbn_kernels.definition.batch_norm import empty_statistics
from tsbn_kernels.definition.options import (
    Backend,
    Gradients,
    Moments,
    Needs,
    Normalized,
    Options,
    Running,
    Saved,
    TwiceBackend,
    of_input,
)
from tsbn_kernels.operator.registry import Normalization, Operator, or_empty

if TYPE_CHECKING:
    from tsbn_kernels.backends import cuda
    from tsbn_kernels.backends.triton import ops as triton_operators
    from tsbn_kernels.definition import batch_norm as reference

    _backends: tuple[Backend, ...] = (triton_operators, cuda, reference)


class Operators(NamedTuple):
    """The functions of a backend, by the names of the operators."""

    forward_training: Callable[..., Any]
    forward_tracked: Callable[..., Any]
    forward_eval: Callable[..., Any]
    backward: Callable[..., Any]
    moments: Callable[..., Any]
    input_gradient: Callable[..., Any]
    double_backward_sums: Callable[..., Any]
    double_backward: Callable[..., Any]


# ---- the schemas: options are fields of Options, those that have defaults follow the residual ------------------------

_FLAT_NAMES = {name: "shared" if name == "fan_out" else name for name in Options._fields}
_RUNNING = ("running_mean", "running_var", "batches", "momentum", "rows")
_NOT_ASKED = {"eps": 0.0, "gate": "identity"}  # of moments and of the second derivative


def _parameters(names: tuple[str, ...]) -> str:
    """Options as parameters of a schema; their types have the names that Python has for them."""
    texts, types = [], get_type_hints(Options)
    for name in names:
        text = f"{types[name].__name__} {_FLAT_NAMES[name]}"
        if name in Options._field_defaults:
            text += f"={Options._field_defaults[name]!r}".replace("'", '"')
        texts.append(text)
    return ", ".join(texts)


_EPILOGUE = f"Tensor? residual=None, {_parameters(tuple(Options._field_defaults))}"
_OPTIONS = _parameters(tuple(name for name in Options._fields if name not in Options._field_defaults))
_READ = f"Tensor ddx, Tensor dy, Tensor x, Tensor mean, {{}}{_parameters(('num_tasks', 'stacking'))}"
SCHEMAS = {
    "forward_training": (
        f"(Tensor x, Tensor weight, Tensor? bias, {_OPTIONS}, {_EPILOGUE}) -> (Tensor y, Tensor mean, Tensor var)"
    ),
    # In a graph the statistics are updated beside the layer.
    "forward_tracked": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var,"
        f" Tensor(c!)? batches, float? momentum, Tensor? rows, {_OPTIONS}, {_EPILOGUE})"
        " -> (Tensor y, Tensor mean, Tensor var)"
    ),
    "forward_eval": (
        f"(Tensor x, Tensor weight, Tensor? bias, Tensor mean, Tensor var, {_OPTIONS}, {_EPILOGUE}) -> Tensor"
    ),
    "backward": (
        f"(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor var, {_OPTIONS}, bool training, bool need_dx,"
        f" bool need_dweight, bool need_dbias, Tensor? bias=None, {_EPILOGUE}, bool need_dresidual=False)"
        " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)"
    ),
    # For a batch that is spread over processes: see tsbn_kernels/operator/autograd_synchronized.py.
    "moments": f"(Tensor x, {_parameters(('num_tasks', 'stacking', 'fan_out'))}) -> (Tensor mean, Tensor var)",
    "input_gradient": (
        "(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor var, Tensor dz_mean, Tensor dz_xhat_mean,"
        f" {_OPTIONS}, Tensor? bias=None, {_EPILOGUE}, bool need_dresidual=False) -> (Tensor dx, Tensor dresidual)"
    ),
    # Of the second derivative: see tsbn_kernels/operator/double_backward.py.
    "double_backward_sums": f"({_READ.format('')}) -> Tensor",
    "double_backward": f"({_READ.format('Tensor factors, ')}) -> (Tensor ddy, Tensor dx)",
}


# ---- from flat arguments to a backend --------------------------------------------------------------------------------


def _forward_tracked(
    run: Callable[..., Normalized],
    options: Options,
    *,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    **running: Any,
) -> Normalized:
    return run(x, weight, bias, residual, Running(*(running[name] for name in _RUNNING)), options)


def _backward(
    run: Callable[..., Gradients], options: Options, *, dy: Tensor, training: bool, **more: Any
) -> tuple[Tensor, ...]:
    needs = Needs(*(more.pop(f"need_{gradient}") for gradient in Needs._fields))
    saved = Saved(**more)
    found, like = run(dy, saved, training, needs, options), (saved.x, saved.weight, saved.weight, saved.x)
    return tuple(map(or_empty, found, like))


def _input_gradient(
    run: Callable[..., Gradients], options: Options, *, dy: Tensor, need_dresidual: bool, **more: Any
) -> tuple[Tensor, Tensor]:
    means = more.pop("dz_mean"), more.pop("dz_xhat_mean")
    saved = Saved(**more)
    found = run(dy, saved, *means, need_dresidual, options)
    return or_empty(found.dx, saved.x), or_empty(found.dresidual, saved.x)


_ADAPTERS: dict[str, Callable[..., Any]] = {
    "forward_training": lambda run, options, x, weight, bias, residual: run(x, weight, bias, residual, options),
    "forward_tracked": _forward_tracked,
    "forward_eval": lambda run, options, **saved: run(Saved(**saved), options),
    "backward": _backward,
    "moments": lambda run, options, x: run(x, options),
    "input_gradient": _input_gradient,
    "double_backward_sums": lambda run, options, **read: run(**read, options=options),
    "double_backward": lambda run, options, **read: run(**read, options=options),
}


def _options(given: dict[str, Any]) -> Options:
    return Options(*[given.pop(name) for name in _FLAT_NAMES.values()])


# ---- from what a backend takes to the dispatcher ---------------------------------------------------------------------


_NO_EPILOGUE = list(Options._field_defaults.values())


class Dispatched:
    """The operators by the backend that the dispatcher picks.

    An epilogue that does nothing is left out: of each argument PyTorch asks whether it is a tensor.

    Args:
        flat: the operators of ``torch.ops``.
    """

    def __init__(self, flat: Operators) -> None:
        self.flat = flat

    def forward_training(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, options: Options
    ) -> Normalized:
        num_tasks, eps, gate, stacking, *end = options
        epilogue = () if residual is None and end == _NO_EPILOGUE else (residual, *end)
        return Normalized._make(self.flat.forward_training(x, weight, bias, num_tasks, eps, gate, stacking, *epilogue))

    def forward_tracked(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        running: Running,
        options: Options,
    ) -> Normalized:
        num_tasks, eps, gate, stacking, *end = options
        epilogue = () if residual is None and end == _NO_EPILOGUE else (residual, *end)
        return Normalized._make(
            self.flat.forward_tracked(x, weight, bias, *running, num_tasks, eps, gate, stacking, *epilogue)
        )

    def forward_eval(self, saved: Saved, options: Options) -> Tensor:
        x, weight, bias, residual, mean, var = saved
        num_tasks, eps, gate, stacking, *end = options
        epilogue = () if residual is None and end == _NO_EPILOGUE else (residual, *end)
        y: Tensor = self.flat.forward_eval(x, weight, bias, mean, var, num_tasks, eps, gate, stacking, *epilogue)
        return y

    def backward(self, dy: Tensor, saved: Saved, training: bool, needs: Needs, options: Options) -> Gradients:
        x, weight, bias, residual, mean, var = saved
        num_tasks, eps, gate, stacking, *end = options
        need_dx, need_dweight, need_dbias, need_dresidual = needs
        flags = training, need_dx, need_dweight, need_dbias
        plain = bias is None and residual is None and not need_dresidual and end == _NO_EPILOGUE
        epilogue = () if plain else (bias, residual, *end, need_dresidual)
        dx, dweight, dbias, dresidual = self.flat.backward(
            dy, x, weight, mean, var, num_tasks, eps, gate, stacking, *flags, *epilogue
        )
        return Gradients(
            dx if need_dx else None,
            dweight if need_dweight else None,
            dbias if need_dbias else None,
            dresidual if need_dresidual else None,
        )

    def moments(self, x: Tensor, options: Options) -> Moments:
        return Moments(*self.flat.moments(x, options.num_tasks, options.stacking, options.fan_out))

    def input_gradient(
        self, dy: Tensor, saved: Saved, dz_mean: Tensor, dz_xhat_mean: Tensor, needs_dresidual: bool, options: Options
    ) -> Gradients:
        x, weight, bias, residual, *statistics = saved
        num_tasks, eps, gate, stacking, *end = options
        means = dz_mean, dz_xhat_mean
        dx, dresidual = self.flat.input_gradient(
            dy, x, weight, *statistics, *means, num_tasks, eps, gate, stacking, bias, residual, *end, needs_dresidual
        )
        return Gradients(dx, dresidual=dresidual if needs_dresidual else None)

    def double_backward_sums(self, ddx: Tensor, dy: Tensor, x: Tensor, mean: Tensor, options: Options) -> Tensor:
        sums: Tensor = self.flat.double_backward_sums(ddx, dy, x, mean, options.num_tasks, options.stacking)
        return sums

    def double_backward(
        self, ddx: Tensor, dy: Tensor, x: Tensor, mean: Tensor, factors: Tensor, options: Options
    ) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.flat.double_backward(
            ddx, dy, x, mean, factors, options.num_tasks, options.stacking
        )
        return found


# ---- fake kernels: shapes, dtypes and strides of the results ---------------------------------------------------------


class _Fake:
    """A backend that allocates its results."""

    @staticmethod
    def forward_training(
        x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, options: Options
    ) -> Normalized:
        return Normalized(layout.empty_output(x, options), *empty_statistics(weight, x))

    @staticmethod
    def forward_tracked(
        x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, running: Running, options: Options
    ) -> Normalized:
        return _Fake.forward_training(x, weight, bias, residual, options)

    @staticmethod
    def forward_eval(saved: Saved, options: Options) -> Tensor:
        return layout.empty_output(saved.x, options)

    @staticmethod
    def backward(dy: Tensor, saved: Saved, training: bool, needs: Needs, options: Options) -> Gradients:
        return layout.empty_gradients(saved.x, saved.weight, needs, options)

    @staticmethod
    def moments(x: Tensor, options: Options) -> Moments:
        channels = x.shape[layout.channel_axis(of_input(options).stacking)]
        mean = x.new_empty((options.num_tasks, channels), dtype=torch.float64)
        return Moments(mean, torch.empty_like(mean))

    @staticmethod
    def input_gradient(
        dy: Tensor, saved: Saved, dz_mean: Tensor, dz_xhat_mean: Tensor, needs_dresidual: bool, options: Options
    ) -> Gradients:
        return _Fake.backward(dy, saved, True, Needs(True, False, False, needs_dresidual), options)

    @staticmethod
    def double_backward_sums(ddx: Tensor, dy: Tensor, x: Tensor, mean: Tensor, options: Options) -> Tensor:
        return mean.new_empty((5, *mean.shape), dtype=torch.float64)

    @staticmethod
    def double_backward(
        ddx: Tensor, dy: Tensor, x: Tensor, mean: Tensor, factors: Tensor, options: Options
    ) -> tuple[Tensor, Tensor]:
        return layout.empty_output(x, options), layout.empty_input(x, options)


_DEFAULTS = _NOT_ASKED | {_FLAT_NAMES[name]: value for name, value in Options._field_defaults.items()}
batch_norm: Normalization[TwiceBackend] = Normalization(
    Operators,
    {name: Operator(schema, _ADAPTERS[name]) for name, schema in SCHEMAS.items()},
    _options,
    _DEFAULTS,
    Dispatched,
    _Fake(),
)
complete, flat = batch_norm.complete, batch_norm.flat
operators, eager_operators = batch_norm.operators, batch_norm.eager
