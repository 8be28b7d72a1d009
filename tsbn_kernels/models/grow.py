"""A trained model gets a further task, or loses one, and its optimisers go on: they keep the state of what stays."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tsbn_kernels.definition.plain import copy_of
from tsbn_kernels.layers.participation import Participation
from tsbn_kernels.layers.task_specific import TaskSpecific
from tsbn_kernels.models.hold import TASKS, held_of
from tsbn_kernels.models.multitask import MultiTaskModel
from tsbn_kernels.models.same_tasks import layers_of_same_tasks, row_of
from tsbn_kernels.operator import checks

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None


def add_task(
    model: nn.Module,
    name: str | None = None,
    *,
    like: int | str | None = None,
    head: nn.Module | None = None,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Gives a model a further task, the last one, in place; those that it has stay as they are.

    Every vector ``[T, *]`` of its task-specific layers becomes ``[T+1, *]``: gates, biases, running statistics. A
    :class:`~tsbn_kernels.MultiTaskModel` gets a head. So does the state of an optimiser: its tensors of the shape of a
    parameter get a row, which is that of ``like``, or what the optimiser starts a parameter with. What it counts for a
    whole parameter, as Adam counts steps, goes on; with :func:`~tsbn_kernels.hold_absent_tasks` each task has a count
    of its own, and steps are those of a loop to which a layer is added.

    The parameters ``[T+1, *]`` are new objects without a gradient or hooks, in the old ones' places in the optimiser;
    learning rate schedules go on. Call it between a step and the next backward pass, and before DDP, FSDP and
    :func:`~tsbn_kernels.shard_tasks`.

    Args:
        model: has task-specific layers, all with T tasks, and at most one ``MultiTaskModel``.
        name: of the task, where the model is or has a ``MultiTaskModel``; None elsewhere.
        like: a task, by index or name, that the new one starts as a copy of: gates, biases, statistics, optimiser's
            state, and the head where none is given. None: it starts as a task of a new layer does.
        head: of the new task. It takes the groups of the optimiser that the head of ``like``, or of the first task, has
            for the parameters of the same names; others take the group of that head's first.
        optimizer: what trains the model, one optimiser or several, but no ``LBFGS``. Without it make a new one.

    Returns:
        ``model``.

    Raises:
        ValueError: the model has no task-specific layer, or some with different numbers of tasks, or which are sharded,
            pruned or parametrized; the name is taken or missing; there is neither a head nor a task whose head is
            copied; the optimiser trains nothing of the model, or has a state for the tasks together.
        IndexError: there is no such task.
        TypeError: an argument is of another type, or the model is wrapped.
    """
    parts = _parts(model)
    optimizers = _optimizers(optimizer, model)
    source = None if like is None else row_of("like", like, parts.num_tasks, parts.names)
    whole, copied = parts.whole, False
    if whole is None:
        if name is not None or head is not None:
            raise ValueError(f"name and head are for a MultiTaskModel; {type(model).__name__} has none, and no heads")
    else:
        if not isinstance(name, str):
            raise TypeError(f"name must be that of the new task, a string, got {name!r}")
        if name in whole.tasks:
            raise ValueError(f"the model has a task {name!r} already; it has {', '.join(whole.tasks)}")
        if copied := head is None:
            if source is None:
                raise ValueError(f"task {name!r} needs a head: give it, or a task whose head is copied with like=")
            head = _copy_of_head(whole, whole.tasks[source])
        checks.check_module("head", head)
        nn.ModuleDict({name: head})  # raises for a name that no module can have
    every = range(parts.num_tasks)
    changed = _Changed(parts, optimizers, [*every] if source is None else [*every, source], fresh=source is None)
    if whole is not None and head is not None and name is not None:
        pattern = whole.heads[whole.tasks[source or 0]]
        whole.heads[name] = head
        whole.tasks = (*whole.tasks, name)
        names = {parameter: path for path, parameter in model.named_parameters()}
        _train_head(head, names, optimizers, pattern, copied=copied)
    changed.put()
    return model


def remove_task(model: nn.Module, task: int | str, *, optimizer: Optimizers = None) -> nn.Module:
    """Takes a task out of a model in place; those that remain stay as they are, and move up.

    Its rows of all vectors ``[T, *]`` and of the optimiser's state go, as does the head that no other task uses. See
    :func:`add_task` for what is new and what goes on.

    Args:
        model: as there.
        task: by index or name.
        optimizer: as there.

    Returns:
        ``model``.

    Raises:
        ValueError: it is the only task, or as there.
        IndexError: there is no such task.
        TypeError: an argument is of another type, or the model is wrapped.
    """
    parts = _parts(model)
    optimizers = _optimizers(optimizer, model)
    index = row_of("task", task, parts.num_tasks, parts.names)
    if parts.num_tasks == 1:
        raise ValueError(f"the model has one task, {task!r}, and cannot be without; revert_model() gives a plain model")
    changed = _Changed(parts, optimizers, [other for other in range(parts.num_tasks) if other != index], fresh=False)
    changed.put()
    if (whole := parts.whole) is not None:
        name = whole.tasks[index]
        head = whole.heads.pop(name)
        whole.tasks = tuple(other for other in whole.tasks if other != name)
        _leave_out(set(head.parameters()) - set(model.parameters()), optimizers)
    return model


class _Parts(NamedTuple):
    """What of a model has tasks."""

    layers: dict[str, TaskSpecific]
    whole: MultiTaskModel | None
    num_tasks: int
    names: tuple[str, ...]


def _parts(model: nn.Module) -> _Parts:
    checks.check_module("model", model)
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise TypeError("DistributedDataParallel keeps the parameters that it has; give model.module, and wrap it anew")
    layers = layers_of_same_tasks(model, "changed")
    for name, layer in layers.items():
        if layer._parameters.get("weight") is None:
            raise ValueError(f"layer {name!r} is pruned, parametrized or sharded, and its weight no parameter [T, *]")
        if any(hasattr(vector, "to_local") for _, vector in _vectors(layer)):
            raise ValueError(
                f"layer {name!r} is sharded; add and remove tasks before shard_tasks() or fully_shard(): "
                f"sharding.full_state_dict() has the whole state, and expand_state_dict(..., tasks=) fits it"
            )
    models = [module for module in model.modules() if isinstance(module, MultiTaskModel)]
    if len(models) > 1:
        raise ValueError(f"{type(model).__name__} has {len(models)} MultiTaskModels; change them one by one")
    whole, num_tasks = models[0] if models else None, next(iter(layers.values())).num_tasks
    return _Parts(layers, whole, num_tasks, () if whole is None else whole.tasks)


def _vectors(layer: TaskSpecific) -> Iterator[tuple[str, Tensor]]:
    for name, vector in chain(layer._parameters.items(), layer._buffers.items()):
        if vector is not None:
            yield name, vector


def _optimizers(optimizer: Any, model: nn.Module) -> list[torch.optim.Optimizer]:
    found = [] if optimizer is None else list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    parameters = set(model.parameters())
    for one in found:
        if not isinstance(one, torch.optim.Optimizer) or isinstance(one, torch.optim.LBFGS):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer and no LBFGS, got {type(one).__name__}")
        if (held := held_of(one)) is not None:
            held.after(one)  # of a step that raised
        if parameters.isdisjoint(parameter for group in one.param_groups for parameter in group["params"]):
            raise ValueError(f"the optimizer, {type(one).__name__}, trains no parameter of the model")
    return found


# ---- vectors and their states ----------------------------------------------------------------------------------------


class _Changed:
    """The vectors of a model with other rows, and the optimisers' states for them; nothing is put in place yet.

    Args:
        parts: of the model.
        optimizers: what trains it.
        rows: which rows of the old vectors the new ones have.
        fresh: one more follows, as a new layer and a new optimiser have it.
    """

    def __init__(self, parts: _Parts, optimizers: list[torch.optim.Optimizer], rows: list[int], *, fresh: bool) -> None:
        self._parts, self._optimizers, self._fresh = parts, optimizers, fresh
        self._num_tasks = len(rows) + fresh
        self._rows = rows
        self._vectors: dict[Tensor, Tensor] = {}  # by the old ones; what two layers share stays one
        for layer in parts.layers.values():
            starts = _first_row(layer) if fresh else {}
            for name, vector in _vectors(layer):
                if vector not in self._vectors:
                    self._vectors[vector] = self._with_rows(vector, starts.get(name))
        self._states = [
            (optimizer, parameter, self._state(optimizer, group, parameter))
            for optimizer in optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter in self._vectors and optimizer.state.get(parameter)
        ]

    def _of_rows(self, values: Tensor, start: Any) -> Tensor:
        kept = values.detach()[self._rows]
        if not self._fresh:
            return kept
        last = torch.zeros_like(kept[:1])
        if start is not None:
            last.copy_(torch.as_tensor(start).detach().reshape(last.shape))
        return torch.cat([kept, last])

    def _with_rows(self, vector: Tensor, start: Tensor | None) -> Tensor:
        new = self._of_rows(vector, start)
        if isinstance(vector, nn.Parameter):
            new = nn.Parameter(new, vector.requires_grad)
        vars(new).update(vars(vector))
        return new

    def _state(self, optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
        """The state of an optimiser for the new rows of a parameter."""
        state, by_row = optimizer.state[parameter], TASKS in optimizer.state[parameter]
        starts: dict[str, Any] = {}
        if self._fresh:
            starts = _first_state(optimizer, group, parameter[:1], after_a_step=not by_row)
            starts[TASKS] = float(bool(starts))
        new: dict[str, Any] = {}
        for key, value in state.items():
            if isinstance(value, Tensor) and (by_row or value.shape == parameter.shape):
                new[key] = self._of_rows(value, starts.get(key))
            elif by_row:
                new[key] = [copy.deepcopy(value[row]) for row in self._rows] + [starts.get(key)] * self._fresh
            elif isinstance(value, Tensor) and value.dim() > 0:
                raise ValueError(
                    f"the optimiser's {key!r} of shape {list(value.shape)} is one for the tasks of a parameter of "
                    f"shape {list(parameter.shape)} together; make a new {type(optimizer).__name__} afterwards"
                )
            else:
                new[key] = value
        return new

    def put(self) -> None:
        """Puts vectors and states in the place of the old ones."""
        for layer in self._parts.layers.values():
            for name, vector in list(_vectors(layer)):
                setattr(layer, name, self._vectors[vector])
            layer.num_tasks = self._num_tasks
        watchers: dict[Participation, Participation] = {}
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["params"][:] = [self._vectors.get(parameter, parameter) for parameter in group["params"]]
            if (held := held_of(optimizer)) is not None:
                held.follow(self._vectors, watchers)
        for layer in self._parts.layers.values():
            if layer._participation is not None:
                layer._participation = watchers.get(layer._participation)
        for optimizer, parameter, state in self._states:
            del optimizer.state[parameter]
            optimizer.state[self._vectors[parameter]] = state


def _first_row(layer: TaskSpecific) -> dict[str, Tensor]:
    """The vectors ``[1, *]`` of a layer of one task that is new."""
    one: Any = copy.copy(layer)  # which shares everything, until it gets vectors of its own
    one._parameters = {
        name: None if vector is None else nn.Parameter(vector.detach()[:1].clone())
        for name, vector in layer._parameters.items()
    }
    one._buffers = {name: None if vector is None else vector[:1].clone() for name, vector in layer._buffers.items()}
    one.num_tasks = 1
    one.reset_parameters()
    return dict(_vectors(one))


def _first_state(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], like: Tensor, *, after_a_step: bool
) -> dict[str, Any]:
    """The state of a parameter that an optimiser of this kind has just got; or after a step that has not moved it."""
    zeros = nn.Parameter(torch.zeros_like(like))
    known = inspect.signature(type(optimizer)).parameters
    options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    build: Any = type(optimizer)
    new = build([{**options, "params": [zeros]}], **{key: value for key, value in options.items() if key in known})
    if after_a_step:
        zeros.grad = torch.zeros_like(zeros)
        new.step()
    return dict(new.state.get(zeros, {}))


# ---- heads -----------------------------------------------------------------------------------------------------------


def _copy_of_head(whole: MultiTaskModel, task: str) -> nn.Module:
    """A copy of a head that shares the parameters which the head shares with other parts of the model."""
    others = (head for name, head in whole.heads.items() if name != task)
    used = {parameter for part in (whole.backbone, *others) for parameter in part.parameters()}
    return copy_of(whole.heads[task], used.intersection(whole.heads[task].parameters()))


def _train_head(
    head: nn.Module,
    names: Mapping[nn.Parameter, str],
    optimizers: list[torch.optim.Optimizer],
    pattern: nn.Module,
    *,
    copied: bool,
) -> None:
    """Gives the parameters of a new head to the optimisers, as they have those of another head, the pattern.

    Args:
        head: of the new task.
        names: of the model's parameters.
        optimizers: of the model.
        pattern: the other head.
        copied: whether the new head is a copy of it; then states are copied too.
    """
    places = {
        parameter: (optimizer, group)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    twins = dict(pattern.named_parameters())
    fallback = next((places[parameter] for parameter in twins.values() if parameter in places), None)
    for path, parameter in head.named_parameters():
        twin = twins.get(path)
        place = places.get(twin, fallback) if twin is not None else fallback
        if place is None or parameter in places or not parameter.requires_grad:
            continue
        optimizer, group = place
        group["params"].append(parameter)
        if "param_names" in group:
            group["param_names"].append(names[parameter])
        if copied and twin is not None and twin in optimizer.state:
            optimizer.state[parameter] = copy.deepcopy(optimizer.state[twin])
        elif state := _first_state(optimizer, group, parameter, after_a_step=False):
            optimizer.state[parameter] = state


def _leave_out(parameters: set[nn.Parameter], optimizers: list[torch.optim.Optimizer]) -> None:
    """Takes parameters out of optimisers."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            kept = [index for index, parameter in enumerate(group["params"]) if parameter not in parameters]
            for key in ("params", "param_names"):
                if key in group:
                    group[key][:] = [group[key][index] for index in kept]
        for parameter in parameters:
            optimizer.state.pop(parameter, None)
