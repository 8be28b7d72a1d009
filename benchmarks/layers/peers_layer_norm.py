"""The ways to run a training step of layer normalisation for T tasks: what PyTorch runs at once.

All do the same work on ``[T*N, L, D]``: normalise every row, multiply by sigmoid(gamma), and give gradients of the
activation and of gamma. gamma is float32 (float64 for float64); to PyTorch's layer normalisation, which on GPUs takes
one dtype alone, its sigmoid is given in the dtype of the activation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.layers.cases import Case, Inputs
from benchmarks.layers.peer import EPS, Peer
from benchmarks.records.workloads import LAYER_NORM
from tsbn_kernels import FusedTSigmaLN


class LayerNormPeer(Peer):
    """One way to run layer normalisation."""

    norm = LAYER_NORM


class FusedLayerNorm(LayerNormPeer):
    """``FusedTSigmaLN`` on task-major input."""

    name = "fused"

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        options: dict[str, Any] = {"device": case.device, "dtype": inputs.gamma.dtype}
        self.module = FusedTSigmaLN(case.tasks, self.channels, EPS, **options)
        with torch.no_grad():
            self.module.weight.copy_(inputs.gamma)
        self.parameters = [self.module.weight]

    def forward(self) -> Tensor:
        return self.module(self.x)  # type: ignore[no-any-return]


class SigmoidLayerNorm(nn.LayerNorm):
    """One task's ``nn.LayerNorm`` with sigmoid(weight) as its weight and no bias."""

    def forward(self, input: Tensor) -> Tensor:
        weight = torch.sigmoid(self.weight).to(input.dtype)
        return functional.layer_norm(input, self.normalized_shape, weight, None, self.eps)


def _loop_step(norms: nn.ModuleList, x: Tensor) -> Tensor:
    return torch.cat([norm(stream) for norm, stream in zip(norms, x.chunk(len(norms)), strict=True)])


class LoopOfLayerNorms(LayerNormPeer):
    """T ``nn.LayerNorm`` on the chunks of task-major input, joined by ``cat``."""

    name = "loop"

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        self.norms = nn.ModuleList(self.one(case, gamma) for gamma in inputs.gamma)
        self.parameters = list(self.norms.parameters())
        self.step_function: Callable[..., Tensor] = _loop_step

    def one(self, case: Case, gamma: Tensor) -> nn.Module:
        """The layer of the task whose gates are the sigmoid of ``gamma``."""
        norm = SigmoidLayerNorm(self.channels, EPS, bias=False, device=case.device, dtype=gamma.dtype)
        with torch.no_grad():
            norm.weight.copy_(gamma)
        return norm

    def forward(self) -> Tensor:
        return self.step_function(self.norms, self.x)


def _scaled_step(x: Tensor, gamma: Tensor) -> Tensor:
    gates = torch.sigmoid(gamma).to(x.dtype)
    streams = functional.layer_norm(x, x.shape[-1:], None, None, EPS).unflatten(0, (len(gates), -1))
    y: Tensor = streams * gates[:, None, None]
    return y.flatten(0, 1)


class Scaled(LayerNormPeer):
    """One ``F.layer_norm`` of all tasks, and the gates of each task behind it."""

    name = "scaled"

    def __init__(self, case: Case, inputs: Inputs) -> None:
        super().__init__(case, inputs)
        self.gamma = inputs.gamma.clone().requires_grad_()
        self.parameters = [self.gamma]
        self.step_function: Callable[..., Tensor] = _scaled_step

    def forward(self) -> Tensor:
        return self.step_function(self.x, self.gamma)
