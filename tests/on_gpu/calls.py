"""Calls of the operators on a device: the tests' own calls and tolerances, with operands placed anywhere in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from support.epilogues import Call, Outcome, assert_correct, backward, forward
from support.tolerances import assert_same_bits
from torch import Tensor

from tsbn_kernels.definition import layout
from tsbn_kernels.operator import ops

# dense: as it is. shifted: one element past a 16-byte boundary. window: a part of a larger tensor, NaN around it.
PLACES = ("dense", "shifted", "window")

SLACK = 4.0  # times the tests' tolerances: a GPU's exponential, error function and division have more rounding errors


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, or the largest integer, so that a value that no kernel writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def moved(call: Call, change: Callable[[Tensor], Tensor]) -> Call:
    """The call with each of its tensors changed."""

    def maybe(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else change(tensor)

    p = call.p._replace(x=change(call.p.x), dy=change(call.p.dy), weight=change(call.p.weight), bias=maybe(call.p.bias))
    given = None if call.given is None else (change(call.given[0]), change(call.given[1]))
    return call._replace(p=p, residual=maybe(call.residual), given=given)


def on_device(call: Call, device: str) -> Call:
    """A copy of the call there."""
    return moved(call, lambda tensor: tensor.to(device))


def placed(call: Call, place: str) -> Call:
    """The call with its activations at another place in memory, on their device."""
    p, x_order = call.p, "task_major" if call.shared else call.p.stacking
    x, dy = _placed(p.x, place, x_order), _placed(p.dy, place, p.stacking)
    residual = None if call.residual is None else _placed(call.residual, place, p.stacking)
    return call._replace(p=p._replace(x=x, dy=dy), residual=residual)


def _placed(tensor: Tensor, place: str, stacking: str) -> Tensor:
    if place == "dense":
        return tensor
    gap, channel = (2 if place == "window" else 0), layout.channel_axis(stacking)
    axes = sorted(range(tensor.dim()), key=tensor.stride().__getitem__, reverse=True)
    room = [tensor.shape[axis] + gap * (axis <= channel) for axis in axes]
    memory = tensor.new_full((1 + torch.Size(room).numel(),), float("nan"))
    whole = memory[1:].view(room).permute([axes.index(axis) for axis in range(tensor.dim())])
    return whole[tuple(slice(0, size) for size in tensor.shape)].copy_(tensor)


def run(call: Call, backend: str, sums: bool = True) -> Outcome:
    """All outputs of a forward and a backward pass by a backend's kernels, with no other to fall back on.

    ``sums``: whether gradients of weight and bias are asked for; else theirs are empty.
    """
    by = ops.flat(ops.operators(backend))
    with poisoned_memory():
        y, mean, var = forward(call, by)
        return Outcome(y, mean, var, *backward(call, mean, var, (True, sums, sums, True), by))


def check(call: Call, backend: str, device: str, place: str = "dense", sums: bool = True) -> None:
    """A call made on the CPU gives on the device what the definition gives in float64 on the CPU.

    Raises:
        AssertionError: it does not.
    """
    got = Outcome(*(t.cpu() for t in run(placed(on_device(call, device), place), backend, sums)))
    if not sums:
        assert got.dweight.numel() == got.dbias.numel() == 0, "gradients that nobody asked for"
        missing = run(call, "reference")
        got = got._replace(dweight=missing.dweight, dbias=missing.dbias)
    assert_correct(placed(call, place), got, SLACK)


def assert_all_same_bits(got: Any, wanted: Any, names: tuple[str, ...]) -> None:
    """Compares two sequences of tensors, bit for bit.

    Raises:
        AssertionError: they differ; the message names the first.
    """
    for name, one, other in zip(names, got, wanted, strict=True):
        try:
            assert_same_bits(one, other)
        except AssertionError:
            count = int((one != other).sum())
            raise AssertionError(f"{name} differs in {count} of {one.numel()} values") from None
