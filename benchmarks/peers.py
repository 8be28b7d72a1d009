"""The ways to run one training step of a layer for T tasks, and of the ReLU behind it: the fused layer and its peers.

All do the same work: normalise by the batch, update running statistics with momentum 0.1, multiply by sigmoid(gamma),
and give gradients of the activation and of gamma. Parameters and statistics are float32 (float64 for float64).
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.workloads import MEMORY_FORMATS, Case, Inputs
from tsbn_kernels import FusedTSigmaBN1d, FusedTSigmaBN2d, reference

MOMENTUM = 0.1
EPS = 1e-5


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
class Outcome:
    """What a step gives, to be compared: y and dx task-major in the shape of x, the rest ``[T, C]``."""

    y: Tensor
    dx: Tensor
    dgamma: Tensor
    running_mean: Tensor
    running_var: Tensor


class Peer(ABC):
    """One way to run the layer. It is built on a case's inputs; only ``forward`` and ``backward`` are timed."""

    name: ClassVar[str]

    x: Tensor
    dy: Tensor
    parameters: list[Tensor]
    _waiting: deque[tuple[Tensor, Tensor]]

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.tasks, self.batch, self.channels = case.tasks, case.batch, case.layer.channels
        self.relu = case.relu
        self.x, self.dy = inputs.x.detach().requires_grad_(), inputs.dy

    @staticmethod
    def unavailable(device: torch.device) -> str | None:
        """Why this peer cannot run on the device; None where it can."""
        return None

    @abstractmethod
    def forward(self) -> Tensor:
        """Runs the forward pass in training, with its autograd graph, and updates the running statistics."""

    def backward(self, y: Tensor) -> tuple[Tensor, ...]:
        """Gradients of x and of the parameters for the incoming gradient dy."""
        return torch.autograd.grad(y, (self.x, *self.parameters), self.dy)

    def rotate_over(self, buffers: int) -> None:
        """Sets of x and dy that take turns from now on, all with the values that there are."""
        self._waiting = deque((self.x.detach().clone().requires_grad_(), self.dy.clone()) for _ in range(buffers - 1))

    def next_buffers(self) -> None:
        """The next set takes its turn."""
        self._waiting.append((self.x, self.dy))
        self.x, self.dy = self._waiting.popleft()

    @abstractmethod
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Running mean and variance ``[T, C]``."""

    def task_major(self, tensor: Tensor) -> Tensor:
        """A tensor in the shape of this peer's x in the task-major shape of the case."""
        return tensor

    def step(self) -> Outcome:
        """One forward and backward, for verification."""
        y = self.forward()
        dx, *dgamma = self.backward(y)
        stacked = torch.stack(list(dgamma)).view(self.tasks, self.channels)
        return Outcome(self.task_major(y.detach()), self.task_major(dx), stacked, *self.statistics())


class Fused(Peer):
    """``FusedTSigmaBN`` on task-major input, with the ReLU inside."""

    name = "fused"
    relu_inside: ClassVar[bool] = True

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        module = FusedTSigmaBN1d if case.layer.size is None else FusedTSigmaBN2d
        options: dict[str, Any] = {"device": case.device, "dtype": inputs.gamma.dtype}
        if self.relu and self.relu_inside:
            options["activation"] = "relu"
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


class Separate(Fused):
    """The fused layer, followed by ``F.relu``."""

    name = "separate"
    relu_inside = False

    def forward(self) -> Tensor:
        return functional.relu(super().forward())


class Loop(Peer):
    """T ``nn.BatchNorm2d`` on the chunks of task-major input, joined by ``cat``; then a ReLU in place."""

    name = "loop"

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        options: dict[str, Any] = {"device": case.device, "dtype": inputs.gamma.dtype}
        self.module = LoopOfBatchNorms(case.tasks, self.channels, eps=EPS, momentum=MOMENTUM, **options)
        self.parameters = [norm.weight for norm in self.module.norms]  # type: ignore[misc]
        with torch.no_grad():
            for weight, gamma in zip(self.parameters, inputs.gamma, strict=True):
                weight.copy_(gamma)

    def forward(self) -> Tensor:
        y: Tensor = self.module(self.x)
        return functional.relu(y, inplace=True) if self.relu else y

    def statistics(self) -> tuple[Tensor, Tensor]:
        buffers = [list(norm.buffers()) for norm in self.module.norms]
        return torch.stack([mean for mean, _, _ in buffers]), torch.stack([var for _, var, _ in buffers])


def _folded_step(x: Tensor, gamma: Tensor, running_mean: Tensor, running_var: Tensor, relu: bool) -> Tensor:
    y = functional.batch_norm(x, running_mean, running_var, torch.sigmoid(gamma), None, True, MOMENTUM, EPS)
    return functional.relu(y, inplace=True) if relu else y


def _reference_step(x: Tensor, gamma: Tensor, running_mean: Tensor, running_var: Tensor, relu: bool) -> Tensor:
    options = gamma.shape[0], EPS, "sigmoid", "task_major", None, "relu" if relu else "none"
    y, mean, var = reference.forward_training(x, gamma, None, *options)
    count = x.numel() // gamma.numel()
    with torch.no_grad():
        running_mean.lerp_(mean.detach(), MOMENTUM)
        running_var.lerp_(var.detach() * (count / (count - 1)), MOMENTUM)
    return y


class _Functional(Peer):
    """A step written as a function of x, gamma and the running statistics."""

    step_function: Callable[[Tensor, Tensor, Tensor, Tensor, bool], Tensor]

    def _allocate(self, gamma: Tensor) -> None:
        self.gamma = gamma.clone().requires_grad_()
        self.running_mean, self.running_var = torch.zeros_like(gamma), torch.ones_like(gamma)
        self.parameters = [self.gamma]

    def forward(self) -> Tensor:
        return self.step_function(self.x, self.gamma, self.running_mean, self.running_var, self.relu)

    def statistics(self) -> tuple[Tensor, Tensor]:
        shape = self.tasks, self.channels
        return self.running_mean.view(shape), self.running_var.view(shape)


class Folded(_Functional):
    """One ``F.batch_norm`` over T*C channels.

    Its input is sample-major, ``[N*T, C, *]`` read as ``[N, T*C, *]``, and is prepared outside the timed region. In
    channels_last no view of a sample-major batch is ``[N, T*C, H, W]``; there it gets what grouped convolutions over T
    streams give, ``[N, T*C, H, W]`` that is itself channels_last, also prepared outside.
    """

    name = "folded"

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        self.positions = case.shape[2:]
        memory_format = MEMORY_FORMATS.get(case.memory_format, torch.contiguous_format)
        self.x = self._fold(inputs.x).contiguous(memory_format=memory_format).requires_grad_()
        self.dy = self._fold(inputs.dy).contiguous(memory_format=memory_format)
        self._allocate(inputs.gamma.flatten())
        self.step_function = _folded_step

    def _fold(self, tensor: Tensor) -> Tensor:
        sample_major = tensor.view(self.tasks, self.batch, *tensor.shape[1:]).transpose(0, 1)
        return sample_major.reshape(self.batch, self.tasks * self.channels, *self.positions)

    def task_major(self, tensor: Tensor) -> Tensor:
        """``[T, N, C, *]``, a view: copying would double the memory that verification takes."""
        return tensor.view(self.batch, self.tasks, self.channels, *self.positions).transpose(0, 1)


def _no_compiler(device: torch.device) -> str | None:
    compilers = [os.environ.get("CXX", ""), "g++", "clang++"]
    if device.type == "cpu" and not any(shutil.which(compiler) for compiler in compilers if compiler):
        return "torch.compile needs a C++ compiler (g++ or clang++) and there is none"
    return None


def warm_up_compiler(impls: Sequence[str], device: torch.device) -> None:
    """Compiles something small, if one of the implementations will be compiled: the first time takes ten seconds."""
    if any(impl.startswith("compiled") for impl in impls):
        torch.compile(torch.neg)(torch.ones(8, device=device))


class CompiledReference(_Functional):
    """``torch.compile`` of the package's reference, in training, with its running statistics."""

    name = "compiled_reference"

    unavailable = staticmethod(_no_compiler)

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        self._allocate(inputs.gamma)
        self.step_function = torch.compile(_reference_step, dynamic=False)


class CompiledFolded(Folded):
    """``torch.compile`` of the folded form."""

    name = "compiled_folded"

    unavailable = staticmethod(_no_compiler)

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        self.step_function = torch.compile(_folded_step, dynamic=False)


_PEERS = (Fused, Separate, Loop, Folded, CompiledReference, CompiledFolded)
PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in _PEERS}
OURS = (Fused.name, Separate.name)


def peers_of(relu: bool) -> list[str]:
    """Those that differ: without a ReLU the fused layer is the separate one."""
    return [name for name in PEERS if relu or name != Separate.name]
