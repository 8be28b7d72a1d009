"""Tasks that took no part in a step are left alone by the optimiser, as it leaves the layers of a loop alone.

In a loop of T layers the parameters of a task that did not run have no gradient, and an optimiser passes by them. A row
of a ``[T, C]`` parameter has a gradient of zero then, and momentum, Adam's moments and weight decay move it all the
same. Here the optimiser sees, inside of its step, a parameter for each row, with a gradient or none, and with a state
of its own: what it does with them is what it does with a loop, whatever optimiser it is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from tsbn_kernels.layers.participation import Participation, local
from tsbn_kernels.layers.task_specific import TaskSpecific
from tsbn_kernels.operator import checks
from tsbn_kernels.operator.autograd_synchronized import GroupLike, group_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

TASKS = "tasks"  # in a state, which rows have one: those that have taken no step have none


def hold_absent_tasks(optimizer: torch.optim.Optimizer, model: nn.Module, process_group: GroupLike = None) -> None:
    """From now on a step leaves the rows of tasks alone that took no part: gates, learned biases and their state.

    A task takes part where a backward pass came through its stream since the gradients were last zeroed, be it with a
    gradient of zero, or where its row of the gradient is not zero. Steps then equal those of T layers in a loop, for
    any optimiser of ``torch.optim`` but ``LBFGS``, with a count of steps for each task; also over several backward
    passes, with a ``GradScaler`` and with a ``closure``.

    Tasks are absent where ``tasks=`` of a layer or of a :class:`~tsbn_kernels.MultiTaskModel` leaves them out, and
    where they ran and no loss came from their ``streams()`` or outputs of the model. Of these last two a compiled
    graph knows nothing, nor does a re-entrant checkpoint of the second: there all tasks that ran take part.

    The state of a parameter has a first dimension of T, ``step`` too, and an entry ``tasks`` that tells which rows have
    one. A state of before, of the whole parameter, is taken apart when it is met; the other way an optimiser that holds
    nothing cannot use a count of steps for each task. A step waits for the device once: no CUDA graph can capture it.

    Args:
        optimizer: of the model's parameters. A copy of it holds nothing.
        model: with the layers, as the optimiser knows it: after :func:`~tsbn_kernels.shard_tasks`, and before
            ``torch.compile``. A copy of a layer is not watched.
        process_group: the ranks over which gradients are averaged (DDP, or the data of ``shard_tasks``): a task takes
            part where it does on one of them. ``"world"`` stands for all ranks.

    Raises:
        TypeError: ``optimizer`` or ``model`` is none, the optimiser is an ``LBFGS``, or parameters are sharded by
            something else than ``shard_tasks``.
        ValueError: the optimiser has no parameter of a task-specific layer, holds tasks already, or a layer is
            parametrized.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {optimizer!r:.80}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("LBFGS takes all parameters for one vector, and cannot leave out rows; take another optimiser")
    checks.check_module("model", model)
    if held_of(optimizer) is not None:
        raise ValueError(
            "the optimiser holds absent tasks already; call hold_absent_tasks() once, with the whole model"
        )
    if process_group is None and isinstance(model, nn.parallel.DistributedDataParallel):
        process_group = model.process_group
    of_optimizer = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    layers: dict[Tensor, list[TaskSpecific]] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, TaskSpecific):
            continue
        if is_parametrized(layer):
            raise ValueError(
                f"{name!r} is parametrized, and the rows of what is trained may be no tasks; call "
                f"torch.nn.utils.parametrize.remove_parametrizations first"
            )
        for parameter in layer.parameters(recurse=False):
            if parameter not in of_optimizer or not parameter.requires_grad:
                continue
            if hasattr(parameter, "to_local") and layer._tasks is None:
                raise TypeError(f"the parameters of {name!r} are sharded, and not by shard_tasks(), so it has no rows")
            layers.setdefault(parameter, []).append(layer)
    if not layers:
        raise ValueError("the optimiser trains no parameter of a task-specific layer of the model")
    held = Held(layers, group_of(process_group))
    optimizer.register_step_pre_hook(held.before)
    optimizer.register_step_post_hook(held.after)


def held_of(optimizer: torch.optim.Optimizer) -> Held | None:
    """What :func:`hold_absent_tasks` has given an optimiser, if it has."""
    owners = (getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Held)), None)


class Held:
    """What an optimiser sees of the parameters of some layers inside of its step: their rows.

    Gradients are averaged over the ranks of ``group``, if there are others.
    """

    def __init__(self, layers: dict[Tensor, list[TaskSpecific]], group: ProcessGroup | None) -> None:
        self._watched: dict[Tensor, list[Participation]] = {}
        for parameter, users in layers.items():
            for layer in users:
                if layer._participation is None:
                    layer._participation = Participation(parameter, len(local(parameter)))
                self._watched.setdefault(parameter, []).append(layer._participation)
        self._group = group
        self._whole: list[list[Tensor]] | None = None  # what the optimiser has, while it sees rows
        self._rows: dict[Tensor, Rows] = {}

    def follow(self, replaced: Mapping[Tensor, Tensor], parts: dict[Participation, Participation]) -> None:
        """Takes parameters with other rows in the place of those that it had.

        Args:
            replaced: the new parameters by the old ones.
            parts: what watches the new ones, by what has watched the old; what is missing is added.
        """
        for parameter, watched in list(self._watched.items()):
            if parameter in replaced:
                new, rows = replaced[parameter], len(replaced[parameter])
                del self._watched[parameter]
                self._watched[new] = [parts.setdefault(part, Participation(new, rows)) for part in watched]

    def before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before a step gives the optimiser the rows; where the step has a closure, as soon as that has ended."""
        self._check_earlier_step(optimizer)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._give_rows(optimizer)
            return None

        def closure_and_rows() -> Any:
            self.after(optimizer)  # of an optimiser that calls it several times
            loss = closure()
            self._give_rows(optimizer)
            return loss

        return args[:1], {**kwargs, "closure": closure_and_rows}

    def _check_earlier_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes back the rows of a step that raised, or of one that has this one inside, by ``super().step()``."""
        zeroed = any(row.grad is None for rows in self._rows.values() for row in rows.present)
        self.after(optimizer)
        if zeroed:
            raise RuntimeError(
                "an earlier step of the optimiser raised, and zero_grad() has not reached the gradients of "
                "task-specific layers since; call it, and repeat the backward pass"
            )

    def after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """After a step the optimiser has the whole parameters again, and the state of their rows."""
        if self._whole is None:
            return
        for group, parameters in zip(optimizer.param_groups, self._whole, strict=True):
            group["params"] = parameters
        for parameter, rows in self._rows.items():
            if state := rows.joined([optimizer.state.pop(row, {}) for row in rows.parameters]):
                optimizer.state[parameter] = state
        self._whole, self._rows = None, {}

    def _give_rows(self, optimizer: torch.optim.Optimizer) -> None:
        took_part = self._took_part()
        whole = [group["params"] for group in optimizer.param_groups]
        rows = {
            parameter: Rows(parameter, took_part[parameter], optimizer.state.get(parameter, {}))
            for parameters in whole
            for parameter in parameters
            if parameter in took_part
        }
        self._whole, self._rows = whole, rows
        for parameter, own in rows.items():
            optimizer.state.pop(parameter, None)
            optimizer.state.update(own.states())
        for group in optimizer.param_groups:
            group["params"] = [row for p in group["params"] for row in (rows[p].parameters if p in rows else (p,))]

    @torch.no_grad()
    def _took_part(self) -> dict[Tensor, list[bool]]:
        """For each row whether its task did; all, where no backward pass has brought the gradient."""
        device = local(next(iter(self._watched))).device
        votes = []
        for parameter, watched in self._watched.items():
            reports = [part.rows.to(device) for part in watched if part.rows is not None]
            rows = torch.zeros(len(local(parameter)), dtype=torch.bool, device=device)
            rows = torch.stack([rows, *reports]).any(0)
            votes += [rows, rows.new_tensor([bool(reports)])]
        joined = torch.cat(votes)
        if self._group is not None:
            joined = joined.to(torch.uint8)
            torch.distributed.all_reduce(joined, torch.distributed.ReduceOp.MAX, self._group)
        moved = [local(p.grad).flatten(1).any(1).to(device) for p in self._watched if p.grad is not None]
        answers = iter(torch.cat([joined.bool(), *moved]).tolist())  # waits for the device, once
        reported = {p: [next(answers) for _ in range(len(local(p)) + 1)] for p in self._watched}
        took_part = {}
        for parameter, (*here, known) in reported.items():
            if parameter.grad is not None:
                took_part[parameter] = [next(answers) or row or not known for row in here]
        return took_part


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
        self._state = dict(state) if TASKS in state or not state else _taken_apart(parameter, state)
        self._given = {key: _by_row(value) for key, value in self._state.items() if key != TASKS}

    def states(self) -> dict[Tensor, dict[str, Any]]:
        """The state of each row that has one; its tensors lie in those of the whole."""
        started = local(self._state[TASKS]).tolist() if self._state else []
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
            self._state[TASKS] = _whole(self._parameter, torch.tensor([float(bool(state)) for state in states]))
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
    apart: dict[str, Any] = {TASKS: _whole(parameter, torch.ones(count))}
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
