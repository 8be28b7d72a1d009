"""The operators of mixed batches: schemas, adapters and fake kernels.

``x``, ``residual`` and ``dy`` are ``[N, C, *]`` with any strides, ``task_of_sample`` is int64 ``[N]``. Parameters and
statistics are ``[T, C]``, and tell T; statistics are float64 for float64 input, else float32. A gradient that is not
needed is an empty tensor. ``mixed_forward_tracked`` alone changes what it is given, the running statistics: it is for
eager code, and called below autograd. The CPU has kernels of its own, and so have the GPUs' backends for short samples;
else those of equal tasks serve (:mod:`tsbn_kernels.operator.mixed_parts`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from tsbn_kernels.backends.plan.mixed import walks
from tsbn_kernels.definition import layout
from tsbn_kernels.definition.batch_norm import empty_statistics
from tsbn_kernels.definition.options import Gradients, MixedBackend, Needs, Normalized, Options, Running, Saved
from tsbn_kernels.operator import ops
from tsbn_kernels.operator.mixed_parts import Parts
from tsbn_kernels.operator.registry import MixedNormalization, Operator, or_empty

if TYPE_CHECKING:
    from tsbn_kernels.definition import mixed_batch_norm as reference

    _backends: tuple[MixedBackend, ...] = (reference,)


class MixedOperators(NamedTuple):
    """The functions of a backend, by the names of the operators."""

    mixed_forward_training: Callable[..., Any]
    mixed_forward_tracked: Callable[..., Any]
    mixed_forward_eval: Callable[..., Any]
    mixed_backward: Callable[..., Any]


_TENSORS = "Tensor x, Tensor task_of_sample, Tensor weight, Tensor? bias, Tensor? residual"
_HOW = 'float eps, str gate, str activation="none", float slope=0.0'
_NO_EPILOGUE = ("none", 0.0)
_RUNNING = ("running_mean", "running_var", "batches", "momentum")
_NEEDS = ", ".join(f"bool need_{gradient}=True" for gradient in Needs._fields)


def _options(given: dict[str, Any]) -> Options:
    eps, gate, *epilogue = (given.pop(name) for name in ("eps", "gate", "activation", "slope"))
    return Options(given["weight"].shape[0], eps, gate, "task_major", *epilogue)


def _flat(options: Options) -> tuple[Any, ...]:
    return options.eps, options.gate, options.activation, options.slope


def _last(options: Options) -> tuple[Any, ...]:
    """The options at the end of the arguments, without an epilogue that does nothing: see ``ops.Dispatched``."""
    flat = _flat(options)
    return flat[:2] if flat[2:] == _NO_EPILOGUE else flat


def _tracked(
    run: Callable[..., Normalized],
    options: Options,
    *,
    x: Tensor,
    task_of_sample: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    **running: Any,
) -> Normalized:
    statistics = Running(*(running[name] for name in _RUNNING))
    return run(x, task_of_sample, weight, bias, residual, statistics, options)


def _eval(run: Callable[..., Tensor], options: Options, *, task_of_sample: Tensor, **saved: Any) -> Tensor:
    return run(Saved(**saved), task_of_sample, options)


def _backward(
    run: Callable[..., Gradients],
    options: Options,
    *,
    dy: Tensor,
    task_of_sample: Tensor,
    training: bool,
    **more: Any,
) -> tuple[Tensor, ...]:
    needs = Needs(*(more.pop(f"need_{gradient}") for gradient in Needs._fields))
    saved = Saved(**more)
    found = run(dy, saved, task_of_sample, training, needs, options)
    return tuple(map(or_empty, found, (saved.x, saved.weight, saved.weight, saved.x)))


class Dispatched:
    """The operators by the backend that the dispatcher picks.

    Args:
        flat: the operators of ``torch.ops``.
    """

    def __init__(self, flat: MixedOperators) -> None:
        self.flat = flat

    def mixed_forward_training(
        self,
        x: Tensor,
        task_of_sample: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        options: Options,
    ) -> Normalized:
        found = self.flat.mixed_forward_training(x, task_of_sample, weight, bias, residual, *_last(options))
        return Normalized._make(found)

    def mixed_forward_tracked(
        self,
        x: Tensor,
        task_of_sample: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        running: Running,
        options: Options,
    ) -> Normalized:
        flat = *running[:4], *_last(options)
        return Normalized._make(self.flat.mixed_forward_tracked(x, task_of_sample, weight, bias, residual, *flat))

    def mixed_forward_eval(self, saved: Saved, task_of_sample: Tensor, options: Options) -> Tensor:
        x, *vectors = saved
        y: Tensor = self.flat.mixed_forward_eval(x, task_of_sample, *vectors, *_last(options))
        return y

    def mixed_backward(
        self, dy: Tensor, saved: Saved, task_of_sample: Tensor, training: bool, needs: Needs, options: Options
    ) -> Gradients:
        x, *vectors = saved
        found = self.flat.mixed_backward(dy, x, task_of_sample, *vectors, *_flat(options), training, *needs)
        return Gradients(*(gradient if need else None for gradient, need in zip(found, needs, strict=True)))


class _Fake:
    """A backend that allocates its results."""

    @staticmethod
    def mixed_forward_training(
        x: Tensor,
        task_of_sample: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        options: Options,
    ) -> Normalized:
        return Normalized(layout.empty_output(x, options), *empty_statistics(weight, x))

    @staticmethod
    def mixed_forward_tracked(*operands: Any) -> Normalized:
        x, task_of_sample, weight, bias, residual, _, options = operands
        return _Fake.mixed_forward_training(x, task_of_sample, weight, bias, residual, options)

    @staticmethod
    def mixed_forward_eval(saved: Saved, task_of_sample: Tensor, options: Options) -> Tensor:
        return layout.empty_output(saved.x, options)

    @staticmethod
    def mixed_backward(
        dy: Tensor, saved: Saved, task_of_sample: Tensor, training: bool, needs: Needs, options: Options
    ) -> Gradients:
        return layout.empty_gradients(saved.x, saved.weight, needs, options)


def _short(first: Tensor | Saved, *_: Any) -> bool:
    """Whether samples are too short to be tasks of their own, by x, or by dy, which has its shape."""
    return walks(first.x if isinstance(first, Saved) else first)


mixed: MixedNormalization[MixedBackend] = MixedNormalization(
    lambda backend: Parts(ops.eager_operators(backend)),
    _short,
    MixedOperators,
    {
        "mixed_forward_training": Operator(
            f"({_TENSORS}, {_HOW}) -> (Tensor y, Tensor mean, Tensor var)",
            lambda run, options, **tensors: run(**tensors, options=options),
        ),
        "mixed_forward_tracked": Operator(
            f"({_TENSORS}, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? batches, float? momentum,"
            f" {_HOW}) -> (Tensor y, Tensor mean, Tensor var)",
            _tracked,
        ),
        "mixed_forward_eval": Operator(f"({_TENSORS}, Tensor mean, Tensor var, {_HOW}) -> Tensor", _eval),
        "mixed_backward": Operator(
            f"(Tensor dy, {_TENSORS}, Tensor mean, Tensor var, {_HOW}, bool training=True, {_NEEDS})"
            " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
            _backward,
        ),
    },
    _options,
    {},
    Dispatched,
    _Fake(),
)
operators, eager_operators = mixed.operators, mixed.eager
