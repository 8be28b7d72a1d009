"""Layers in training: a step, forward and backward, with random data, that several files of tests compare."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from on_gpu.calls import assert_all_same_bits
from tsbn_kernels import FusedTSigmaBN2d

TASKS = 3
# Name: shape of the input, its dtype, memory format and the options of the layer.
LAYERS: dict[str, tuple[tuple[int, ...], torch.dtype, torch.memory_format, dict[str, Any]]] = {
    "rows": ((TASKS * 4, 16, 32, 32), torch.float32, torch.contiguous_format, {}),
    "rows, relu": ((TASKS * 2, 33, 15, 13), torch.bfloat16, torch.contiguous_format, {"activation": "relu"}),
    "columns": ((TASKS * 4, 64, 14, 14), torch.bfloat16, torch.channels_last, {"bias": True, "momentum": None}),
    "columns, silu": ((TASKS * 2, 20, 9, 9), torch.float32, torch.channels_last, {"activation": "silu"}),
    "fan-out": ((4, 24, 28, 28), torch.float32, torch.contiguous_format, {"fan_out": True, "activation": "gelu"}),
    "few slabs": ((TASKS * 8, 2, 96, 96), torch.float32, torch.contiguous_format, {}),
}
NAMES = ("y", "dx", "gradient of weight", "gradient of bias")
FEW = ("rows, relu", "columns")  # which are enough in the suite of the CPU


@dataclass
class Step:
    """A layer in training, and what it is given."""

    layer: FusedTSigmaBN2d
    x: Tensor
    dy: Tensor

    @classmethod
    def of(cls, name: str, device: str, seed: int = 0) -> Step:
        """A layer of :data:`LAYERS` with random parameters, and random data."""
        shape, dtype, memory_format, options = LAYERS[name]
        generator = torch.Generator().manual_seed(seed)
        layer = FusedTSigmaBN2d(TASKS, shape[1], **options)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, generator=generator)
        out = (TASKS * shape[0] if layer.fan_out else shape[0], *shape[1:])
        x, dy = (
            torch.randn(size, generator=generator).to(device, dtype, memory_format=memory_format)
            for size in (shape, out)
        )
        return cls(layer.to(device), x.requires_grad_(), dy)

    def __call__(self) -> tuple[Tensor, ...]:
        """The output and all gradients."""
        y = self.layer(self.x)
        return y.detach(), *torch.autograd.grad(y, [self.x, *self.layer.parameters()], self.dy)

    def twin(self) -> Step:
        """A copy of the layer, as it is now, on the same data."""
        return Step(copy.deepcopy(self.layer), self.x, self.dy)

    def load(self, other: Step) -> None:
        """Takes the data of another step, in place."""
        with torch.no_grad():
            self.x.copy_(other.x)
            self.dy.copy_(other.dy)

    def assert_equals(self, results: tuple[Tensor, ...], other: Step, wanted: tuple[Tensor, ...]) -> None:
        """Results and running statistics have the same bits.

        Raises:
            AssertionError: they have not.
        """
        assert_all_same_bits(results, wanted, NAMES[: len(results)])
        buffers = dict(self.layer.named_buffers())
        assert_all_same_bits(buffers.values(), dict(other.layer.named_buffers()).values(), tuple(buffers))
