"""The ways to run a training step of batch normalisation for T tasks, and its activation: what PyTorch runs at once.

All do the same work: normalise by the batch, update running statistics with momentum 0.1, multiply by sigmoid(gamma),
and give gradients of the activation and of gamma. Parameters and statistics are float32 (float64 for float64).

None of them but :class:`CuDNN` runs cuDNN, whatever the memory format: PyTorch takes its own kernels for a batch
normalisation without a bias.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.layers.cases import DTYPES, Case, Inputs
from benchmarks.layers.peer import EPS, Outcome, Peer
from benchmarks.records.workloads import BATCH_NORM, NO_ACTIVATION
from tsbn_kernels import FusedTSigmaBN1d, FusedTSigmaBN2d
from tsbn_kernels.definition import activations
from tsbn_kernels.definition import batch_norm as reference
from tsbn_kernels.definition.options import Options

MOMENTUM = 0.1
SLOPE = 0.01  # of a leaky ReLU

# In place where the derivative does not need the input. A BatchNorm does not need its output.
_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda y: functional.relu(y, inplace=True),
    "leaky_relu": lambda y: functional.leaky_relu(y, SLOPE, inplace=True),
}
ACTIVATIONS = (NO_ACTIVATION, *activations.ACTIVATIONS)


def activate(y: Tensor, activation: str) -> Tensor:
    """The activation behind a BatchNorm, which may overwrite ``y``."""
    in_place = _IN_PLACE.get(activation)
    return activations.activate(y, activation, SLOPE) if in_place is None else in_place(y)


class SigmoidBatchNorm2d(nn.BatchNorm2d):
    """One task's ``nn.BatchNorm2d`` with sigmoid(weight) as its weight and no bias."""

    def __init__(self, num_features: int, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.register_parameter("bias", None)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        weight = torch.sigmoid(self.weight)
        return functional.batch_norm(
            x, self.running_mean, self.running_var, weight, None, self.training, self.momentum or 0.0, self.eps
        )


class LoopOfBatchNorms(nn.Module):
    """T BatchNorms in a Python loop: what a user writes without the fused layer.

    ``[T*N, C, *]`` is cut by ``chunk``, ``[T, N, C, *]`` by ``unbind``; ``cat`` joins the outputs to ``[T*N, C, *]``.
    """

    def __init__(self, num_tasks: int, num_features: int, **options: Any) -> None:
        super().__init__()
        self.norms = nn.ModuleList(SigmoidBatchNorm2d(num_features, **options) for _ in range(num_tasks))

    def forward(self, x: Tensor) -> Tensor:
        streams = x.unbind(0) if x.dim() == 5 else x.chunk(len(self.norms))
        return torch.cat([norm(stream) for norm, stream in zip(self.norms, streams, strict=True)])


@dataclass(frozen=True)
class BatchNormOutcome(Outcome):
    """The running statistics too, ``[T, C]``."""

    running_mean: Tensor
    running_var: Tensor


class BatchNormPeer(Peer):
    """One way to run batch normalisation and the activation behind it; its forward updates the running statistics."""

    norm = BATCH_NORM

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        self.batch, self.activation = case.batch, case.activation

    @abstractmethod
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Running mean and variance ``[T, C]``."""

    def step(self) -> BatchNormOutcome:
        """One forward and backward, for verification."""
        outcome = super().step()
        return BatchNormOutcome(outcome.y, outcome.dx, outcome.dgamma, *self.statistics())


class Fused(BatchNormPeer):
    """``FusedTSigmaBN`` on task-major input, with the activation inside."""

    name = "fused"
    activation_inside: ClassVar[bool] = True

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        module = FusedTSigmaBN1d if case.layer.size is None else FusedTSigmaBN2d
        options: dict[str, Any] = {"device": case.device, "dtype": inputs.gamma.dtype}
        if self.activation != NO_ACTIVATION and self.activation_inside:
            options |= {"activation": self.activation, "negative_slope": SLOPE}
        self.module = module(case.tasks, self.channels, EPS, MOMENTUM, **options)
        with torch.no_grad():
            self.module.weight.copy_(inputs.gamma)
        self.parameters = [self.module.weight]

    def forward(self) -> Tensor:
        return self.module(self.x)  # type: ignore[no-any-return]

    def statistics(self) -> tuple[Tensor, Tensor]:
        assert self.module.running_mean is not None
        assert self.module.running_var is not None
        return self.module.running_mean, self.module.running_var


class ActivationBehind(Fused):
    """The fused layer, followed by the activation."""

    name = "separate"
    activation_inside = False

    @staticmethod
    def unsupported(case: Case) -> str | None:
        return "it is the fused layer where no activation follows" if case.activation == NO_ACTIVATION else None

    def forward(self) -> Tensor:
        return activate(super().forward(), self.activation)


def _loop_step(module: LoopOfBatchNorms, x: Tensor, activation: str) -> Tensor:
    return activate(module(x), activation)


class Loop(BatchNormPeer):
    """T ``nn.BatchNorm2d`` on the chunks of task-major input, joined by ``cat``; then the activation."""

    name = "loop"

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        options: dict[str, Any] = {"device": case.device, "dtype": inputs.gamma.dtype}
        self.module = LoopOfBatchNorms(case.tasks, self.channels, eps=EPS, momentum=MOMENTUM, **options)
        self.parameters = [norm.weight for norm in self.module.norms]  # type: ignore[misc]
        with torch.no_grad():
            for weight, gamma in zip(self.parameters, inputs.gamma, strict=True):
                weight.copy_(gamma)
        self.step_function: Callable[..., Tensor] = _loop_step

    def forward(self) -> Tensor:
        return self.step_function(self.module, self.x, self.activation)

    def statistics(self) -> tuple[Tensor, Tensor]:
        buffers = [list(norm.buffers()) for norm in self.module.norms]
        return torch.stack([mean for mean, _, _ in buffers]), torch.stack([var for _, var, _ in buffers])


class _Functional(BatchNormPeer):
    """A step written as a function of x, gamma, the running statistics and the activation's name."""

    step_function: Callable[..., Tensor]

    def _allocate(self, gamma: Tensor) -> None:
        self.gamma = gamma.clone().requires_grad_()
        self.running_mean, self.running_var = torch.zeros_like(gamma), torch.ones_like(gamma)
        self.parameters = [self.gamma]

    def forward(self) -> Tensor:
        return self.step_function(self.x, self.gamma, self.running_mean, self.running_var, self.activation)

    def statistics(self) -> tuple[Tensor, Tensor]:
        shape = self.tasks, self.channels
        return self.running_mean.view(shape), self.running_var.view(shape)


def _reference_step(x: Tensor, gamma: Tensor, running_mean: Tensor, running_var: Tensor, activation: str) -> Tensor:
    options = Options(gamma.shape[0], EPS, "sigmoid", "task_major", activation, SLOPE)
    y, mean, var = reference.forward_training(x, gamma, None, None, options)
    count = x.numel() // gamma.numel()
    with torch.no_grad():
        running_mean.lerp_(mean.detach(), MOMENTUM)
        running_var.lerp_(var.detach() * (count / (count - 1)), MOMENTUM)
    return y


class Reference(_Functional):
    """The package's reference, in training, with its running statistics. It is there to be compiled."""

    name = "reference"

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        self._allocate(inputs.gamma)
        self.step_function = _reference_step


def _folded_step(
    x: Tensor, gamma: Tensor, running_mean: Tensor, running_var: Tensor, activation: str, bias: Tensor | None = None
) -> Tensor:
    gates = torch.sigmoid(gamma)
    y = functional.batch_norm(x, running_mean, running_var, gates, bias, True, MOMENTUM, EPS)
    return activate(y, activation)


class Folded(_Functional):
    """One ``F.batch_norm`` over ``[N, T*C, *]``: for sample-major input a view. The input is laid out so beforehand."""

    name = "folded"

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        self.positions = case.shape[2:]
        x, self.dy = inputs.folded
        self.x = x.detach().requires_grad_()
        self._allocate(inputs.gamma.flatten())
        self.step_function = _folded_step

    def task_major(self, tensor: Tensor) -> Tensor:
        """``[T, N, C, *]``, a view: copying would double the memory that verification takes."""
        return tensor.view(self.batch, self.tasks, self.channels, *self.positions).transpose(0, 1)


class CuDNN(Folded):
    """The folded form with a bias of zeros, for which PyTorch takes cuDNN: in channels_last its NHWC kernels."""

    name = "cudnn"

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        self.step_function = partial(_folded_step, bias=torch.zeros_like(self.running_mean))

    @staticmethod
    def unavailable(device: torch.device) -> str | None:
        if device.type != "cuda" or torch.version.hip:
            return "cuDNN runs on NVIDIA's GPUs alone"
        return None if torch.backends.cudnn.is_available() else "this PyTorch has no cuDNN"

    @staticmethod
    def unsupported(case: Case) -> str | None:
        """PyTorch is asked which kernels it would take, with tensors of the right sizes and without memory."""
        _, channels, *positions = case.shape
        value = torch.empty((), dtype=DTYPES[case.dtype], device=case.device)
        x = value.expand(case.batch, case.tasks * channels, *positions)
        vector = value.to(torch.promote_types(value.dtype, torch.float32)).expand(x.shape[1])
        chosen = torch._C._select_batch_norm_backend(x, vector, vector, vector, vector, True, EPS)
        if chosen == torch._C._BatchNormBackend.Cudnn:  # type: ignore[attr-defined]
            return None
        return f"PyTorch does not take cuDNN for {case.dtype} {list(x.shape)}"


def _task_step(x: Tensor, gamma: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    y = functional.batch_norm(x, running_mean, running_var, torch.sigmoid(gamma), None, True, MOMENTUM, EPS)
    return y.to(x.dtype)  # the gates are float32


def _vmap_step(x: Tensor, gamma: Tensor, running_mean: Tensor, running_var: Tensor, activation: str) -> Tensor:
    return activate(torch.vmap(_task_step)(x, gamma, running_mean, running_var), activation)


class Vmap(_Functional):
    """``torch.vmap`` of one task's ``F.batch_norm`` over the tasks of ``[T, N, C, *]``."""

    name = "vmap"
    default_on_cpu = False  # it took two to three times as long as the folded form, compiled too

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        x, self.dy = (tensor.unflatten(0, (case.tasks, case.batch)) for tensor in (inputs.x, inputs.dy))
        self.x = x.detach().requires_grad_()
        self._allocate(inputs.gamma)
        self.step_function = _vmap_step

    @staticmethod
    def unsupported(case: Case) -> str | None:
        if case.device.type == "cpu" and DTYPES[case.dtype].itemsize == 2:
            return "on a CPU F.batch_norm under vmap takes no half precision with statistics in float32"
        return None
