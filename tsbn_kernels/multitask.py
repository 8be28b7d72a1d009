"""One backbone, T streams: runs a converted model for all tasks, or for some, and gives each head its stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tsbn_kernels import checks
from tsbn_kernels.modules import FusedTSigmaBN
from tsbn_kernels.recompute import is_repetition, recompute_outputs


class MultiTaskModel(nn.Module):
    """A backbone with task-specific normalisation, and a head for each task.

    One input for all tasks runs through the shared stem once. The first task-specific layer fans it out, without
    copying it, into one stream a task; from there on the streams run stacked, task-major. No path may lead around that
    layer to where its streams are: for such a backbone (one that normalises before it convolves) give every task the
    input, ``model(dict.fromkeys(model.heads, x))``, and it runs stacked from the start.

    Args:
        backbone: a model with task-major layers of T tasks, from :func:`~tsbn_kernels.convert_model`. It returns a
            tensor whose first dimension is the batch, or a dict, list or tuple of such tensors.
        heads: T modules by the name of their task, in the order of the layers' tasks. ``tasks`` has the names; of a
            model from :func:`~tsbn_kernels.shard_tasks` ``heads`` are those of this process alone.
        recompute: run the backbone inside :func:`~tsbn_kernels.recompute_outputs`: half of the memory that its blocks
            keep for the backward pass, for one read and one write more of each layer's output. It takes layers with
            their activation inside; an output that is changed in place behind its layer is kept.

    Raises:
        ValueError: the backbone has no task-specific layer, or one with another number of tasks or stacking.
        TypeError: the backbone or a head is no module.
    """

    def __init__(self, backbone: nn.Module, heads: Mapping[str, nn.Module], *, recompute: bool = False) -> None:
        super().__init__()
        checks.check_module("backbone", backbone)
        if not isinstance(heads, (Mapping, nn.ModuleDict)) or not all(isinstance(name, str) for name in heads):
            raise TypeError(f"heads must be modules by the name of their task, got {heads!r:.80}")
        for name, head in heads.items():
            checks.check_module(f"head {name!r}", head)
        layers = [(name, module) for name, module in backbone.named_modules() if isinstance(module, FusedTSigmaBN)]
        if not layers:
            raise ValueError(
                f"backbone {type(backbone).__name__} has no task-specific layer; convert it with "
                f"convert_model(backbone, num_tasks={len(heads)})"
            )
        for name, layer in layers:
            if layer.num_tasks != len(heads) or layer.stacking != "task_major":
                raise ValueError(
                    f"layer {name!r} of the backbone must be task_major with a task for each of the {len(heads)} "
                    f"heads, got stacking={layer.stacking!r} and num_tasks={layer.num_tasks}"
                )
        self.backbone = backbone
        self.recompute = recompute
        self.heads = nn.ModuleDict(heads)
        self.tasks = tuple(heads)
        self._router = _Router()
        for _, layer in layers:
            layer.register_forward_pre_hook(self._router.route, with_kwargs=True)

    def forward(self, inputs: Tensor | Mapping[str, Tensor], tasks: Sequence[str] | None = None) -> dict[str, Any]:
        """Runs the tasks, and gives what their heads return, by task name.

        Args:
            inputs: one batch ``[N, *]`` that all tasks share, or a batch of each task's own by its name. Batches of one
                shape run stacked, those of different shapes after each other.
            tasks: names of the tasks to run; statistics of the others are left alone. None stands for all tasks, or
                for those that ``inputs`` names.

        Raises:
            ValueError: a task is unknown, named twice, or has no input; or there is none.
            TypeError: an input is no tensor, or ``tasks`` no sequence of names.
        """
        batches = inputs if isinstance(inputs, Mapping) else {"inputs": inputs}
        for name, batch in batches.items():
            checks.check_tensor(name, batch)
            if batch.dim() == 0:
                raise ValueError(f"{name} must have a batch dimension [N, ...], got shape []")
        if tasks is None:
            tasks = list(self.heads) if isinstance(inputs, Tensor) else list(inputs)
        if not isinstance(tasks, Sequence) or not all(isinstance(task, str) for task in tasks):
            raise TypeError(f"tasks must be a sequence of names, got {tasks!r}")
        if not tasks or len(set(tasks)) != len(tasks) or not set(tasks) <= set(self.tasks):
            raise ValueError(
                f"tasks must be different ones of {', '.join(self.tasks)}, got {', '.join(tasks) or 'none'}"
            )
        if elsewhere := [task for task in tasks if task not in self.heads]:
            raise ValueError(f"{', '.join(elsewhere)} runs on other ranks; this one has {', '.join(self.heads)}")
        if isinstance(inputs, Tensor):
            streams = dict(zip(tasks, self._streams(inputs, tasks, shared=True), strict=True))
        else:
            if missing := [task for task in tasks if task not in inputs]:
                raise ValueError(f"inputs has no batch for {', '.join(missing)}; it has {', '.join(inputs)}")
            streams = {}
            for shape in dict.fromkeys(inputs[task].shape for task in tasks):
                group = [task for task in tasks if inputs[task].shape == shape]
                stacked = torch.cat([inputs[task] for task in group])
                streams.update(zip(group, self._streams(stacked, group, shared=False), strict=True))
        return {task: self.heads[task](streams[task]) for task in tasks}

    def _streams(self, x: Tensor, tasks: Sequence[str], *, shared: bool) -> list[Any]:
        """The backbone's output for each task; ``x`` is one batch for all of them, or theirs stacked."""
        indices = None
        if list(tasks) != list(self.heads):
            indices = torch.tensor([self.tasks.index(task) for task in tasks], device=x.device)
        batch = x.shape[0] if shared else x.shape[0] // len(tasks)
        self._router.run = run = _Run(indices, len(tasks), batch)
        try:
            with recompute_outputs() if self.recompute else nullcontext():
                features = self.backbone(x)
            self._router.remember(run, features)
            return _unstack(features, run)
        finally:
            self._router.run = None


@dataclass(frozen=True)
class _Run:
    """What is running: ``count`` tasks (their ``indices``, None for all) with ``batch`` samples each."""

    indices: Tensor | None
    count: int
    batch: int


class _Router:
    """Tells the layers of a backbone, through a hook on each, whose streams they get. It does nothing between runs.

    Activation checkpointing runs parts of the backbone again in the backward pass: they get what they got in the run
    that the gradient has come from.
    """

    run: _Run | None = None
    repeated: _Run | None = None  # inside a backward pass

    def remember(self, run: _Run, features: Any) -> None:
        """Has the backward pass through ``features`` say which run it goes through."""
        if isinstance(features, Mapping):
            features = list(features.values())
        if isinstance(features, (list, tuple)):
            for feature in features:
                self.remember(run, feature)
        elif isinstance(features, Tensor) and features.requires_grad and not torch.compiler.is_compiling():
            features.register_hook(lambda _: self._enter(run))

    def _enter(self, run: _Run) -> None:
        self.repeated = run
        torch.autograd.Variable._execution_engine.queue_callback(self._leave)

    def _leave(self) -> None:
        self.repeated = None

    def route(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        run, x = self.repeated if is_repetition() else self.run, args[0]
        if run is None:
            return None
        stacked = run.count * run.batch
        if x.shape[0] not in (run.batch, stacked):
            raise ValueError(
                f"{type(layer).__name__} expected {run.batch} shared samples or {stacked} of {run.count} streams, got "
                f"input of shape {list(x.shape)}; the backbone must not change the number of samples on the way"
            )
        return args, {"tasks": run.indices, "fan_out": x.shape[0] != stacked}


def _unstack(features: Any, run: _Run) -> list[Any]:
    if isinstance(features, Tensor):
        if features.shape[0] == run.count * run.batch:
            return list(features.unflatten(0, (run.count, run.batch)).unbind())
        if features.shape[0] == run.batch:  # no task-specific layer has seen it
            return [features] * run.count
        raise ValueError(
            f"the backbone must return {run.batch} samples for each of {run.count} tasks, got a tensor of shape "
            f"{list(features.shape)}"
        )
    if isinstance(features, Mapping):
        columns = [_unstack(feature, run) for feature in features.values()]
        return [dict(zip(features, row, strict=True)) for row in zip(*columns, strict=True)]
    if isinstance(features, (list, tuple)):
        return list(zip(*(_unstack(feature, run) for feature in features), strict=True))
    raise TypeError(
        f"the backbone must return a tensor, or a dict, list or tuple of tensors, got {type(features).__name__}"
    )
