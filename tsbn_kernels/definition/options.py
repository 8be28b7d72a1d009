"""What a call of the layer is made of, by name: what it is asked for, reads and returns, and who computes it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Options(NamedTuple):
    """All of a call but its tensors.

    Attributes:
        num_tasks: T.
        eps: added to the variance.
        gate: ``"sigmoid"`` or ``"identity"``.
        stacking: of what has T streams, see :mod:`tsbn_kernels.definition.layout`.
        activation: a name of :data:`tsbn_kernels.definition.activations.EPILOGUES`.
        slope: of negative values, where the activation has one.
        fan_out: x is one input ``[N, C, *]`` that all tasks share, rather than stacked.
    """

    num_tasks: int
    eps: float
    gate: str
    stacking: str
    activation: str = "none"
    slope: float = 0.0
    fan_out: bool = False


class Needs(NamedTuple):
    """Which gradients are needed."""

    dx: bool
    dweight: bool
    dbias: bool
    dresidual: bool


class Saved(NamedTuple):
    """What a pass by given statistics reads, beside a backward pass's dy: activations, and vectors ``[T, C]``."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    mean: Tensor
    var: Tensor


class Running(NamedTuple):
    """Running statistics that a forward pass in training updates in place; None where there are none.

    Attributes:
        mean, var: ``[R, C]``.
        batches: how many were seen, int64 ``[R]``.
        momentum: the batch's share; a tensor broadcasts over ``[T, C]``. None: 1 / batches, the cumulative average.
        rows: the row of each task, int64 ``[T]``; None: there are T rows, in the order of the tasks.
    """

    mean: Tensor | None = None
    var: Tensor | None = None
    batches: Tensor | None = None
    momentum: float | Tensor | None = 0.1
    rows: Tensor | None = None


NOT_TRACKED = Running(momentum=None)  # nothing to update


class Normalized(NamedTuple):
    """The output, and the statistics ``[T, C]`` that it was normalised by."""

    y: Tensor
    mean: Tensor
    var: Tensor


class Moments(NamedTuple):
    """Mean and biased variance, ``[T, C]``."""

    mean: Tensor
    var: Tensor


class Gradients(NamedTuple):
    """Gradients, None where they are not needed."""

    dx: Tensor | None = None
    dweight: Tensor | None = None
    dbias: Tensor | None = None
    dresidual: Tensor | None = None


class Backend(Protocol):
    """The operators of batch normalisation, which :mod:`tsbn_kernels.definition.batch_norm` defines.

    A backend may lack some of them: the reference takes their place.
    """

    def forward_training(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, options: Options
    ) -> Normalized:
        """Normalises by the batch's own statistics."""

    def forward_tracked(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        running: Running,
        options: Options,
    ) -> Normalized:
        """Normalises by the batch's own statistics, and updates the running ones by them.

        The batch is not empty, the running statistics are contiguous, and their momentum is no tensor.
        """

    def forward_eval(self, saved: Saved, options: Options) -> Tensor:
        """Normalises by given statistics."""

    def backward(self, dy: Tensor, saved: Saved, training: bool, needs: Needs, options: Options) -> Gradients:
        """Computes the gradients that are needed; ``training``: the statistics are those of x."""

    def moments(self, x: Tensor, options: Options) -> Moments:
        """Computes the statistics in float64, by no other options than how x is read."""

    def input_gradient(
        self, dy: Tensor, saved: Saved, dz_mean: Tensor, dz_xhat_mean: Tensor, needs_dresidual: bool, options: Options
    ) -> Gradients:
        """Computes the gradients of x and residual of a part of a batch, by means ``[T, C]`` over the whole of it."""


class TwiceBackend(Backend, Protocol):
    """The operators of the second derivative too, which :mod:`tsbn_kernels.definition.double_backward` defines.

    They know no activation and no fan-out: see :mod:`tsbn_kernels.operator.double_backward`.
    """

    def double_backward_sums(self, ddx: Tensor, dy: Tensor, x: Tensor, mean: Tensor, options: Options) -> Tensor:
        """Computes the sums of a second derivative, float64 ``[5, T, C]``."""

    def double_backward(
        self, ddx: Tensor, dy: Tensor, x: Tensor, mean: Tensor, factors: Tensor, options: Options
    ) -> tuple[Tensor, Tensor]:
        """Computes the gradients of dy and x by factors ``[7, T, C]``."""


class MixedBackend(Protocol):
    """The operators of mixed batches, which :mod:`tsbn_kernels.definition.mixed_batch_norm` defines.

    x, residual and dy are ``[N, C, *]``, and ``task_of_sample`` int64 ``[N]`` tells the task of each sample.
    """

    def mixed_forward_training(
        self,
        x: Tensor,
        task_of_sample: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        options: Options,
    ) -> Normalized:
        """Normalises each task by the statistics of its own samples."""

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
        """Normalises each task by its own samples, and updates the running statistics of tasks that have some.

        The batch is not empty, the running statistics are contiguous, and their momentum is no tensor. A task with one
        value per channel is an error.
        """

    def mixed_forward_eval(self, saved: Saved, task_of_sample: Tensor, options: Options) -> Tensor:
        """Normalises by given statistics."""

    def mixed_backward(
        self, dy: Tensor, saved: Saved, task_of_sample: Tensor, training: bool, needs: Needs, options: Options
    ) -> Gradients:
        """Computes the gradients that are needed; ``training``: the statistics are those of x."""


def of_input(options: Options) -> Options:
    """The options of x alone: one that all tasks share is the batch of one task, stacked along its first dimension."""
    return Options(1, options.eps, options.gate, "task_major") if options.fan_out else options


class LayerOptions(NamedTuple):
    """All of a call of layer normalisation but its tensors.

    Attributes:
        num_tasks: T.
        eps: added to the variance, or to the mean square.
        gate: ``"sigmoid"`` or ``"identity"``.
        stacking: of what has T streams, see :mod:`tsbn_kernels.definition.layout`.
        rms: divide by the root of the mean square, and subtract no mean.
        fan_out: x is one input ``[N, *]`` that all tasks share, rather than stacked.
    """

    num_tasks: int
    eps: float
    gate: str
    stacking: str
    rms: bool = False
    fan_out: bool = False


class LayerNeeds(NamedTuple):
    """Which gradients of layer normalisation are needed; that of x is that of the residual too."""

    dx: bool
    dweight: bool
    dbias: bool


class LayerSaved(NamedTuple):
    """What a backward pass of layer normalisation reads beside dy: what was normalised, and its R rows' statistics."""

    s: Tensor
    weight: Tensor
    mean: Tensor | None
    rstd: Tensor

    def contiguous(self) -> LayerSaved:
        """Makes all of it contiguous, as kernels read it."""
        return LayerSaved._make(None if tensor is None else tensor.contiguous() for tensor in self)


class LayerNormalized(NamedTuple):
    """The output, ``x + residual`` where there is a residual, and the statistics ``[R]``: no mean in the RMS form."""

    y: Tensor
    s: Tensor | None
    mean: Tensor | None
    rstd: Tensor


class LayerGradients(NamedTuple):
    """Gradients of layer normalisation, None where they are not needed."""

    dx: Tensor | None = None
    dweight: Tensor | None = None
    dbias: Tensor | None = None


class LayerBackend(Protocol):
    """The operators of layer normalisation, which :mod:`tsbn_kernels.definition.layer_norm` defines."""

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, options: LayerOptions
    ) -> LayerNormalized:
        """Normalises each row of ``x + residual``."""

    def layer_norm_backward(
        self, dy: Tensor, ds: Tensor | None, saved: LayerSaved, needs: LayerNeeds, options: LayerOptions
    ) -> LayerGradients:
        """Computes the gradients that are needed, from those of y and of ``s = x + residual``."""

    def layer_norm_double_backward(
        self, ddx: Tensor, dy: Tensor, saved: LayerSaved, factors: Tensor, options: LayerOptions
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes the gradients of dy and s, and sums for that of the weight, from that of dx and by factors."""


class MixedLayerBackend(Protocol):
    """The operators of mixed batches, which :mod:`tsbn_kernels.definition.mixed_layer_norm` defines.

    ``task_of_sample`` is int64 ``[N]``, and tells the task of each sample of x, ``[N, *, *normalized_shape]``.
    """

    def mixed_layer_norm(
        self,
        x: Tensor,
        task_of_sample: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        options: LayerOptions,
    ) -> LayerNormalized:
        """Normalises each row of ``x + residual``."""

    def mixed_layer_norm_backward(
        self,
        dy: Tensor,
        ds: Tensor | None,
        saved: LayerSaved,
        task_of_sample: Tensor,
        needs: LayerNeeds,
        options: LayerOptions,
    ) -> LayerGradients:
        """Computes the gradients that are needed, from those of y and of ``s = x + residual``."""
