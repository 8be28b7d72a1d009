"""What a backbone returns, for each task: the streams of what is stacked, and all that is no batch of streams as it is.

How many rows a tensor has does not always tell: T values that a parameter holds look like one sample of T tasks. So the
shape decides only where nothing better is known: whether a tensor is the only one, belongs to the backbone, or was
computed from the backbone's parameters alone.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.utils.rnn import PackedSequence

from tsbn_kernels.operator.runs import Run, graph_below
from tsbn_kernels.operator.separate import separate

_PLAIN = (Number, str, bytes, Enum, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.SymInt)


def of_each_task(
    features: Any, run: Run, backbone: nn.Module, sizes: Sequence[int] | None = None
) -> tuple[list[Any], list[Tensor]]:
    """The features of each task, in the structure and classes of ``features``, and those tensors that all tasks share.

    Where tasks have different numbers of samples, these are the ``sizes``, and ``run`` is that of one task with all.

    Raises:
        ValueError: a tensor is neither a batch of each task, nor known to be none.
        TypeError: there is no tensor, or something that may hold some.
    """
    if isinstance(features, Tensor) and _is_stacked(features, run, None):
        return list(separate([features], run.count, run, sizes)[0]), []
    found = tensors(features)
    if not found:
        raise TypeError(
            f"the backbone must return a tensor, or a dict, list, tuple or dataclass with one, got "
            f"{type(features).__name__}"
        )
    stacks: list[Tensor] = []
    every: list[Tensor] = []
    for tensor in found:
        if not any(tensor is known for known in (*stacks, *every)):
            alone = len(found) == 1
            (stacks if _is_stacked(tensor, run, None if alone else backbone) else every).append(tensor)
    streams = separate(stacks, run.count, run, sizes)
    count = run.count if sizes is None else len(sizes)
    if torch.compiler.is_compiling():
        shared = [[tensor, *(tensor.clone() for _ in range(count - 1))] for tensor in every]
    else:
        shared = [[tensor] * count for tensor in every]

    def of(task: int) -> Any:
        def put(tensor: Tensor) -> Tensor:
            for known, row in zip((*stacks, *every), (*streams, *shared), strict=True):
                if known is tensor:
                    return row[task]
            raise AssertionError

        return _replaced(features, put)

    return [of(task) for task in range(count)], every


def _is_stacked(tensor: Tensor, run: Run, backbone: nn.Module | None) -> bool:
    """Whether a tensor holds a batch of each task; without a ``backbone``, as the only one it does."""
    if tensor.dim() == 0 or (backbone is not None and _belongs_to(backbone, tensor)):
        return False
    rows, stacked = tensor.shape[0], run.count * run.batch
    node = _node(tensor) if run.shared else None
    if backbone is not None and run.count > 1:
        if node is not None and not has_function(node):  # a stack has passed a task-specific layer: this has not
            if stacked and rows % stacked:
                return False
            raise _doubtful(tensor, run)
        if rows == stacked and node is None and tensor.dim() == 1 == run.batch:
            raise _doubtful(tensor, run)
    if rows == stacked or (stacked and rows % stacked == 0 and (node is not None or backbone is None)):
        return True
    if rows != run.batch and (backbone is None or _node(tensor) is not None or rows % run.count == 0):
        raise ValueError(
            f"the backbone must return {run.batch} samples for each of {run.count} tasks, got a tensor of shape "
            f"{list(tensor.shape)}; what is no batch may be a parameter or buffer of the backbone, a value without "
            f"dimensions, or have a first dimension of {run.batch}"
        )
    return False


def _doubtful(tensor: Tensor, run: Run) -> ValueError:
    shape = list(tensor.shape)
    return ValueError(
        f"the backbone returned a tensor of shape {shape} without a gradient from any task-specific layer: it may hold "
        f"a batch of {run.batch} for each of {run.count} tasks, or what all of them share. Return it as {[1, *shape]} "
        f"where they share it, else as {[*shape, 1]} and, where that does not tell, give every task the input: "
        f"model(dict.fromkeys(model.heads, x))"
    )


def _belongs_to(backbone: nn.Module, tensor: Tensor) -> bool:
    """Whether a tensor is a parameter or buffer, or a part of one."""
    if _node(tensor) is not None and not tensor._is_view():
        return False
    state = (*backbone.parameters(), *backbone.buffers())
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, nn.Parameter):
        return any(tensor is known for known in state)
    address = tensor.untyped_storage().data_ptr()
    return address != 0 and any(
        type(known) in (Tensor, nn.Parameter) and known.untyped_storage().data_ptr() == address for known in state
    )


def _node(tensor: Tensor) -> Any:
    """The graph's node of a tensor; None in a graph of ``torch.compile``, which has none."""
    return None if torch.compiler.is_compiling() else tensor.grad_fn


def has_function(node: Any) -> bool:
    """Whether a graph passes an ``autograd.Function``: a task-specific layer, or what may hold one."""
    return any(isinstance(below, BackwardCFunction) for below in graph_below([node]))


# ---- structures: tensors in dicts, lists, tuples and dataclasses, beside what is no tensor ---------------------------


def tensors(value: Any) -> list[Tensor]:
    """Finds the tensors of a structure, in its order.

    Raises:
        TypeError: it holds something of which it is not known what it holds.
    """
    found: list[Tensor] = []
    _replaced(value, found.append)
    return found


def _replaced(value: Any, put: Callable[[Tensor], Any]) -> Any:
    """Copies a structure, in its classes, with ``put(tensor)`` in the place of each tensor."""
    if isinstance(value, Tensor):
        return put(value)
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        return _mapping(value, {key: _replaced(entry, put) for key, entry in value.items()})
    if isinstance(value, (list, tuple)) and not isinstance(value, PackedSequence):  # whose rows are no samples
        return _sequence(value, [_replaced(entry, put) for entry in value])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        result = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(result, field.name, _replaced(getattr(value, field.name), put))
        return result
    raise TypeError(
        f"the backbone returned a {type(value).__name__}, and it is not known which parts of that are batches; return "
        f"tensors, or a dict, list, tuple or dataclass of them"
    )


def _mapping(like: Any, items: dict[Any, Any]) -> Any:
    if type(like) is OrderedDict:
        return OrderedDict(list(items.items()))
    return items if type(like) is dict or not hasattr(like, "__setitem__") else _filled(like, items.items())


def _sequence(like: Any, entries: list[Any]) -> Any:
    if isinstance(like, list):
        return entries if type(like) is list else _filled(like, enumerate(entries))
    if hasattr(like, "_make"):  # which PyTorch 2.11 does not compile
        return type(like)(*entries) if torch.compiler.is_compiling() else like._make(entries)
    return type(like)(entries)


def _filled(container: Any, items: Iterable[tuple[Any, Any]]) -> Any:
    """A copy of a container with other contents."""
    result = copy.copy(container)
    for key, entry in items:
        result[key] = entry
    return result
