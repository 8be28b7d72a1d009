"""The second derivative: the fused layer against a loop of PyTorch's layers, both under ``create_graph=True``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.layers.cases import Case
from benchmarks.layers.peer import Peer
from benchmarks.layers.registry import PEERS
from benchmarks.layers.verify import MismatchError
from benchmarks.records.summary import Summary
from benchmarks.timing.measure import Candidate, Effort, Mark, copy_candidate, measure, summarize, timer_for

WAYS = ("fused", "loop")
COPY = "copy"
PASSES = ("forward", "first derivative", "second derivative")
# Of the largest value. PyTorch's formula rounds each of its steps to the dtype of x; a sum over the gates' terms is a
# random walk of such roundings.
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "float16": 2**-5, "bfloat16": 2**-2}


@dataclass(frozen=True)
class DoubleTimes:
    """What one case gave: seconds from the start of a step to the end of each of its passes."""

    case: Case
    passes: dict[str, list[Summary]]

    def seconds(self, way: str, pass_: int) -> float:
        """The median of one pass alone."""
        ends = [summary.median for summary in self.passes[way]]
        return ends[pass_] - (ends[pass_ - 1] if pass_ else 0.0)

    def speedup(self) -> float:
        """How many times as fast a whole step of the fused layer is as one of the loop."""
        return self.passes["loop"][-1].median / self.passes["fused"][-1].median


class Step:
    """A step of a peer that ends with the gradients of random gradients of all that its backward pass gives."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._dy = peer.dy.detach().clone().requires_grad_()
        generator = torch.Generator(peer.x.device).manual_seed(1)

        def random(like: Tensor) -> Tensor:
            return torch.empty_like(like, requires_grad=False).normal_(generator=generator)

        gamma = torch.cat([parameter.detach().flatten() for parameter in peer.parameters])
        parts = random(gamma).split([parameter.numel() for parameter in peer.parameters])
        ddgamma = [part.view_as(parameter) for part, parameter in zip(parts, peer.parameters, strict=True)]
        self._given = [random(peer.x), *ddgamma]

    def run(self, mark: Mark) -> None:
        """Marks the start and the end of each pass; what it gave is freed before the last mark."""
        mark()
        gradients = self.gradients(mark)
        del gradients
        mark()

    def gradients(self, mark: Mark = lambda: None) -> tuple[Tensor, ...]:
        """Gradients of dy, x and all gates, these as one vector."""
        y = self._peer.forward()
        mark()
        operands = self._peer.x, *self._peer.parameters
        first = torch.autograd.grad(y, operands, self._dy, create_graph=True)
        mark()
        ddy, dx, *dgamma = torch.autograd.grad(first, (self._dy, *operands), self._given)
        return ddy, dx, torch.cat([gradient.flatten() for gradient in dgamma])


def double_times(case: Case, effort: Effort) -> DoubleTimes:
    """Compares the ways, then times them in turns.

    Raises:
        MismatchError: their gradients differ by more than rounding.
    """
    inputs = case.inputs()
    steps = {way: Step(PEERS[case.norm][way](case, inputs)) for way in WAYS}
    _compare(case, [step.gradients() for step in steps.values()])

    candidates: dict[str, Candidate] = {way: step.run for way, step in steps.items()}
    candidates[COPY] = copy_candidate(inputs.dy)
    return DoubleTimes(case, summarize(measure(candidates, effort, timer_for(case.device))))


def _compare(case: Case, results: Sequence[tuple[Tensor, ...]]) -> None:
    for name, got, want in zip(("ddy", "dx", "dgamma"), *results, strict=True):
        error = float((got.double() - want.double()).abs().max() / want.double().abs().max())
        if not error <= TOLERANCE[case.dtype]:
            raise MismatchError(f"{name} of {case} differs by {error:.1e} of its largest value")
