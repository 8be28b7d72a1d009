"""Nothing is timed before its results are compared with the reference in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.layers.cases import DTYPES, Case, Inputs
from benchmarks.layers.peer import EPS, Outcome, Peer
from benchmarks.layers.peers import MOMENTUM, SLOPE, BatchNormOutcome
from benchmarks.records.record import OURS
from benchmarks.records.workloads import BATCH_NORM, ITEM_BYTES, LAYER_NORM, MIXED_BATCH_NORM
from tsbn_kernels.definition import batch_norm, layer_norm
from tsbn_kernels.definition.activations import EPILOGUES, NONE
from tsbn_kernels.definition.options import LayerNeeds, LayerOptions, LayerSaved, Needs, Options, Saved


class MismatchError(Exception):
    """A candidate's result differs from the reference by more than the tolerance."""


class Tolerance(NamedTuple):
    """Largest ``|result - reference| / (|reference| + rms of reference)`` of y, dx and the ``[T, C]`` vectors."""

    y: float
    dx: float
    vectors: float

    def of(self, field: str) -> float:
        return getattr(self, field if field in ("y", "dx") else "vectors")  # type: ignore[no-any-return]


# The fused layer: 16-bit results are rounded once, by at most half a unit in the last place (2^-11 or 2^-8 of the
# value), from float32; float32 and float64 carry a few roundings of their own, and of careful sums.
TOLERANCES = {
    "float64": Tolerance(1e-13, 1e-13, 1e-12),
    "float32": Tolerance(5e-6, 5e-6, 2e-5),
    "float16": Tolerance(2**-11, 2**-11, 2e-5),
    "bfloat16": Tolerance(2**-8, 2**-8, 2e-5),
}
# Peers: PyTorch's sums over up to 2^20 values are less careful, and a compiled F.batch_norm rounds the gradient's sums,
# and dgamma with them, to the 16-bit type: up to five units were seen in dx. What scales the output of F.layer_norm
# rounds it twice, and the gates too.
PEER_TOLERANCES = {
    "float64": Tolerance(1e-12, 1e-12, 1e-11),
    "float32": Tolerance(1e-4, 1e-4, 1e-3),
    "float16": Tolerance(3 * 2**-11, 2**-8, 2**-8),
    "bfloat16": Tolerance(3 * 2**-8, 2**-5, 2**-5),
}
KINK = 1e-4  # nearer to a kink than this rounding may decide what of a gradient passes
STEPS = 2  # of a peer before its outcome is compared
# Elements that the reference computes at a time: they and its temporaries stay in a CPU's cache, or fill a GPU.
BLOCK, GPU_BLOCK = 2**19, 2**24


@dataclass(frozen=True)
class Expected:
    """The reference's outcome of a second step on the same batch.

    It is rounded from float64 to float32 (not for float64 input) to be stored, and computed for a part of one task at
    a time: a float64 copy of the whole activation would not fit.
    """

    outcome: Outcome
    scales: dict[str, float]

    @classmethod
    @torch.no_grad()
    def of(cls, case: Case, inputs: Inputs) -> Expected:
        outcome = _REFERENCES[case.norm](case, inputs)
        scales = {f.name: _rms(getattr(outcome, f.name)) for f in fields(outcome)}
        return cls(outcome, scales)


def _empty(case: Case, *like: Tensor) -> list[Tensor]:
    """What stores the reference's results of these shapes."""
    return [torch.empty_like(one, dtype=torch.float64 if case.dtype == "float64" else torch.float32) for one in like]


def _of_batch_norm(case: Case, inputs: Inputs) -> Outcome:
    """Some channels at a time.

    Where the kink of an activation is near, the gradient dy that all are given is set to zero: any side of it is right,
    and the sums over a channel must not depend on it.
    """
    y, dx, dgamma, running_mean, running_var = _empty(case, inputs.x, inputs.x, *[inputs.gamma] * 3)
    initial = (1 - MOMENTUM) ** STEPS  # what is left of the running statistics' first values
    for task, samples in enumerate(inputs.samples_of_tasks()):
        positions = inputs.x[samples, 0].numel()
        if positions == 0:
            dgamma[task], running_mean[task], running_var[task] = 0.0, 0.0, 1.0
            continue
        block = max(1, _block(inputs) // positions)
        for start in range(0, case.layer.channels, block):
            channels = slice(start, start + block)
            x64, dy64 = (tensor[samples, channels].double() for tensor in (inputs.x, inputs.dy))
            gamma64 = inputs.gamma[task : task + 1, channels].double()
            options = Options(1, EPS, "sigmoid", "task_major", case.activation, SLOPE)
            result, mean, var = batch_norm.forward_training(x64, gamma64, None, None, options)
            saved, needs = Saved(x64, gamma64, None, None, mean, var), Needs(True, True, False, False)
            if kinks := EPILOGUES[case.activation].kinks:
                linear = options._replace(activation=NONE)
                z = batch_norm.forward_eval(saved, linear)
                for kink in kinks:
                    dy64.masked_fill_((z - kink).abs() < KINK, 0.0)
                inputs.dy[samples, channels] = dy64.to(inputs.dy.dtype)
            gradient, gate_gradient, *_ = batch_norm.backward(dy64, saved, True, needs, options)
            assert gradient is not None
            assert gate_gradient is not None
            y[samples, channels] = result.to(y.dtype)
            dx[samples, channels] = gradient.to(dx.dtype)
            dgamma[task, channels] = gate_gradient[0]
            running_mean[task, channels] = (1 - initial) * mean[0]
            running_var[task, channels] = initial + (1 - initial) * var[0] * (positions / (positions - 1))
    return BatchNormOutcome(y, dx, dgamma, running_mean, running_var)


def _of_layer_norm(case: Case, inputs: Inputs) -> Outcome:
    """Some rows at a time, over whose blocks the gradients of the gates are summed in float64."""
    y, dx, dgamma = _empty(case, inputs.x, inputs.x, inputs.gamma)
    options, needs = LayerOptions(1, EPS, "sigmoid", "task_major"), LayerNeeds(True, True, False)
    tensors = [tensor.view(case.tasks, -1, case.layer.channels) for tensor in (inputs.x, inputs.dy, y, dx)]
    block = max(1, _block(inputs) // case.layer.channels)
    for task in range(case.tasks):
        gamma64 = inputs.gamma[task : task + 1].double()
        total = torch.zeros_like(gamma64)
        for x, dy, y_part, dx_part in zip(*(tensor[task].split(block) for tensor in tensors), strict=True):
            x64 = x.double()
            result, _, mean, rstd = layer_norm.layer_norm(x64, gamma64, None, None, options)
            saved = LayerSaved(x64, gamma64, mean, rstd)
            gradient, gate_gradient, _ = layer_norm.layer_norm_backward(dy.double(), None, saved, needs, options)
            assert gradient is not None
            assert gate_gradient is not None
            y_part.copy_(result)
            dx_part.copy_(gradient)
            total += gate_gradient
        dgamma[task] = total[0]
    return Outcome(y, dx, dgamma)


_REFERENCES: dict[str, Callable[[Case, Inputs], Outcome]] = {
    BATCH_NORM: _of_batch_norm,
    LAYER_NORM: _of_layer_norm,
    MIXED_BATCH_NORM: _of_batch_norm,
}


def _block(inputs: Inputs) -> int:
    """How many elements the reference computes at a time."""
    return BLOCK if inputs.x.device.type == "cpu" else GPU_BLOCK


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


def outcome_of(peer: Peer) -> Outcome:
    """The outcome of a second step.

    Before it y and dx of the first are filled with NaN, for allocators that hand blocks out again: a value that is not
    written is seen.
    """
    first = peer.step()
    with torch.no_grad():
        first.y.fill_(math.nan)
        first.dx.fill_(math.nan)
    del first
    return peer.step()


def _tolerances(name: str, case: Case) -> Tolerance:
    if name in OURS:
        return TOLERANCES[case.dtype]
    found = PEER_TOLERANCES[case.dtype]
    if case.norm == LAYER_NORM and name == "loop" and case.device.type == "cpu" and ITEM_BYTES[case.dtype] == 2:
        # F.layer_norm sums the gradient of its weight in the type of x there: its roundings are a random walk.
        walk = torch.finfo(DTYPES[case.dtype]).eps * math.sqrt(math.prod(case.shape[:-1]) / case.tasks)
        return found._replace(vectors=max(found.vectors, walk))
    return found


def check(name: str, case: Case, outcome: Outcome, expected: Expected, slack: float = 1.0) -> dict[str, float]:
    """Compares everything a candidate gave with the reference, within ``slack`` tolerances; returns the errors by name.

    Raises:
        MismatchError: an error exceeds the tolerance, or is NaN.
    """
    tolerances = _tolerances(name, case)
    errors = {}
    for field in fields(outcome):
        tolerance = slack * tolerances.of(field.name)
        got, want = getattr(outcome, field.name), getattr(expected.outcome, field.name)
        if field.name in ("y", "dx") and got.dtype != DTYPES[case.dtype]:
            raise MismatchError(
                f"{name} is wrong: {field.name} of {case} is {got.dtype}, expected {DTYPES[case.dtype]}"
            )
        error = largest_error(got, want, expected.scales[field.name], case.tasks)
        if not error <= tolerance:
            raise MismatchError(
                f"{name} is wrong: {field.name} of {case}, shape {list(case.shape)}, differs from the float64 "
                f"reference by {error:.2e} (relative), more than the {tolerance:.0e} that its rounding explains"
            )
        errors[field.name] = error
    return errors


def check_by_tasks(
    name: str, case: Case, inputs: Inputs, outcome: Outcome, tasks: Sequence[int] | None = None, slack: float = 1.0
) -> dict[str, float]:
    """Compares some tasks, by default all, one at a time: no second activation need fit beside the candidate's.

    Returns:
        The largest error of each result.

    Raises:
        MismatchError: an error exceeds the tolerance, or is NaN.
    """
    part = replace(case, tasks=1)
    errors: dict[str, float] = {}

    for task in range(case.tasks) if tasks is None else tasks:
        own = slice(task, task + 1)
        x, dy = (_by_task(tensor, case.tasks)[task] for tensor in (inputs.x, inputs.dy))
        expected = Expected.of(part, Inputs(x, dy, inputs.gamma[own], inputs.memory_format))
        y, dx = (
            (_by_task(tensor, case.tasks) if tensor.dim() == x.dim() else tensor)[task]
            for tensor in (outcome.y, outcome.dx)
        )
        vectors = {f.name: getattr(outcome, f.name)[own] for f in fields(outcome) if f.name not in ("y", "dx")}
        for result, error in check(name, part, replace(outcome, y=y, dx=dx, **vectors), expected, slack).items():
            errors[result] = max(error, errors.get(result, 0.0))
    return errors
