"""What every way to run a training step of a layer for T tasks has: inputs, a forward, a backward and an outcome."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.layers.cases import Case, Inputs

EPS = 1e-5


@dataclass(frozen=True)
class Outcome:
    """What a step gives, to be compared: y and dx task-major in the shape of x, dgamma ``[T, C]``."""

    y: Tensor
    dx: Tensor
    dgamma: Tensor


class Peer(ABC):
    """One way to run a layer. It is built on a case's inputs; only ``forward`` and ``backward`` are timed."""

    name: ClassVar[str]
    norm: ClassVar[str]  # of the layers that it runs
    default_on_cpu: ClassVar[bool] = True  # whether a CPU measures it unless told otherwise

    x: Tensor
    dy: Tensor
    parameters: list[Tensor]
    _waiting: deque[tuple[Tensor, Tensor]]

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.tasks, self.channels = case.tasks, case.layer.channels
        self.x, self.dy = inputs.x.detach().requires_grad_(), inputs.dy

    @staticmethod
    def unavailable(device: torch.device) -> str | None:
        """Why this peer cannot run on the device; None where it can."""
        return None

    @staticmethod
    def unsupported(case: Case) -> str | None:
        """Why this peer has no part in a case, on a device where it can run; None where it has."""
        return None

    @abstractmethod
    def forward(self) -> Tensor:
        """Runs the forward pass in training, with its autograd graph."""

    def backward(self, y: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the parameters for the incoming gradient dy; None where y does not depend on one."""
        return torch.autograd.grad(y, (self.x, *self.parameters), self.dy, allow_unused=True)

    def rotate_over(self, buffers: int) -> None:
        """Sets of x and dy that take turns from now on, all with the values that there are."""
        self._waiting = deque((self.x.detach().clone().requires_grad_(), self.dy.clone()) for _ in range(buffers - 1))

    def next_buffers(self) -> None:
        """The next set takes its turn."""
        self._waiting.append((self.x, self.dy))
        self.x, self.dy = self._waiting.popleft()

    def task_major(self, tensor: Tensor) -> Tensor:
        """A tensor in the shape of this peer's x in the task-major shape of the case."""
        return tensor

    def step(self) -> Outcome:
        """One forward and backward, for verification."""
        y = self.forward()
        dx, *found = self.backward(y)
        assert dx is not None
        dgamma = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)]
        stacked = torch.stack(dgamma).view(self.tasks, self.channels)
        return Outcome(self.task_major(y.detach()), self.task_major(dx), stacked)
