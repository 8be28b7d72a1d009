"""One backbone, T streams: runs a converted model for all tasks, or for some, and gives each head its stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from threading import RLock
from typing import Any

import torch
from torch import Tensor, fx, nn

from tsbn_kernels.backends import capture
from tsbn_kernels.definition.plain import leaf_call
from tsbn_kernels.layers.late_fan_out import LateFanOut
from tsbn_kernels.layers.mixing import task_index
from tsbn_kernels.layers.task_specific import TaskSpecific
from tsbn_kernels.models.fast_paths import close_fast_paths
from tsbn_kernels.models.features import has_function, of_each_task, tensors
from tsbn_kernels.models.parting import Parting, calls, find, install
from tsbn_kernels.operator import checks, runs
from tsbn_kernels.operator.recompute_outputs import recompute_outputs

_finding = RLock()  # one for all models, for a model's own could not be copied with it; they may be nested
_WORDS = "size", "shape", "dimension"  # of errors that may come from a path around the first task-specific layer
_OTHER_FORM = "give every task the input, and it runs stacked from the start: model(dict.fromkeys(model.heads, x))"


class MultiTaskModel(nn.Module):
    """A backbone with task-specific normalisation, and a head for each task.

    One input for all tasks runs through the shared stem once. The first task-specific layer fans it out, without
    copying it, into one stream a task; from there on the streams run stacked, task-major. Where a path leads around
    that layer, as in the pre-norm blocks of transformers, the input of the innermost module that holds the layer and
    the end of the path is copied for every task. The first call finds that module, by a trial of a copy
    without values. Where a value decides what the backbone does, there is no trial; give every task the input then,
    ``model(dict.fromkeys(model.heads, x))``, and it runs stacked from the start.

    Args:
        backbone: a model with task-major layers of T tasks, from :func:`~tsbn_kernels.convert_model`. It returns a
            tensor whose first dimension is the batch, or a dict, list, tuple or dataclass of such tensors, beside what
            is no batch and goes to every head as it is.
        heads: T modules by the name of their task, in the order of the layers' tasks. ``tasks`` has the names; of a
            model from :func:`~tsbn_kernels.shard_tasks` ``heads`` are those of this process alone.
        recompute: run the backbone inside :func:`~tsbn_kernels.recompute_outputs`: half of the memory that its blocks
            keep for the backward pass, for one read and one write more of each layer's output. It takes layers with
            their activation inside; an output that is changed in place behind its layer is kept.

    Raises:
        ValueError: the backbone has no task-specific layer, or one with another number of tasks or stacking.
        TypeError: the backbone or a head is no module.
    """

    _parting: Parting | None = None

    def __init__(self, backbone: nn.Module, heads: Mapping[str, nn.Module], *, recompute: bool = False) -> None:
        super().__init__()
        checks.check_module("backbone", backbone)
        if not isinstance(heads, (Mapping, nn.ModuleDict)) or not all(isinstance(name, str) for name in heads):
            raise TypeError(f"heads must be modules by the name of their task, got {heads!r:.80}")
        for name, head in heads.items():
            checks.check_module(f"head {name!r}", head)
        layers = _layers(backbone)
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
        close_fast_paths(backbone)
        self.backbone = backbone
        self.recompute = recompute
        self.heads = nn.ModuleDict(heads)
        self.tasks = tuple(heads)
        self._router = _Router()
        for _, layer in layers:
            layer._routers = (*layer._routers, self._router)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes pickles from when hooks told the layers whose streams they get."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for _, layer in _layers(self.backbone):
            if self._router not in layer._routers:
                layer._routers = (*layer._routers, self._router)
                for key, hook in list(layer._forward_pre_hooks.items()):
                    if getattr(hook, "__self__", None) is self._router:
                        del layer._forward_pre_hooks[key], layer._forward_pre_hooks_with_kwargs[key]

    def forward(self, inputs: Tensor | Mapping[str, Tensor], tasks: Sequence[str] | None = None) -> dict[str, Any]:
        """Runs the tasks, and gives what their heads return, by task name.

        Args:
            inputs: one batch ``[N, *]`` that all tasks share, or a batch of each task's own by its name. Batches whose
                samples have one shape run at once: stacked, or of different sizes as a mixed batch; others after each
                other. So do those of different sizes where layers synchronise their statistics or are held by
                :func:`~tsbn_kernels.hold_absent_tasks`.
            tasks: names of the tasks to run; statistics of the others are left alone. None stands for all tasks, or
                for those that ``inputs`` names.

        Raises:
            ValueError: a task is unknown, named twice, or has no input; or there is none.
            TypeError: an input is no tensor, or ``tasks`` no sequence of names.
        """
        if isinstance(inputs, fx.Proxy):
            return leaf_call(self, inputs, tasks=tasks)
        batches = inputs if isinstance(inputs, Mapping) else {"inputs": inputs}
        for name, batch in batches.items():
            checks.check_tensor(name, batch)
            if batch.dim() == 0:
                raise ValueError(f"{name} must have a batch dimension [N, ...], got shape []")
        heads = self.heads
        every_task = list(heads)
        if tasks is None:
            tasks = every_task if isinstance(inputs, Tensor) else list(inputs)
        if tasks is not every_task:
            self._check(tasks)
        if isinstance(inputs, Tensor):
            rows, every = self._streams(inputs, tasks, shared=True)
            streams = dict(zip(tasks, rows, strict=True))
        else:
            if missing := [task for task in tasks if task not in inputs]:
                raise ValueError(f"inputs has no batch for {', '.join(missing)}; it has {', '.join(inputs)}")
            streams, every = {}, []
            kept = 1 if self._mixes() else 0  # dimensions that may differ
            for shape in dict.fromkeys(inputs[task].shape[kept:] for task in tasks):
                group = [task for task in tasks if inputs[task].shape[kept:] == shape]
                x, sizes = torch.cat([inputs[task] for task in group]), [inputs[task].shape[0] for task in group]
                if all(size == sizes[0] for size in sizes):
                    rows, common = self._streams(x, group, shared=False)
                else:
                    rows, common = self._mixed(x, sizes, group)
                streams.update(zip(group, rows, strict=True))
                every += common
        if len(tasks) == 1 or not every or torch.compiler.is_compiling():
            return {task: heads[task](streams[task]) for task in tasks}
        with _unchanged(every):
            return {task: heads[task](streams[task]) for task in tasks}

    def _check(self, tasks: Sequence[str]) -> None:
        if not isinstance(tasks, Sequence) or not all(isinstance(task, str) for task in tasks):
            raise TypeError(f"tasks must be a sequence of names, got {tasks!r}")
        if not tasks or len(set(tasks)) != len(tasks) or not set(tasks) <= set(self.tasks):
            raise ValueError(
                f"tasks must be different ones of {', '.join(self.tasks)}, got {', '.join(tasks) or 'none'}"
            )
        if elsewhere := set(tasks) - set(self.heads):
            names, own = ", ".join(sorted(elsewhere)), ", ".join(self.heads)
            raise ValueError(f"{names} runs on other ranks; this one has {own}")

    def _streams(self, x: Tensor, tasks: Sequence[str], *, shared: bool) -> tuple[list[Any], list[Tensor]]:
        """The features of each task, and those that all have; ``x`` is one batch for all of them, or theirs stacked."""
        indices = None
        if list(tasks) != list(self.heads):
            indices = capture.task_indices([self.tasks.index(task) for task in tasks], x)
        count = len(tasks)
        parting = None
        if count > 1:
            compiling = torch.compiler.is_compiling()  # where an attribute that is read may not change
            parting = self._find_parting(x) if compiling else self._parting or self._find_parting(x)
        run = runs.Run(self._router, indices, count, x.shape[0] if shared else x.shape[0] // count, shared)
        runs.enter(run)
        try:
            with recompute_outputs() if self.recompute else nullcontext():
                features = self.backbone(x)
        except (RuntimeError, ValueError, IndexError) as error:
            if parting is not None and parting.obstacle and not isinstance(error, runs.RowsError):
                raise parting.error(self.backbone) from error
            if shared and run.fanned_out and not torch.compiler.is_compiling():
                raise _explained(error, self.backbone) from error
            raise
        finally:
            runs.leave(run)
        if parting is not None and parting.obstacle:
            raise parting.error(self.backbone)
        streams, every = of_each_task(features, run, self.backbone)
        if run.passes is not None:
            for index, stream in enumerate(streams):
                own = tensors(stream)
                run.passes.watch(index, [tensor for tensor in own if not any(tensor is known for known in every)])
        return streams, every

    def _mixes(self) -> bool:
        """Whether all layers take samples of tasks in different numbers, and nobody asks which outputs a loss is of."""
        return all(
            not isinstance(layer, LateFanOut)
            and getattr(layer, "process_group", None) is None
            and layer._participation is None
            and not layer.fan_out
            for _, layer in _layers(self.backbone)
        )

    def _mixed(self, x: Tensor, sizes: Sequence[int], tasks: Sequence[str]) -> tuple[list[Any], list[Tensor]]:
        """The features of each task, and those that all have, of the tasks' batches one after the other."""
        index = torch.cat(
            [
                torch.full((size,), self.tasks.index(task), dtype=torch.int64, device=x.device)
                for task, size in zip(tasks, sizes, strict=True)
            ]
        )
        with task_index(index), recompute_outputs() if self.recompute else nullcontext():
            features = self.backbone(x)
        return of_each_task(features, runs.Run(self._router, None, 1, x.shape[0], False), self.backbone, sizes)

    def _find_parting(self, x: Tensor) -> Parting:
        """Where the streams part, found at the first call; one that is compiled finds it while it is compiled."""
        with _finding:
            if self._parting is None:
                parting = find(self.backbone, self._router, len(self.tasks), x)
                if parting.module is not None:
                    install(self.backbone, parting, self._router)
                self._parting = parting
        return self._parting


# What torch.compiler.assume_constant_result does, which would load the compiler with the package.
MultiTaskModel._find_parting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _layers(backbone: nn.Module) -> list[tuple[str, TaskSpecific | LateFanOut]]:
    """The layers that fan out or take streams, by name; not those that run on what all tasks share."""
    shared = {module.norm for module in backbone.modules() if isinstance(module, LateFanOut)}
    return [
        (name, module)
        for name, module in backbone.named_modules()
        if isinstance(module, (TaskSpecific, LateFanOut)) and module not in shared
    ]


def _explained(error: Exception, backbone: nn.Module) -> Exception:
    """An error behind the first task-specific layer with the module that it came from; as it is if not of sizes."""
    text = str(error)
    kinds = RuntimeError, ValueError, IndexError, runs.RowsError
    if type(error) not in kinds or not any(word in text for word in _WORDS):
        return error
    names = {module: name for name, module in backbone.named_modules()}
    where = [backbone, *(call.module for call in calls(error) if call.module in names)][-1]
    place = f"module {names[where]!r}" if names[where] else "the backbone"
    kind = ValueError if isinstance(error, ValueError) else type(error)
    return kind(
        f"{text}\nin {place} ({type(where).__name__}), behind a task-specific layer that has fanned the input out into "
        f"streams. Where a path leads around that layer, or the number of samples was read before it, "
        f"{_OTHER_FORM}"
    )


@contextmanager
def _unchanged(every: Sequence[Tensor]) -> Iterator[None]:
    """What several heads get, none of them may change."""
    versions = [None if tensor.is_inference() else tensor._version for tensor in every]
    yield
    for tensor, version in zip(every, versions, strict=True):
        if version is not None and tensor._version != version:
            raise RuntimeError(
                f"a head has changed a tensor of shape {list(tensor.shape)} in place that the heads of other tasks get "
                f"too, for no task-specific layer has seen it; let the head change a clone() of it"
            )


class _Router:
    """Tells the layers of a backbone whose streams they get, while the backbone runs."""

    def route(self, layer: nn.Module, x: Tensor) -> tuple[Tensor | None, bool] | None:
        """The tasks of a call, None for all, and whether it fans out; None where no run of the model calls."""
        run, repeated = runs.current(self)
        if run is None or x.dim() == 0:
            return None
        return run.indices, _fans_out(layer, x, run, repeated)


def _fans_out(layer: nn.Module, x: Tensor, run: runs.Run, repeated: bool) -> bool:
    """Whether a layer gets what all tasks share, and not their streams; rows may be tokens or windows of a sample.

    Raises:
        ValueError: the rows are those of neither, or may be those of both.
    """
    rows, stacked = x.shape[0], run.count * run.batch
    if run.count == 1 or (run.parted and stacked and rows % stacked == 0):
        return False
    first = run.shared and not run.fanned_out
    known = rows in run.flattened
    if not first and not known and (rows == stacked or (not run.shared and stacked and rows % stacked == 0)):
        return False
    if run.shared and rows == run.batch and not run.parted:
        run.fan_out(rows)
        return True
    if repeated and known:
        return True
    if run.shared and stacked:
        if not first and rows % stacked == 0:
            sure = repeated or torch.compiler.is_compiling() or x.grad_fn is None or has_function(x.grad_fn)
            if not known and sure:
                return False
            raise runs.RowsError(
                f"{type(layer).__name__} got {rows} rows, which may be those of {run.count} streams, or "
                f"{rows // run.batch} of each of {run.batch} samples that all tasks share; {_OTHER_FORM}"
            )
        if rows % run.batch == 0 and not run.parted:
            run.fan_out(rows)
            return True
    raise runs.RowsError(
        f"{type(layer).__name__} expected {run.batch} shared samples or {stacked} of {run.count} streams, or a "
        f"multiple, got input of shape {list(x.shape)}; the backbone must not change the number of samples on the way, "
        f"nor have them in another dimension than the first (as with batch_first=False)"
    )
