"""Nothing is timed before its results are compared with the reference in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from benchmarks.peers import EPS, MOMENTUM, Outcome
from benchmarks.workloads import Case, Inputs
from tsbn_kernels import reference


class MismatchError(Exception):
    """A candidate's result differs from the reference by more than the tolerance."""


# Largest |result - reference| / (|reference| + rms of reference), for y and dx, and for dgamma and the statistics.
# y and dx of float32 and float64 carry a few roundings of their own and of sums over up to 2^20 values; those of the
# 16-bit types are rounded to 11 (float16) or 8 (bfloat16) bits once or, by peers that keep the normalised value in
# the 16-bit type, twice. Sums and statistics are taken in float32 from 16-bit inputs too, but a peer may round the
# gradient's factors to the 16-bit type first, which averages out over the sum.
TOLERANCES = {
    "float64": (1e-12, 1e-10),
    "float32": (1e-5, 1e-4),
    "float16": (2**-10, 1e-3),
    "bfloat16": (2**-7, 1e-2),
}


@dataclass(frozen=True)
class Expected:
    """The reference's outcome, rounded from float64 to float32 (float64 for float64 input) to be stored.

    It is computed one task at a time: a float64 copy of the whole activation would not fit.
    """

    outcome: Outcome
    scales: dict[str, float]

    @classmethod
    @torch.no_grad()
    def of(cls, case: Case, inputs: Inputs) -> Expected:
        stored = torch.float64 if case.dtype == "float64" else torch.float32
        count = case.tasks, case.batch
        y, dx = (torch.empty_like(inputs.x, dtype=stored) for _ in range(2))
        dgamma, running_mean, running_var = (torch.empty_like(inputs.gamma, dtype=stored) for _ in range(3))
        positions = inputs.x.numel() // inputs.gamma.numel()
        slices = zip(*(tensor.view(*count, *tensor.shape[1:]) for tensor in (inputs.x, inputs.dy, y, dx)), strict=True)
        for task, (x, dy, y_task, dx_task) in enumerate(slices):
            x64, dy64, gamma64 = x.double(), dy.double(), inputs.gamma[task : task + 1].double()
            options = 1, EPS, "sigmoid", "task_major"
            result, mean, var = reference.forward_training(x64, gamma64, None, *options)
            y_task.copy_(result)
            del result
            flags = True, True, True, False  # training; gradients of x, gamma, no bias
            gradient, gate_gradient, _ = reference.backward(dy64, x64, gamma64, mean, var, *options, *flags)
            dx_task.copy_(gradient)
            dgamma[task] = gate_gradient[0]
            running_mean[task] = MOMENTUM * mean[0]
            running_var[task] = (1 - MOMENTUM) + MOMENTUM * var[0] * (positions / (positions - 1))
        outcome = Outcome(y, dx, dgamma, running_mean, running_var)
        scales = {f.name: _rms(getattr(outcome, f.name)) for f in fields(outcome)}
        return cls(outcome, scales)


def _rms(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) / math.sqrt(tensor.numel())


def _by_task(tensor: Tensor, tasks: int) -> Tensor:
    return tensor.view(tasks, tensor.shape[0] // tasks, *tensor.shape[1:])


@torch.no_grad()
def largest_error(result: Tensor, expected: Tensor, scale: float, tasks: int) -> float:
    """Largest ``|result - expected| / (|expected| + scale)``, task by task; NaN where one is NaN."""
    if result.dim() == expected.dim():
        result = _by_task(result, tasks)
    expected = _by_task(expected, tasks)
    if result.shape != expected.shape:
        raise MismatchError(f"a result of shape {list(result.shape)}, expected {list(expected.shape)}")
    errors = []
    for got, want in zip(result, expected, strict=True):
        difference = (got.to(want.dtype) - want).abs_()
        errors.append(difference.div_(want.abs().add_(scale)).max())
    return float(torch.stack(errors).max())


def check(name: str, case: Case, outcome: Outcome, expected: Expected) -> dict[str, float]:
    """Compares everything a candidate gave with the reference; returns the errors by name.

    Raises:
        MismatchError: an error exceeds the tolerance, or is NaN.
    """
    activations, vectors = TOLERANCES[case.dtype]
    errors = {}
    for field in fields(outcome):
        tolerance = activations if field.name in ("y", "dx") else vectors
        got, want = getattr(outcome, field.name), getattr(expected.outcome, field.name)
        error = largest_error(got, want, expected.scales[field.name], case.tasks)
        if not error <= tolerance:
            raise MismatchError(
                f"{name} is wrong: {field.name} of {case}, shape {list(case.shape)}, differs from the float64 "
                f"reference by {error:.2e} (relative), more than the {tolerance:.0e} that its rounding explains"
            )
        errors[field.name] = error
    return errors
