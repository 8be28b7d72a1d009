"""How a task-stacked activation is read as ``[T, N, C, S]``: T tasks, N samples, C channels, S positions.

Three stackings are viewed, never copied:

- ``task_major``: ``[T*N, C, *]``, sample ``n`` of task ``t`` at index ``t*N + n`` (``torch.cat`` of the streams);
- ``sample_major``: ``[N*T, C, *]``, at index ``n*T + t``;
- ``task_axis``: ``[T, N, C, *]``; an input that all tasks share has a task stride of 0 (``expand``).

Two kernel families read that view: *rows*, whose positions are contiguous (NCHW), and *columns*, whose channels are
(channels_last, ``[N, C]``). What is neither is made contiguous, by :func:`supported`. The operators take any strides,
for a compiler chooses them; what a layer is given is made readable before it is saved, so that it is copied once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tsbn_kernels.definition.options import Gradients, LayerOptions, Needs, Options, of_input

Stacking = Literal["task_major", "sample_major", "task_axis"]
STACKINGS: tuple[str, ...] = get_args(Stacking)

Family = Literal["rows", "columns"]


def channel_axis(stacking: str) -> int:
    """Index of the channel dimension of a stacked tensor."""
    return 2 if stacking == "task_axis" else 1


def task_view(x: Tensor, num_tasks: int, stacking: str) -> Tensor:
    """Views (or, where no view exists, copies) a stacked tensor as ``[T, N, C, S]``."""
    x = streams(x, num_tasks, stacking)
    return x.flatten(3) if x.dim() > 3 else x.unsqueeze(3)


def streams(x: Tensor, num_tasks: int, stacking: str, dim: int = 0) -> Tensor:
    """Views a stacked tensor as ``[T, N, C, *]``; the stack is at ``dim``."""
    sizes = x.shape[dim] // num_tasks, num_tasks
    if stacking == "task_major":
        x = x.unflatten(dim, sizes[::-1])
    elif stacking == "sample_major":
        x = x.unflatten(dim, sizes).transpose(dim, dim + 1)
    return x


def stacked(streams: Tensor, stacking: str, dim: int = 0) -> Tensor:
    """Stacks ``[T, N, C, *]``: the inverse of :func:`streams`."""
    if stacking == "task_axis":
        return streams
    x = streams if stacking == "task_major" else streams.transpose(dim, dim + 1)
    *before, outer, inner = x.shape[: dim + 2]
    return x.reshape(*before, outer * inner, *x.shape[dim + 2 :])  # batches of upstream gradients know no flatten


def from_task_view(view: Tensor, shape: Sequence[int], strides: Sequence[int], stacking: str) -> Tensor:
    """Puts a ``[T, N, C, S]`` tensor back into a stacked shape, and into these strides."""
    if stacking == "sample_major":
        view = view.transpose(0, 1)
    out = view.reshape(shape)
    if out.stride() == tuple(strides):
        return out
    return out.new_empty_strided(shape, strides).copy_(out)  # of as many ensembles as out


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
    return x if x.is_contiguous() or family(x, stacking) is not None else x.contiguous()


def in_family(tensor: Tensor, wanted: Family | None, stacking: str) -> Tensor:
    """A stacked tensor itself where the family ``wanted`` reads it, else a copy in that family's memory format.

    Gradients arrive expanded (from ``sum()``), and residuals too may have another memory format than x.
    """
    found, axis = family(tensor, stacking), channel_axis(stacking)
    if found == wanted or (found is not None and wanted == "columns" and tensor.shape[axis] == 1):
        return tensor  # a single channel is contiguous in every format
    if wanted == "rows":
        return tensor.contiguous()
    return tensor.movedim(axis, -1).contiguous().movedim(-1, axis)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """A contiguous operand, where there is one."""
    return None if tensor is None else tensor.contiguous()


def readable(x: Tensor, options: Options, *stacked: Tensor | None) -> tuple[Any, ...]:
    """``x`` and what is ``stacked`` like y, all in one family: themselves, or copies where strides are of none."""
    order = of_input(options).stacking
    x = supported(x, order)
    wanted = family(x, order) if any(tensor is not None for tensor in stacked) else None
    return x, *(None if tensor is None else in_family(tensor, wanted, options.stacking) for tensor in stacked)


def dense_strides(x: Tensor, stacking: str) -> tuple[int, ...]:
    """Strides of a fresh tensor like ``x``: its own where ``x`` is dense, else dense ones in its family's order.

    Where ``x`` is of no family they are those of a contiguous tensor. For backends alone: what a compiler traces must
    not sort, for up to PyTorch 2.11 it does not sort sizes that change.
    """
    shape, stride = x.shape, x.stride()
    expected, dense = 1, x.numel() > 0
    for distance, size in sorted((d, s) for d, s in zip(stride, shape, strict=True) if s != 1):
        dense = dense and distance == expected
        expected *= size
    kind = family(x, stacking)
    return stride if dense and kind is not None else _family_strides(shape, kind, channel_axis(stacking))


def _family_strides(shape: Sequence[int], family: Family | None, channel: int) -> tuple[int, ...]:
    """The strides of a dense tensor of one family."""
    order = list(range(len(shape)))  # outermost first
    if family == "columns":
        order.append(order.pop(channel))
    result, step = [0] * len(shape), 1
    for axis in reversed(order):
        result[axis] = step
        step *= max(1, shape[axis])
    return tuple(result)


def output_shape(x: Tensor, options: Options | LayerOptions) -> tuple[int, ...]:
    """Shape of y: that of x; of an x that all tasks share, T streams stacked."""
    if not options.fan_out:
        return tuple(x.shape)
    N, *rest = x.shape
    return (options.num_tasks, N, *rest) if options.stacking == "task_axis" else (options.num_tasks * N, *rest)


def output_sizes(x: Tensor, options: Options) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of y: those of a dense x; with fan-out dense ones in the memory format of x's family."""
    shape = output_shape(x, options)
    if not options.fan_out:
        return shape, dense_strides(x, options.stacking)
    return shape, _family_strides(shape, family(x, "task_major"), channel_axis(options.stacking))


def empty_output(x: Tensor, options: Options) -> Tensor:
    """Fresh memory for y."""
    return torch.empty_strided(*output_sizes(x, options), dtype=x.dtype, device=x.device)


def empty_input(x: Tensor, options: Options) -> Tensor:
    """Fresh memory for dx, in the memory format of ``x`` and dense."""
    return torch.empty_strided(x.shape, dense_strides(x, of_input(options).stacking), dtype=x.dtype, device=x.device)


def empty_gradients(x: Tensor, weight: Tensor, needs: Needs, options: Options) -> Gradients:
    """Fresh memory for the gradients that are needed; those of vectors are contiguous."""
    return Gradients(
        empty_input(x, options) if needs.dx else None,
        weight.new_empty(weight.shape) if needs.dweight else None,
        weight.new_empty(weight.shape) if needs.dbias else None,
        empty_output(x, options) if needs.dresidual else None,
    )
