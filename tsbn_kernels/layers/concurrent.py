"""Operators on parameters that several threads may use at once.

PyTorch 2.14 can hang where two threads use one parameter. A method of a tensor, such as ``index_select``, gives up
Python's lock, then takes the parameter's own lock to find its node in autograd's graph, and needs Python's lock again
to count a reference to a tensor that only Python holds. A Python ``autograd.Function`` takes the two locks the other
way round. An operator that is called by its overload owns its arguments while it runs: they have a second reference,
and Python's lock is not needed. So whatever our layers do to a parameter outside of a Function is done by an overload.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rows(parameter: Tensor, tasks: Tensor) -> Tensor:
    """Takes the rows ``[K, *]`` of a parameter or buffer ``[T, *]`` that belong to the tasks, int64 ``[K]``."""
    taken: Tensor = torch.ops.aten.index_select.default(parameter, 0, tasks)
    return taken


def product(parameter: Tensor, factors: Tensor) -> Tensor:
    """Multiplies a parameter by factors of a shape that broadcasts with its own."""
    multiplied: Tensor = torch.ops.aten.mul.Tensor(parameter, factors)
    return multiplied


def sigmoid(parameter: Tensor) -> Tensor:
    """Computes the sigmoid of each value of a parameter."""
    gates: Tensor = torch.ops.aten.sigmoid.default(parameter)
    return gates
