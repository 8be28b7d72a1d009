"""What a backbone returns, for each task: the streams of what is stacked, and all that is no batch of streams as it is.

How many rows a tensor has does not always tell: T values that a parameter holds look like one sample of T tasks. So the
shape decides only where nothing better is known: whether a tensor is the only one, belongs to the backbone, or was
computed from the backbone's parameters alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from tsbn_kernels.models import structure
from tsbn_kernels.operator.runs import Run
from tsbn_kernels.operator.separate import separate


def of_each_task(features: Any, run: Run, backbone: nn.Module) -> tuple[list[Any], list[Tensor]]:
    """The features of each task, in the structure and classes of ``features``, and those tensors that all tasks share.

    Raises:
        ValueError: a tensor is neither a batch of each task, nor known to be none.
        TypeError: there is no tensor, or something that may hold some.
    """
    if isinstance(features, Tensor) and _is_stacked(features, run, None):
        return list(separate([features], run.count, run)[0]), []
    found = structure.tensors(features)
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
    streams = separate(stacks, run.count, run)
    if torch.compiler.is_compiling():
        shared = [[tensor, *(tensor.clone() for _ in range(run.count - 1))] for tensor in every]
    else:
        shared = [[tensor] * run.count for tensor in every]

    def of(task: int) -> Any:
        def put(tensor: Tensor) -> Tensor:
            for known, row in zip((*stacks, *every), (*streams, *shared), strict=True):
                if known is tensor:
                    return row[task]
            raise AssertionError

        return structure.replaced(features, put)

    return [of(task) for task in range(run.count)], every


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
        raise _unknown(tensor, run)
    return False


def _doubtful(tensor: Tensor, run: Run) -> ValueError:
    shape = list(tensor.shape)
    return ValueError(
        f"the backbone returned a tensor of shape {shape} without a gradient from any task-specific layer: it may hold "
        f"a batch of {run.batch} for each of {run.count} tasks, or what all of them share. Return it as {[1, *shape]} "
        f"where they share it, else as {[*shape, 1]} and, where that does not tell, give every task the input: "
        f"model(dict.fromkeys(model.heads, x))"
    )


def _unknown(tensor: Tensor, run: Run) -> ValueError:
    return ValueError(
        f"the backbone must return {run.batch} samples for each of {run.count} tasks, got a tensor of shape "
        f"{list(tensor.shape)}; what is no batch may be a parameter or buffer of the backbone, a value without "
        f"dimensions, or have a first dimension of {run.batch}"
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
    waiting, seen = [node], {node}
    while waiting:
        node = waiting.pop()
        if isinstance(node, BackwardCFunction):
            return True
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                waiting.append(below)
    return False
