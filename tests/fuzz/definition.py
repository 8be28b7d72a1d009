"""What a call must give: T plain normalisations in float64, and how near a result must be to that."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from support.epilogues import near_kinks
from support.tolerances import BACKWARD, FORWARD, STATISTICS, unit_in_last_place
from torch import Tensor

from tsbn_kernels.definition.activations import EPILOGUES, as_module

LARGEST = {torch.float64: 1e140, torch.float32: 1e15, torch.bfloat16: 1e15, torch.float16: 1e15}


class Expected(NamedTuple):
    """In float64. ``loose`` ``[T, C]`` are the slabs in which the dtype of the call has no digits left."""

    y: Tensor
    gradients: dict[str, Tensor]
    mean: Tensor
    var: Tensor
    count: int
    condition: Tensor  # [T, C]
    loose: Tensor
    kinked: Tensor  # [T, C]: the activation's derivative hangs on a rounding


def _activate(z: Tensor, activation: str | None, slope: float) -> Tensor:
    act = as_module(activation or "none", slope)
    if len(EPILOGUES[activation or "none"].kinks) < 2:
        y: Tensor = act(z)
        return y
    # PyTorch's vectors and their remainder have different slopes at NaN, of which 1 is judged.
    return torch.where(z.isnan(), z, act(torch.where(z.isnan(), 0.0, z)))


class Plain(NamedTuple):
    """A forward pass by plain operators, in streams ``[T, N, C, *]``."""

    y: Tensor  # stacked
    z: Tensor
    streams: Tensor
    mean: Tensor
    var: Tensor
    gates: Tensor


def plain(
    leaves: dict[str, Tensor],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    num_tasks: int,
    training: bool,
    eps: float,
    gate: str,
    stacking: str,
    activation: str | None,
    negative_slope: float,
    fan_out: bool,
) -> Plain:
    """What autograd differentiates any number of times."""
    wide = leaves["x"]
    streams = wide.expand(num_tasks, *wide.shape) if fan_out else in_streams(wide, num_tasks, stacking)
    axes = (1, *range(3, streams.dim()))
    shape = [num_tasks, 1, -1, *[1] * (streams.dim() - 3)]
    if training and streams.numel():
        var, mean = torch.var_mean(streams, dim=axes, correction=0)
    elif training:
        mean, var = torch.zeros(2, num_tasks, streams.shape[2], dtype=torch.float64)
    else:
        assert running_mean is not None and running_var is not None
        mean, var = running_mean.detach().double(), running_var.detach().double()
    gates = torch.sigmoid(leaves["weight"]) if gate == "sigmoid" else leaves["weight"]
    z = (streams - mean.view(shape)) * (var + eps).rsqrt().view(shape) * gates.view(shape)
    if "bias" in leaves:
        z = z + leaves["bias"].view(shape)
    if "residual" in leaves:
        z = z + in_streams(leaves["residual"], num_tasks, stacking)
    y = restacked(_activate(z, activation, negative_slope), stacking)
    return Plain(y, z, streams, mean, var, gates)


def in_double(tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Leaves of the same values, where there is a tensor."""
    return {
        name: tensor.detach().as_subclass(Tensor).double().clone().requires_grad_()
        for name, tensor in tensors.items()
        if tensor is not None
    }


def define(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    dy: Tensor | None,
    **options: Any,
) -> Expected:
    """Forward and backward pass, by autograd through plain operators."""
    dtype = x.dtype
    leaves = in_double({"x": x, "weight": weight, "bias": bias, "residual": residual})
    y, z, streams, mean, var, gates = plain(leaves, running_mean, running_var, **options)
    axes, activation = (1, *range(3, streams.dim())), options["activation"] or "none"
    grads: dict[str, Tensor] = {}
    if dy is not None:
        found = torch.autograd.grad(y, list(leaves.values()), dy.double(), allow_unused=True)
        grads = {
            name: torch.zeros_like(leaf) if g is None or not streams.numel() else g
            for (name, leaf), g in zip(leaves.items(), found, strict=True)
        }
    with torch.no_grad():
        rstd = (var + options["eps"]).rsqrt()
        largest = streams.abs().amax(axes) if streams.numel() else torch.zeros_like(mean)
        condition = (rstd * (mean.abs() + largest + 1) * gates.abs().clamp_min(1)).clamp_min(1)
        loose = ~(condition < (1e9 if dtype == torch.float64 else 1e4)) | ~(largest < LARGEST[dtype])
        shape = [len(mean), 1, -1, *[1] * (streams.dim() - 3)]
        near = near_kinks(z, activation, condition.view(shape) * (1e-11 if dtype == torch.float64 else 1e-4))
        kinked = near.any(3).any(1) if z.dim() > 3 and z.numel() else near.any(1)
        while kinked.dim() > 2:
            kinked = kinked.any(-1)
    count = streams.numel() // max(1, len(mean) * streams.shape[2])
    return Expected(y.detach(), grads, mean.detach(), var.detach(), count, condition, loose, kinked)


def in_streams(x: Tensor, num_tasks: int, stacking: str) -> Tensor:
    """``[T, N, C, *]``, of empty tensors too."""
    if stacking == "task_axis":
        return x
    size = x.shape[0] // num_tasks
    return (
        x.unflatten(0, (num_tasks, size))
        if stacking == "task_major"
        else x.unflatten(0, (size, num_tasks)).transpose(0, 1)
    )


def restacked(streams: Tensor, stacking: str) -> Tensor:
    """The inverse of :func:`in_streams`."""
    if stacking == "task_axis":
        return streams
    return (streams if stacking == "task_major" else streams.transpose(0, 1)).flatten(0, 1)


def _slabs(tensor: Tensor, num_tasks: int, stacking: str) -> Tensor:
    """``[T, C, M]``."""
    streams = in_streams(tensor, num_tasks, stacking)
    return streams.transpose(1, 2).flatten(2)


def compare(name: str, actual: Tensor, expected: Tensor, bound: Tensor, ignored: Tensor) -> str | None:
    """None, or what is wrong; where NaN is expected the result is not finite, ignored or not."""
    rounded = expected.to(actual.dtype).double()
    got = actual.detach().double()
    right = (got - expected).abs() <= bound
    right |= rounded == got
    right |= expected.isnan() & got.isnan()
    right |= ignored & (~expected.isnan() | ~got.isfinite())
    if right.all():
        return None
    index = tuple(int(i) for i in (~right).nonzero()[0])
    return (
        f"{name} is wrong in {int((~right).sum())} of {right.numel()} places: {got[index].item()!r} instead of "
        f"{expected[index].item()!r} at {index}, bound {bound.expand_as(got)[index].item():.3g}"
    )


def compare_output(name: str, actual: Tensor, wanted: Expected, num_tasks: int, stacking: str) -> str | None:
    """Of y."""
    if actual.shape != wanted.y.shape:
        return f"{name} has shape {tuple(actual.shape)}, expected {tuple(wanted.y.shape)}"
    if actual.numel() == 0:
        return None
    got, expected = _slabs(actual, num_tasks, stacking), _slabs(wanted.y, num_tasks, stacking)
    tolerance = FORWARD[actual.dtype]
    scale = (expected.abs().nan_to_num(0, 0, 0).amax(2) / 4).clamp_min(1) * wanted.condition
    bound = tolerance.absolute * scale[..., None] + tolerance.units * unit_in_last_place(expected, actual.dtype)
    return compare(name, got, expected, bound, wanted.loose[..., None])


def compare_gradient(
    name: str,
    actual: Tensor,
    wanted: Expected,
    num_tasks: int,
    stacking: str,
    dtype: torch.dtype,
    *,
    slack: float,
    shared: bool,
) -> str | None:
    """Of x and residual (by slabs), or of weight and bias."""
    expected = wanted.gradients[name]
    if actual.shape != expected.shape:
        return f"gradient of {name} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return None
    ignored, condition = wanted.loose | wanted.kinked, wanted.condition
    tolerance = BACKWARD[dtype]
    if name in ("weight", "bias"):
        got, expected = actual[..., None], expected[..., None]
    elif shared and name == "x":
        got, expected = _slabs(actual, 1, "task_major"), _slabs(expected, 1, "task_major")
        ignored, condition = ignored.any(0, keepdim=True), condition.amax(0, keepdim=True) * num_tasks
    else:
        got, expected = _slabs(actual, num_tasks, stacking), _slabs(expected, num_tasks, stacking)
    scale = expected.abs().nan_to_num(0, 0, 0).amax(2).clamp_min(1) * condition * slack * max(1.0, wanted.count**0.5)
    bound = tolerance.absolute * scale[..., None] + tolerance.units * unit_in_last_place(expected, actual.dtype)
    return compare(f"gradient of {name}", got, expected, bound, ignored[..., None])


def compare_statistics(
    name: str, actual: Tensor, before: Tensor, momentum: Any, wanted: Expected, dtype: torch.dtype
) -> str | None:
    """Of a running mean or variance after training."""
    batch = wanted.mean if name == "running_mean" else wanted.var
    if wanted.count == 0:
        expected = before.double()
    else:
        if name == "running_var":
            batch = batch * (wanted.count / (wanted.count - 1))
        share = torch.as_tensor(momentum, dtype=torch.float64)
        expected = (1 - share) * before.double() + share * batch
    size = (before.double().abs() + batch.abs() + 1) * (1 + torch.as_tensor(momentum).double().abs())
    bound = 4 * (STATISTICS[dtype] + torch.finfo(actual.dtype).eps) * size * wanted.condition.clamp_max(1e4)
    finite = expected.abs() < torch.finfo(actual.dtype).max
    return compare(name, actual, torch.where(finite, expected, 0.0), bound, wanted.loose | ~finite)
