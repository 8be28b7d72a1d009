"""How large a network is: what the paper's columns #P and #F tell relative to one single-task network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Size:
    """Trainable parameters, and floating-point operations of convolutions and products for one sample, forward."""

    parameters: int
    operations: int

    def relative(self, single: Size, tasks: int = 1) -> tuple[str, str]:
        """#P and #F as a table shows them: multiples of one of so many single-task networks, whose sizes are one."""
        return (
            f"{tasks * self.parameters / single.parameters:.2f}",
            f"{tasks * self.operations / single.operations:.2f}",
        )


def size_of(make: Callable[[], nn.Module], sample: Tensor) -> Size:
    """Counts without memory or values.

    Args:
        make: makes the network.
        sample: a batch of one.
    """
    with torch.device("meta"):
        network = make().eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(sample.to("meta"))
    return Size(trainable(network), counter.get_total_flops())


def trainable(network: nn.Module) -> int:
    """The number of parameters that are trained."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
