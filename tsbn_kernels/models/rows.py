"""A parameter of T rows as T parameters, for the time of an optimiser's step, and their states as one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tsbn_kernels.layers.participation import local

_TASKS = "tasks"  # in a state, which rows have one: those that have taken no step have none


class Rows:
    """The rows of a parameter, in its memory, each with its gradient or none.

    Args:
        parameter: ``[T, *]``, with a gradient; of a DTensor the rows of this process.
        present: which of them have a gradient.
        state: the optimiser's for the parameter, by rows or of the whole.

    Raises:
        ValueError: a state of the whole parameter is not made of rows.
    """

    def __init__(self, parameter: Tensor, present: list[bool], state: dict[str, Any]) -> None:
        self.parameters = [nn.Parameter(row) for row in local(parameter.detach())]
        for row, gradient, here in zip(self.parameters, local(parameter.grad), present, strict=True):
            row.grad = gradient if here else None
        self.present = [row for row in self.parameters if row.grad is not None]
        self._parameter = parameter
        self._state = dict(state) if _TASKS in state or not state else _taken_apart(parameter, state)
        self._given = {key: _by_row(value) for key, value in self._state.items() if key != _TASKS}

    def states(self) -> dict[Tensor, dict[str, Any]]:
        """The state of each row that has one; its tensors lie in those of the whole."""
        started = local(self._state[_TASKS]).tolist() if self._state else []
        return {
            row: {key: values[index] for key, values in self._given.items()}
            for index, (row, has_one) in enumerate(zip(self.parameters, started, strict=False))
            if has_one
        }

    @torch.no_grad()
    def joined(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """The state of the parameter, after a step has left these of its rows."""
        for key in dict.fromkeys(key for state in states for key in state):
            values = [state.get(key) for state in states]
            example = next((value for value in values if value is not None), None)
            if not isinstance(example, Tensor):
                self._state[key] = values
                continue
            if key not in self._given:
                self._state[key] = _whole(self._parameter, example.new_zeros(len(values), *example.shape))
                self._given[key] = _by_row(self._state[key])
            for value, place in zip(values, self._given[key], strict=True):
                if value is not None and value is not place:
                    place.copy_(value)
        if self._state:
            self._state[_TASKS] = _whole(self._parameter, torch.tensor([float(bool(state)) for state in states]))
        return self._state


def _by_row(value: Any) -> Any:
    return local(value).unbind() if isinstance(value, Tensor) else value


def _whole(parameter: Any, rows: Tensor) -> Tensor:
    """Rows of this process as those of a parameter that may be distributed."""
    if not hasattr(parameter, "to_local"):
        return rows
    from torch.distributed.tensor import DTensor

    shape = torch.Size([len(parameter), *rows.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=shape, stride=stride)


def _taken_apart(parameter: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    count = len(local(parameter))
    apart: dict[str, Any] = {_TASKS: _whole(parameter, torch.ones(count))}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            apart[key] = [copy.deepcopy(value) for _ in range(count)]
        elif value.dim() == 0:
            apart[key] = _whole(parameter, value.repeat(count))
        elif value.shape == parameter.shape:
            apart[key] = value
        else:
            raise ValueError(
                f"the optimiser's {key!r} of shape {list(value.shape)} cannot be taken apart into the tasks of a "
                f"parameter of shape {list(parameter.shape)}; call hold_absent_tasks() before the first step"
            )
    return apart
