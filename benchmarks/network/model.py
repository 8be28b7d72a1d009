"""The 40-task CelebA network of the public FAMO and FairGrad code, with the normalisation to be compared."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.layers.peers import LoopOfBatchNorms
from benchmarks.records.network_run import VARIANTS, NetworkVariant
from tsbn_kernels import FusedTSigmaBN1d, FusedTSigmaBN2d, LateFanOut, recompute_outputs

POOL_AFTER = (0, 2, 4)  # indices of the convolutions that a 2x2 max-pooling follows
LINEARS = 2

MakeNorm = Callable[[int, int], nn.Module]  # (channels, spatial dimensions) -> layer


@dataclass(frozen=True)
class Layout:
    """Widths of the network: channels of the images, and of the seven 3x3 convolutions that run over them."""

    inputs: int
    channels: tuple[int, ...]

    @property
    def features(self) -> int:
        """Width of the linear layers and the heads: channels of the last convolution, averaged over its positions."""
        return self.channels[-1]


CELEBA = Layout(3, (64, 128, 128, 256, 256, 512, 512))
DIGITS = Layout(1, (4, 8, 8, 16, 16, 32, 32))  # for images of 28x28, pooled to 14, 7 and 3


def norm_of(variant: NetworkVariant, tasks: int, channels: int, dims: int) -> nn.Module:
    """A normalisation layer of an activation of 2 spatial dimensions, or of none."""
    if not variant.fused:
        return LoopOfBatchNorms(tasks, channels)
    options: dict[str, Any] = {"stacking": "sample_major" if variant.first == "late" else "task_major"}
    if variant.epilogue:
        options["activation"] = "leaky_relu" if variant.negative_slope else "relu"
        options["negative_slope"] = variant.negative_slope
    module = FusedTSigmaBN2d if dims == 2 else FusedTSigmaBN1d
    return module(tasks, channels, recover_input=variant.recover_input, **options)


class CelebaNetwork(nn.Module):
    """A shared backbone of seven convolutions and two linear layers, and a head for each task.

    Args:
        tasks: T, the number of heads.
        norm: makes the nine normalisation layers.
        streams: T for task-specific normalisation: the backbone runs once for each task, its streams stacked. 1 for
            hard sharing.
        variant: how it is run.
        layout: how wide it is.
    """

    def __init__(
        self,
        tasks: int,
        norm: MakeNorm,
        streams: int,
        variant: NetworkVariant = VARIANTS["fused"],
        layout: Layout = CELEBA,
    ) -> None:
        super().__init__()
        self.streams = streams
        self.variant = variant
        channels, features = layout.channels, layout.features
        inputs = (layout.inputs, *channels[:-1])
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, bias=False) for before, after in zip(inputs, channels, strict=True)
        )
        self.linears = nn.ModuleList(nn.Linear(features, features, bias=False) for _ in range(LINEARS))
        self.head_weight = nn.Parameter(torch.empty(tasks, features, 1))
        self.head_bias = nn.Parameter(torch.zeros(tasks, 1))
        nn.init.uniform_(self.head_weight, -(features**-0.5), features**-0.5)
        self.norms = nn.ModuleList([norm(c, 2) for c in channels] + [norm(features, 0) for _ in range(LINEARS)])
        if variant.first != "expand":
            first = self.norms[0]
            assert isinstance(first, FusedTSigmaBN2d)
            first.fan_out, first.recover_input = True, False
            if variant.first == "late":
                self.norms[0] = LateFanOut.from_layer(first, nn.MaxPool2d(2), self.convolutions[1])

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[T, N]`` of images ``[N, inputs, H, W]``, H and W of 8 or more (CelebA: 64)."""
        with recompute_outputs() if self.variant.recompute else nullcontext():
            return self._logits(images)

    def _logits(self, images: Tensor) -> Tensor:
        late = self.variant.first == "late"
        x = self.convolutions[0](images)
        if late:
            x = self.norms[0](x)  # and its pooling, and the second convolution
        else:
            # Every task sees the same x up to here: the axis of tasks is a view, not T copies.
            expand = self.streams > 1 and self.variant.first == "expand"
            x = self._activated(self.norms[0], x.expand(self.streams, *x.shape) if expand else x)
            x = functional.max_pool2d(x.flatten(0, 1) if x.dim() == 5 else x, 2)
        for index in range(1, len(self.convolutions)):
            if index > 1 or not late:
                x = self.convolutions[index](x)
            x = self._activated(self.norms[index], x)
            if index in POOL_AFTER:
                x = functional.max_pool2d(x, 2)
        x = x.mean((2, 3))
        for linear, norm in zip(self.linears, self.norms[len(self.convolutions) :], strict=True):
            x = self._activated(norm, linear(x))
        features = x.unflatten(0, (-1, self.streams)).transpose(0, 1) if late else x.unflatten(0, (self.streams, -1))
        logits: Tensor = (features @ self.head_weight).squeeze(2) + self.head_bias
        return logits

    def _activated(self, norm: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = norm(x)
        return y if self.variant.epilogue else functional.leaky_relu(y, self.variant.negative_slope, inplace=True)


def gates_of(norm: nn.Module) -> list[nn.Parameter]:
    """The raw gates of a layer: one ``[T, C]``, or T of ``[C]``."""
    if isinstance(norm, LoopOfBatchNorms):
        return [one.weight for one in norm.norms]  # type: ignore[misc]
    return [norm.weight]  # type: ignore[list-item]


def task_specific_network(name: str, tasks: int, seed: int = 0, layout: Layout = CELEBA) -> CelebaNetwork:
    """The TS-sigma-BN network, one of :data:`VARIANTS`: the same weights and gates for the same seed."""
    torch.manual_seed(seed)
    variant = VARIANTS[name]
    network = CelebaNetwork(tasks, partial(norm_of, variant, tasks), tasks, variant, layout)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for norm in network.norms:
            gates = gates_of(norm)
            values = torch.randn(tasks, gates[0].shape[-1], generator=generator)
            rows = [values] if gates[0].dim() == 2 else list(values)
            for gate, row in zip(gates, rows, strict=True):
                gate.copy_(row)
    return network


def loss_of(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Binary cross entropy, mean over the images and sum over the tasks; labels are ``[N, T]``."""
    loss = functional.binary_cross_entropy_with_logits(network(images), labels.T, reduction="none")
    return loss.mean(1).sum()


def train_step(network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Tensor:
    """Forward, backward and the optimiser's step; returns the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss = loss_of(network, images, labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def stacked_gradients(network: CelebaNetwork) -> dict[str, Tensor]:
    """Gradients by name; those of a norm's gates as ``[T, C]`` in all variants."""
    gradients = {}
    for name, parameter in network.named_parameters():
        if not name.startswith("norms."):
            gradients[name] = _gradient(parameter)
    for index, norm in enumerate(network.norms):
        parts = [_gradient(gate) for gate in gates_of(norm)]
        gradients[f"norms.{index}"] = parts[0] if parts[0].dim() == 2 else torch.stack(parts)
    return gradients


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
