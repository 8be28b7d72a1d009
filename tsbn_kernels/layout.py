"""How a task-stacked activation is read as ``[T, N, C, S]``: T tasks, N samples, C channels, S positions.

Three stackings are viewed, never copied:

- ``task_major``: ``[T*N, C, *]``, sample ``n`` of task ``t`` at index ``t*N + n`` (``torch.cat`` of the streams);
- ``sample_major``: ``[N*T, C, *]``, at index ``n*T + t``;
- ``task_axis``: ``[T, N, C, *]``; an input that all tasks share has a task stride of 0 (``expand``).

Two kernel families read that view: *rows*, whose positions are contiguous (NCHW), and *columns*, whose channels are
(channels_last, ``[N, C]``). What is neither is made contiguous, in :func:`supported` and nowhere else.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Stacking = Literal["task_major", "sample_major", "task_axis"]
STACKINGS: tuple[str, ...] = get_args(Stacking)

Family = Literal["rows", "columns"]


def channel_axis(stacking: str) -> int:
    """Index of the channel dimension of a stacked tensor."""
    return 2 if stacking == "task_axis" else 1


def task_view(x: Tensor, num_tasks: int, stacking: str) -> Tensor:
    """Views (or, where no view exists, copies) a stacked tensor as ``[T, N, C, S]``."""
    if stacking == "task_major":
        x = x.unflatten(0, (num_tasks, x.shape[0] // num_tasks))
    elif stacking == "sample_major":
        x = x.unflatten(0, (x.shape[0] // num_tasks, num_tasks)).transpose(0, 1)
    return x.flatten(3) if x.dim() > 3 else x.unsqueeze(3)


def from_task_view(view: Tensor, like: Tensor, stacking: str) -> Tensor:
    """Puts a ``[T, N, C, S]`` tensor back into the shape, stacking and strides of ``like``."""
    if stacking == "sample_major":
        view = view.transpose(0, 1)
    out = view.reshape(like.shape)
    strides = dense_strides(like, stacking)
    if out.stride() == strides:
        return out
    return torch.empty_strided(like.shape, strides, dtype=out.dtype, device=out.device).copy_(out)


def family(x: Tensor, stacking: str) -> Family | None:
    """The kernel family that reads ``x`` in place; None where neither does."""
    if x.numel() == 0:
        return "rows"
    axis = channel_axis(stacking)
    shape, stride = x.shape, x.stride()
    positions, step = 1, 1
    for size, distance in zip(reversed(shape[axis + 1 :]), reversed(stride[axis + 1 :]), strict=True):
        if size == 1:
            continue
        if positions == 1:
            step = distance
        elif distance != positions * step:
            return None
        positions *= size
    if positions > 1 and step == 1:
        return "rows"
    return "columns" if shape[axis] == 1 or stride[axis] == 1 else None


def supported(x: Tensor, stacking: str) -> Tensor:
    """``x`` itself where a kernel family reads it, else a contiguous copy."""
    return x if family(x, stacking) is not None else x.contiguous()


def gradient_like(dy: Tensor, x: Tensor, stacking: str) -> Tensor:
    """``dy`` itself where the family of ``x`` reads it, else a copy in the memory format of ``x``.

    Gradients arrive expanded (from ``sum()``) or in another memory format.
    """
    wanted = family(x, stacking)
    if family(dy, stacking) == wanted:
        return dy
    if wanted == "rows":
        return dy.contiguous()
    axis = channel_axis(stacking)
    return dy.movedim(axis, -1).contiguous().movedim(-1, axis)


def dense_strides(x: Tensor, stacking: str) -> tuple[int, ...]:
    """Strides of a fresh tensor like ``x``: its own where ``x`` is dense, else dense ones in its family's order."""
    shape, stride = x.shape, x.stride()
    expected, dense = 1, x.numel() > 0
    for distance, size in sorted((d, s) for d, s in zip(stride, shape, strict=True) if s != 1):
        dense = dense and distance == expected
        expected *= size
    if dense:
        return stride
    order = list(range(x.dim()))  # outermost first
    if family(x, stacking) == "columns":
        order.append(order.pop(channel_axis(stacking)))
    result, step = [0] * x.dim(), 1
    for axis in reversed(order):
        result[axis] = step
        step *= max(1, shape[axis])
    return tuple(result)


def empty_like(x: Tensor, stacking: str) -> Tensor:
    """Fresh memory for an output like ``x``, in its memory format and dense."""
    return torch.empty_strided(x.shape, dense_strides(x, stacking), dtype=x.dtype, device=x.device)
