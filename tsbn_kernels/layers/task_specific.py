"""What a layer of T tasks has, whatever it normalises: what is done to whole models asks for this class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tsbn_kernels.backends import capture
from tsbn_kernels.layers import participation
from tsbn_kernels.operator import checks, runs

Tasks = Sequence[int] | Tensor | None  # of a call: indices, each once; None stands for all


class TaskSpecific(nn.Module):
    """A layer whose parameters and buffers have a leading task axis, and whose tasks differ by their gates.

    Conversion back, sharding, export, parameter groups, checkpoints of plain models and
    :class:`~tsbn_kernels.MultiTaskModel` take any layer of this class. A subclass sets the attributes, has
    :meth:`task` and :meth:`_expand_plain_state`, and takes ``num_tasks`` and ``num_features`` as its first two
    arguments. Its ``forward`` asks whose streams it gets (:meth:`_route`), takes their rows (:meth:`_own_rows`) and
    lets the optimiser know what ran (:meth:`_take_part`).

    Attributes:
        num_tasks: T.
        stacking: ``"task_major"`` or ``"sample_major"``: how the streams of the tasks lie in the batch.
        gate: ``"sigmoid"`` or ``"identity"``: what the gates are of ``weight``.
        weight: ``[T, C]``.
    """

    num_tasks: int
    stacking: Literal["task_major", "sample_major"]
    gate: Literal["sigmoid", "identity"]
    weight: nn.Parameter
    _tasks: range | None = None  # whose rows this process has, where shard_tasks() has distributed them
    _participation: participation.Participation | None = None  # where hold_absent_tasks() watches the layer
    _routers: tuple[runs.Router, ...] = ()  # of the models that it is in the backbone of

    @property
    def gates(self) -> Tensor:
        """The factors of the normalised activation, ``[T, C]``: ``sigmoid(weight)``, or ``weight`` itself."""
        return torch.sigmoid(self.weight) if self.gate == "sigmoid" else self.weight

    def task(self, index: int) -> nn.Module:
        """The plain layer of one task, a copy with the same outputs, in the same mode.

        Of a layer whose parameters are distributed over processes, all of these must ask for it.

        Raises:
            IndexError: there is no such task.
            TypeError: ``index`` is no integer.
        """
        raise NotImplementedError(f"{type(self).__name__} has no task()")

    def _checked_task(self, index: int) -> int:
        index = checks.index("task", index)
        if not -self.num_tasks <= index < self.num_tasks:
            raise IndexError(f"task {index} is out of range for num_tasks={self.num_tasks}")
        return index

    def _route(self, x: Tensor, tasks: Tasks, fan_out: bool | None) -> tuple[Tasks, bool | None]:
        """The tasks of a call and whether it fans out: as asked for, or as the model says that runs the layer."""
        for router in self._routers:
            if (found := router.route(self, x)) is not None:
                tasks, fan_out = found
        return tasks, fan_out

    def _own_rows(self, vectors: tuple[Any, ...], tasks: Tasks) -> tuple[tuple[Any, ...], Tensor | None]:
        """The rows of ``[T, *]`` vectors that this process has, and which of them a call for some tasks is for.

        Args:
            vectors: parameters and buffers of the layer, or None.
            tasks: the tasks of the call; None: all that this process has.

        Returns:
            The vectors, and int64 ``[K]`` on the layer's device, or None for all rows.

        Raises:
            TypeError, ValueError: ``tasks`` are no integers, no tasks of the layer or of this process, or one stands
                twice.
        """
        rows = None if tasks is None else self._indices(tasks)
        if self._tasks is None:
            return vectors, rows
        own = tuple(None if vector is None else vector.to_local() for vector in vectors)
        return own, None if rows is None else rows - self._tasks.start

    def _take_part(
        self, weight: Tensor, rows: Tensor | None, *, own_streams: bool
    ) -> tuple[Tensor, participation.Passes | None]:
        """Lets the rows of the weight that a call uses tell the optimiser, where it holds absent tasks.

        Returns:
            The weight, and what the streams of the call are to be watched by where each is a tensor of its own.
        """
        if self._participation is None or not torch.is_grad_enabled():
            return weight, None
        return self._participation.take_part(weight, rows, own_streams)

    def _indices(self, tasks: Sequence[int] | Tensor) -> Tensor:
        if isinstance(tasks, Tensor):
            checks.check_tasks(tasks, self.num_tasks, self.weight)
            return tasks
        if not isinstance(tasks, Sequence) or isinstance(tasks, (str, bytes)):
            raise TypeError(f"tasks must be a sequence of integers or an int64 tensor, got {tasks!r}")
        indices = [checks.index("each of tasks", task) for task in tasks]
        checks.check_indices(indices, self.num_tasks)
        if self._tasks is not None and not set(indices) <= set(self._tasks):
            raise ValueError(f"this rank has the tasks {list(self._tasks)}, got tasks={indices}")
        return capture.task_indices(indices, self.weight)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes the state of the plain layer too, and starts every task from it."""
        self._expand_plain_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _expand_plain_state(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Replaces the entries of a plain layer by those of T tasks, in place; leaves others alone."""
        raise NotImplementedError(f"{type(self).__name__} has no _expand_plain_state()")


def whole(vector: Any) -> Any:
    """A vector of which processes have parts; all of them must ask for it."""
    return vector.full_tensor() if hasattr(vector, "full_tensor") else vector
