"""What a layer of T tasks has, whatever it normalises: what is done to whole models asks for this class."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from itertools import chain
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tsbn_kernels.backends import capture
from tsbn_kernels.definition.layout import Stacking
from tsbn_kernels.layers import concurrent, mixing, participation
from tsbn_kernels.operator import checks, runs

Tasks = Sequence[int] | Tensor | None  # of a call: indices, each once; None stands for all

GATE_EPS = 1e-5  # gates that stand for a plain weight are clipped to [GATE_EPS, 1 - GATE_EPS], where logit is finite
GATE_KEY = "gate"  # in the metadata of a state: which modules have gates, and of what kind
VISIBLE = 1e-3  # clipping a scale by less is not worth a word


class TaskSpecific(nn.Module):
    """A layer whose parameters and buffers have a leading task axis, and whose tasks differ by their gates.

    Conversion back, sharding, export, parameter groups, checkpoints of plain models and
    :class:`~tsbn_kernels.MultiTaskModel` take any layer of this class. A subclass sets the attributes, has
    :meth:`task`, and takes ``num_tasks`` and what is normalised (``num_features``, ``normalized_shape``) as its first
    two arguments. Its ``forward`` asks whose streams it gets (:meth:`_route`), takes their rows (:meth:`_own_rows`) and
    lets the optimiser know what ran (:meth:`_take_part`).

    Attributes:
        num_tasks: T.
        stacking: ``"task_major"`` or ``"sample_major"``: how the streams of the tasks lie in the batch; of layer
            normalisation ``"task_axis"`` too.
        gate: ``"sigmoid"`` or ``"identity"``: what the gates are of ``weight``.
        weight: ``[T, *]``.
        bias: of the same shape, or None.
    """

    _plain_vectors: ClassVar[tuple[str, ...]] = ("weight", "bias")  # that a plain layer has too, without the task axis
    _plain_counts: ClassVar[tuple[str, ...]] = ()  # numbers that a plain layer has too

    num_tasks: int
    stacking: Stacking
    gate: Literal["sigmoid", "identity"]
    weight: nn.Parameter
    bias: Tensor | None
    fan_out: bool
    _tasks: range | None = None  # whose rows this process has, where shard_tasks() has distributed them
    _participation: participation.Participation | None = None  # where hold_absent_tasks() watches the layer
    _routers: tuple[runs.Router, ...] = ()  # of the models that it is in the backbone of

    @property
    def gates(self) -> Tensor:
        """The factors of the normalised activation, ``[T, *]``: ``sigmoid(weight)``, or ``weight`` itself."""
        return concurrent.sigmoid(self.weight) if self.gate == "sigmoid" else self.weight

    def reset_parameters(self) -> None:
        """Sets the gates to one half (sigmoid of 0) or to one (identity), and the biases to 0."""
        nn.init.constant_(self.weight, 0.0 if self.gate == "sigmoid" else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _add_bias(self, kind: bool | Literal["frozen"]) -> None:
        """Makes the bias, like the weight: a parameter, None, or a buffer, which is not trained."""
        bias = torch.empty_like(self.weight, requires_grad=False) if kind else None
        if kind == "frozen":
            self.register_buffer("bias", bias)
        else:
            self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    def _bias_kind(self) -> bool | Literal["frozen"]:
        """What :meth:`_add_bias` was given."""
        return "frozen" if self.bias is not None and not isinstance(self.bias, nn.Parameter) else self.bias is not None

    def task(self, index: int) -> nn.Module:
        """The plain layer of one task, a copy with the same outputs, in the same mode.

        Of a layer whose parameters are distributed over processes, all of these must ask for it.

        Raises:
            IndexError: there is no such task.
            TypeError: ``index`` is no integer.
        """
        raise NotImplementedError(f"{type(self).__name__} has no task()")

    def _take_row(self, plain: Any, index: int, *statistics: str) -> None:
        """Gives a plain layer the gates, bias and statistics of one task; raises as :meth:`task` does."""
        index = checks.index("task", index)
        if not -self.num_tasks <= index < self.num_tasks:
            raise IndexError(f"task {index} is out of range for num_tasks={self.num_tasks}")
        with torch.no_grad():
            plain.weight.copy_(whole(self.gates)[index])
            for name in ("bias", *statistics):
                if (vector := getattr(self, name)) is not None:
                    getattr(plain, name).copy_(whole(vector)[index])
        plain.weight.requires_grad_(self.weight.requires_grad)
        if getattr(plain, "bias", None) is not None:
            plain.bias.requires_grad_(isinstance(self.bias, nn.Parameter) and self.bias.requires_grad)
        plain.train(self.training)

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

    def _task_of_sample(self, x: Tensor, index: Tensor | None) -> tuple[Tensor, bool]:
        """The task of each row of a mixed batch, among those that this process has; and whether it was routed."""
        routed = index is None
        if index is None:
            index = mixing.routed()
            assert index is not None
            checks.check_tensor("input", x)
            index = mixing.of_rows(index, x)
        return index if self._tasks is None else index - self._tasks.start, routed

    def _indices(self, tasks: Sequence[int] | Tensor) -> Tensor:
        if isinstance(tasks, Tensor):
            checks.check_tasks(tasks, self.num_tasks, self.weight)
            return tasks.contiguous()
        if not isinstance(tasks, Sequence) or isinstance(tasks, (str, bytes)):
            raise TypeError(f"tasks must be a sequence of integers or an int64 tensor, got {tasks!r}")
        indices = [checks.index("each of tasks", task) for task in tasks]
        checks.check_indices(indices, self.num_tasks)
        if self._tasks is not None and not set(indices) <= set(self._tasks):
            raise ValueError(f"this rank has the tasks {list(self._tasks)}, got tasks={indices}")
        return capture.task_indices(indices, self.weight)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Lets a state tell gates from other tensors: it goes on where there is no model, as in an analysis."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        tell_gates(destination, prefix, self.gate)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes the state of the plain layer too, and starts every task from it; and that of a list of T plain layers.

        The list is in the place of the layer, or in a module there: ``prefix`` is followed by ``0.weight`` or by
        ``bns.0.weight``.
        """
        self._expand_plain_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _expand_plain_state(self, state_dict: dict[str, Any], prefix: str, tasks: Sequence[int] | None = None) -> None:
        """Replaces the entries of a plain layer, or of a list of them, by those of T tasks, in place.

        Args:
            state_dict: entries of other layers are left alone.
            prefix: of the layer's entries.
            tasks: whose the entries are; other tasks get the rows that the layer has. None: of all T.

        Raises:
            ValueError: some entries are of a plain layer and others are not, or they are those of other numbers of
                tasks.
        """
        count = self.num_tasks if tasks is None else len(tasks)
        self._join_list(state_dict, prefix, count)
        entries = {name: state_dict[prefix + name] for name in self._plain_vectors if prefix + name in state_dict}
        plain = [prefix + name for name, entry in entries.items() if entry.dim() == self.weight.dim() - 1]
        if plain:
            if others := [prefix + name for name in entries if prefix + name not in plain]:
                raise ValueError(
                    f"{', '.join(plain)} of the state is that of a plain layer, and {', '.join(others)} is "
                    f"not. Where a checkpoint is distributed by the shapes of the model (set_model_state_dict with "
                    f"broadcast_from_rank0), the first rank gives expand_state_dict(model, plain) instead of the plain "
                    f"one"
                )
            counts = {name: state_dict[prefix + name] for name in self._plain_counts if prefix + name in state_dict}
            for name, vector in self._of_plain(entries | counts, ()).items():
                state_dict[prefix + name] = vector.repeat(count, *(1,) * vector.dim())
        if tasks is not None:
            self._add_own_rows(state_dict, prefix, tasks)

    def _of_plain(self, entries: dict[str, Tensor], lead: tuple[int, ...]) -> dict[str, Tensor]:
        """The entries of plain layers as a task-specific one has them, all ``[*lead, *]``, with what they lack."""
        like: dict[str, Any] = {"device": next(iter(entries.values())).device}
        shape = *lead, *self.weight.shape[1:]
        state = {"weight": torch.ones(shape, dtype=self.weight.dtype, **like)}  # of affine=False
        if self.bias is not None:
            state["bias"] = torch.zeros(shape, dtype=self.weight.dtype, **like)
        for name in self._plain_counts:  # checkpoints of before PyTorch 0.4.1 have none
            if getattr(self, name) is not None:
                state[name] = torch.zeros(lead, dtype=torch.long, **like)
        state |= entries
        if self.gate == "sigmoid":
            weight = state["weight"]
            exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
            if not exact.is_meta and bool(((exact < -VISIBLE) | (exact > 1 + VISIBLE)).any()):
                warnings.warn(
                    "scales of a plain checkpoint lie outside of (0, 1), where a sigmoid gate cannot be, and were "
                    "clipped: the tasks do not start as the plain model; gate='identity' keeps its function",
                    stacklevel=2,
                )
            state["weight"] = torch.logit(exact, GATE_EPS).to(weight.dtype)
        return state

    def _join_list(self, state_dict: dict[str, Any], prefix: str, count: int) -> None:
        """Makes the entries of a list of plain layers, if there is one, those of a layer of ``count`` tasks."""
        names = *self._plain_vectors, *self._plain_counts
        pattern = re.compile(rf"{re.escape(prefix)}(?:(\w+)\.)?(\d+)\.({'|'.join(names)})")
        matches = [match for match in map(pattern.fullmatch, state_dict) if match and match[1] not in self._modules]
        if not matches:
            return
        members = sorted({(match[1] or "", int(match[2])) for match in matches})
        found = {match[3] for match in matches}
        if [index for _, index in members] != list(range(count)) or len(matches) != count * len(found):
            raise ValueError(
                f"the layer {prefix[:-1]!r} needs plain layers of {count} tasks with the same entries, got "
                f"{', '.join(match[0] for match in matches)}; expand_state_dict(model, state, tasks=...) says of which "
                f"tasks the state is, where they are fewer"
            )
        rows: dict[str, list[Tensor]] = {name: [] for name in names if name in found}
        for match in sorted(matches, key=lambda match: int(match[2])):
            rows[match[3]].append(state_dict.pop(match[0]))
        stacked = {name: torch.stack(vectors) for name, vectors in rows.items()}
        for name, vectors in self._of_plain(stacked, (count,)).items():
            state_dict[prefix + name] = vectors

    def _add_own_rows(self, state_dict: dict[str, Any], prefix: str, tasks: Sequence[int]) -> None:
        """Makes entries ``[K, *]`` of the K ``tasks`` those of all, with the layer's own rows for the others."""
        for name, own in chain(self.named_parameters(recurse=False), self.named_buffers(recurse=False)):
            entry = state_dict.get(prefix + name)
            if entry is None:
                continue
            if entry.shape != (len(tasks), *own.shape[1:]):
                raise ValueError(
                    f"{prefix + name} of the state must have shape {[len(tasks), *own.shape[1:]]}, for the tasks "
                    f"{list(tasks)} of the layer's {self.num_tasks}, got {list(entry.shape)}"
                )
            rows = whole(own).detach().to(entry.device, copy=True)  # in their own dtype, so that they keep their bits
            rows[list(tasks)] = entry.to(rows.dtype)
            state_dict[prefix + name] = rows


def tell_gates(state: Any, prefix: str, gate: str) -> None:
    """Writes into the metadata of a state that the weight of a module is that of gates, and of which kind."""
    getattr(state, "_metadata", {}).get(prefix[:-1], {})[GATE_KEY] = gate


def whole(vector: Any) -> Any:
    """A vector of which processes have parts; all of them must ask for it."""
    return vector.full_tensor() if hasattr(vector, "full_tensor") else vector
