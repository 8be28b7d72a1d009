"""A training step of the whole network as data: the ways to run it, and what each of them gave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.records.summary import Summary


@dataclass(frozen=True)
class NetworkVariant:
    """A way to run the task-specific network.

    Attributes:
        fused: by the fused layer, else by T BatchNorms in a loop.
        epilogue: with the activation in the layer, else by an activation in place behind it.
        first: what the first layer gets and gives: ``"expand"``, a view of the one input for every task;
            ``"fan_out"``, the one input; ``"late"``, the same with the gates in the next convolution.
        recompute: the layers' outputs are not kept.
        recover_input: the layers' inputs are not kept (but the first one's).
        negative_slope: of a leaky ReLU; 0 is a ReLU.
    """

    fused: bool = True
    epilogue: bool = False
    first: Literal["expand", "fan_out", "late"] = "expand"
    recompute: bool = False
    recover_input: bool = False
    negative_slope: float = 0.0

    @property
    def reference(self) -> str:
        """The variant by plain BatchNorms that computes the same."""
        return "loop, leaky" if self.negative_slope else "loop"


LEAKY = 0.01
VARIANTS = {
    "loop": NetworkVariant(fused=False),
    "fused": NetworkVariant(),
    "fused, ReLU inside": NetworkVariant(epilogue=True),
    "and fan-out": NetworkVariant(epilogue=True, first="fan_out"),
    "and recompute": NetworkVariant(epilogue=True, first="fan_out", recompute=True),
    "and late fan-out": NetworkVariant(epilogue=True, first="late", recompute=True),
    "loop, leaky": NetworkVariant(fused=False, negative_slope=LEAKY),
    "fused, leaky, recover": NetworkVariant(epilogue=True, first="fan_out", recover_input=True, negative_slope=LEAKY),
}
BEST = "and late fan-out"


@dataclass(frozen=True)
class Differences:
    """How far the first steps of two variants are from each other."""

    loss: float  # absolute
    gradient: float  # largest absolute difference of one element
    gradient_relative: float  # largest norm of a difference over the norm of the gradient


@dataclass(frozen=True)
class NetworkSteps:
    """What steps of each variant gave, and their differences from the loop that computes the same."""

    times: dict[str, Summary]  # seconds
    peak_bytes: dict[str, int]
    losses: dict[str, float]
    differences: dict[str, Differences]


@dataclass(frozen=True)
class NetworkRun:
    """The comparison of the training step, and what it was made on."""

    comparison: NetworkSteps
    tasks: int
    batch: int
    source: str
