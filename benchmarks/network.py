"""The 40-task CelebA network of the public FAMO and FairGrad code, with the normalisation to be compared."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.peers import LoopOfBatchNorms
from tsbn_kernels import FusedTSigmaBN1d, FusedTSigmaBN2d

CHANNELS = (64, 128, 128, 256, 256, 512, 512)  # of the 3x3 convolutions
POOL_AFTER = (0, 2, 4)  # indices of the convolutions that a 2x2 max-pooling follows
FEATURES = 512
LINEARS = 2

Norm = Callable[[int, int], nn.Module]  # (channels, spatial dimensions) -> layer


def fused_norm(tasks: int, channels: int, dims: int) -> nn.Module:
    """TS-sigma-BN by the fused layer."""
    return FusedTSigmaBN2d(tasks, channels) if dims == 2 else FusedTSigmaBN1d(tasks, channels)


def loop_norm(tasks: int, channels: int, dims: int) -> nn.Module:
    """TS-sigma-BN by T BatchNorms in a loop."""
    return LoopOfBatchNorms(tasks, channels)


NORMS: dict[str, Callable[[int, int, int], nn.Module]] = {"fused": fused_norm, "loop": loop_norm}


class CelebaNetwork(nn.Module):
    """A shared backbone of seven convolutions and two linear layers, and a head for each task.

    Args:
        tasks: T, the number of heads.
        norm: makes the nine normalisation layers.
        streams: T for task-specific normalisation: the backbone runs once for each task, stacked task-major. 1 for
            hard sharing.
    """

    def __init__(self, tasks: int, norm: Norm, streams: int) -> None:
        super().__init__()
        self.streams = streams
        inputs = (3, *CHANNELS[:-1])
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, bias=False) for before, after in zip(inputs, CHANNELS, strict=True)
        )
        self.linears = nn.ModuleList(nn.Linear(FEATURES, FEATURES, bias=False) for _ in range(LINEARS))
        self.head_weight = nn.Parameter(torch.empty(tasks, FEATURES, 1))
        self.head_bias = nn.Parameter(torch.zeros(tasks, 1))
        nn.init.uniform_(self.head_weight, -(FEATURES**-0.5), FEATURES**-0.5)
        self.norms = nn.ModuleList([norm(c, 2) for c in CHANNELS] + [norm(FEATURES, 0) for _ in range(LINEARS)])

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[T, N]`` of images ``[N, 3, 64, 64]``."""
        x = images
        for index, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=False)):
            x = convolution(x)
            if index == 0 and self.streams > 1:
                # Every task sees the same x up to here: the axis of tasks is a view, not T copies.
                x = norm(x.expand(self.streams, *x.shape))
                x = x.flatten(0, 1) if x.dim() == 5 else x
            else:
                x = norm(x)
            x = functional.relu(x, inplace=True)
            if index in POOL_AFTER:
                x = functional.max_pool2d(x, 2)
        x = x.mean((2, 3))
        for linear, norm in zip(self.linears, self.norms[len(CHANNELS) :], strict=True):
            x = functional.relu(norm(linear(x)), inplace=True)
        features = x.view(self.streams, -1, FEATURES)
        logits: Tensor = (features @ self.head_weight).squeeze(2) + self.head_bias
        return logits


def task_specific_network(variant: str, tasks: int, seed: int = 0) -> CelebaNetwork:
    """The TS-sigma-BN network, ``"fused"`` or ``"loop"``: the same weights and gates for the same seed."""
    torch.manual_seed(seed)
    network = CelebaNetwork(tasks, partial(NORMS[variant], tasks), tasks)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for norm in network.norms:
            gates = list(norm.parameters())  # one [T, C], or T of [C]
            values = torch.randn(tasks, gates[0].shape[-1], generator=generator)
            rows = [values] if gates[0].dim() == 2 else list(values)
            for gate, row in zip(gates, rows, strict=True):
                gate.copy_(row)
    return network


def loss_of(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Binary cross entropy, mean over the images and sum over the tasks; labels are ``[N, T]``."""
    loss = functional.binary_cross_entropy_with_logits(network(images), labels.T, reduction="none")
    return loss.mean(1).sum()


def stacked_gradients(network: CelebaNetwork) -> dict[str, Tensor]:
    """Gradients by name; those of a norm's gates as ``[T, C]`` in both variants."""
    gradients = {}
    for name, parameter in network.named_parameters():
        if not name.startswith("norms."):
            gradients[name] = _gradient(parameter)
    for index, norm in enumerate(network.norms):
        parts = [_gradient(parameter) for parameter in norm.parameters()]
        gradients[f"norms.{index}"] = parts[0] if parts[0].dim() == 2 else torch.stack(parts)
    return gradients


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
