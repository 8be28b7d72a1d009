"""Where the streams of a backbone part: found by a trial of a copy whose tensors have no values.

The first task-specific layer fans the shared input out. In a residual network a path may lead around that layer, to
where its streams are. Then the streams part before: at the input of the innermost module that holds both the layer and
the place where the path ends.
"""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from itertools import chain, takewhile
from traceback import clear_frames
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten

from tsbn_kernels.definition.plain import CALL_HOOKS
from tsbn_kernels.layers.task_specific import TaskSpecific
from tsbn_kernels.models.features import has_function, of_each_task
from tsbn_kernels.operator import runs

_SAMPLES = 4 * 97  # of a trial: no other size of a model is likely to be a multiple
_CALL = nn.Module._call_impl.__code__


class Parting(NamedTuple):
    """The call at which the streams part.

    Attributes:
        module: its name in the backbone, ``""`` for the backbone itself; None: the task-specific layers that the shared
            input reaches.
        leaves: which of the module's arguments are batches, as ``tree_flatten((args, kwargs))`` counts them.
        obstacle: why there is no such call, where that lies with the rows that a layer gets.
    """

    module: str | None = None
    leaves: tuple[int, ...] = (0,)
    obstacle: str | None = None

    def error(self, backbone: nn.Module) -> ValueError:
        """What the obstacle is for a user."""
        return ValueError(
            f"the tasks of {type(backbone).__name__} have no streams: a trial with {_SAMPLES} samples has found that "
            f"{self.obstacle}"
        )


class PartStreams:
    """A pre-hook that fans out the batches that a module gets.

    Args:
        router: of the model whose streams part there.
        leaves: as in :class:`Parting`.
    """

    def __init__(self, router: Any, leaves: tuple[int, ...]) -> None:
        self.router, self.leaves = router, leaves

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Copies the batches for every task: once in a run, and again where that is repeated."""
        run, repeated = runs.current(self.router)
        if run is None or not run.shared or run.count == 1:
            return None
        values, structure = tree_flatten((args, kwargs))
        leaves = [leaf for leaf in self.leaves if leaf < len(values) and isinstance(values[leaf], Tensor)]
        rows = tuple(values[leaf].shape[0] for leaf in leaves)
        if run.parted and not (repeated and rows == run.parted):
            return None
        compiling = torch.compiler.is_compiling()
        for leaf in leaves:
            if run.batch and values[leaf].shape[0] % run.batch:
                raise runs.RowsError(
                    f"{type(module).__name__} expected {run.batch} shared samples, or a multiple, got input of shape "
                    f"{list(values[leaf].shape)}"
                )
            values[leaf] = _repeat(values[leaf], run.count) if compiling else _Repeat.apply(values[leaf], run.count)
        run.parted = rows
        run.fan_out(run.batch)
        return tree_unflatten(values, structure)


class _Repeat(torch.autograd.Function):
    """A copy for every task; a function of our own, by which :func:`has_function` knows streams."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, count: int) -> Tensor:
        return _repeat(x, count)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.count = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.unflatten(0, (ctx.count, gradient.shape[0] // ctx.count)).sum(0), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _repeat(tangent, ctx.count)


def _repeat(x: Tensor, count: int) -> Tensor:
    return x.repeat(count, *(1,) * (x.dim() - 1))


def remove(model: nn.Module) -> None:
    """Takes the hooks of :class:`PartStreams` off a model."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, PartStreams):
                del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]


def find(backbone: nn.Module, router: runs.Router, count: int, x: Tensor) -> Parting:
    """Finds where the streams of ``count`` tasks part in a backbone that is given ``x`` for all of them.

    It stays as it is, and so do its statistics and the state of random numbers. Where its copy cannot run, for a value
    decides what it does, the layers themselves fan out.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # which takes long to import

    with ExitStack() as contexts:
        contexts.enter_context(_disable_current_modes())
        contexts.enter_context(torch.inference_mode(False))
        contexts.enter_context(torch.enable_grad())
        contexts.enter_context(saved_tensors_hooks(_save_nothing, _save_nothing))  # a checkpoint around would count
        contexts.enter_context(warnings.catch_warnings())
        contexts.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        warnings.simplefilter("ignore")
        log = logging.getLogger("torch._subclasses.fake_tensor")  # which tells of every error, also of those that help
        contexts.callback(setattr, log, "disabled", log.disabled)
        log.disabled = True
        try:
            twin = _without_values(backbone, router)
        except Exception:  # whatever a model holds may refuse to be copied
            return Parting()
        names = {module: name for name, module in twin.named_modules()}
        shape = _SAMPLES, *map(_hint, x.shape[1:])
        batch = torch.empty(shape, dtype=x.dtype, device=x.device, requires_grad=x.is_floating_point())
        parting = Parting()
        while True:
            trial = _Trial(router, count)
            failed = _attempt(twin, parting, trial, batch)
            if failed is None:
                return parting
            before = _before(parting, trial.paths, failed.calls, names)
            if before is None:
                return Parting(obstacle=failed.obstacle)
            parting = before


def _save_nothing(_: Any) -> Any:
    """What a trial keeps for a backward pass, of which there is none."""
    return None


class Call(NamedTuple):
    """One of the calls of modules that lead to where something happens."""

    module: nn.Module
    args: Any
    kwargs: Any


def calls(error: BaseException) -> list[Call]:
    """The calls of modules that an error has come through, the outermost first."""
    frames, traceback = [], error.__traceback__
    while traceback is not None:
        frames.append(traceback.tb_frame)
        traceback = traceback.tb_next
    return _calls(frames)


def _calls(frames: Sequence[FrameType]) -> list[Call]:
    of_call = [frame.f_locals for frame in frames if frame.f_code is _CALL]
    return [Call(values["self"], values["args"], values["kwargs"]) for values in of_call]


class _Trial(runs.Run):
    """A run that notes through which calls it came to where it fanned out."""

    def __init__(self, owner: Any, count: int) -> None:
        super().__init__(owner, None, count, _SAMPLES, shared=True)
        self.paths: list[list[Call]] = []

    def fan_out(self, rows: int) -> None:
        super().fan_out(rows)
        frames: list[FrameType] = []
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back
        self.paths.append(_calls(frames[::-1]))


class _NoStaleSamples(TorchFunctionMode):
    """Lets no streams have the number of samples in their shape that was read before they parted.

    A view of such a shape may fit and mix the tasks, and nothing else would tell.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            stale = isinstance(value, Tensor) and _SAMPLES in value.shape
            if stale and value.grad_fn is not None and has_function(value.grad_fn):
                raise runs.RowsError(
                    f"the number of samples was read before the streams part, and used behind that, for a shape of "
                    f"{list(value.shape)}"
                )
        return result


class _Failed(NamedTuple):
    calls: list[Call]  # that lead to the error
    obstacle: str | None  # what it says of rows


def _attempt(twin: nn.Module, parting: Parting, trial: _Trial, batch: Tensor) -> _Failed | None:
    """Runs the copy of a backbone whose streams part there."""
    handle = None if parting.module is None else install(twin, parting, trial.owner)
    runs.enter(trial)
    try:
        with nullcontext() if parting.module == "" else _NoStaleSamples():  # where nothing is read before
            features = twin(batch.clone())  # a leaf could not be changed in place
        of_each_task(features, trial, twin)
    except Exception as error:  # of the model's own code, it may be any
        failed = _Failed(calls(error), str(error) if isinstance(error, runs.RowsError) else None)
        clear_frames(error.__traceback__)  # a checkpoint that has raised keeps its hooks as long as its frame lives
        return failed
    finally:
        runs.leave(trial)
        if handle is not None:
            handle.remove()
    return None


def install(backbone: nn.Module, parting: Parting, router: runs.Router) -> Any:
    """Lets the streams of a model part there; returns a handle that has ``remove()``."""
    assert parting.module is not None
    hook = PartStreams(router, parting.leaves)
    return backbone.get_submodule(parting.module).register_forward_pre_hook(hook, with_kwargs=True)


def _before(
    parting: Parting, paths: list[list[Call]], failed: list[Call], names: dict[nn.Module, str]
) -> Parting | None:
    """An earlier call at which the streams may part, the last that leads to the error and all that has fanned out."""
    ways = [[call for call in path if call.module in names] for path in (failed, *paths)]
    fanned_out = {path[-1].module for path in ways[1:]}
    common = takewhile(lambda calls: len({call.module for call in calls}) == 1, zip(*ways, strict=False))
    for call in reversed([same[0] for same in common] if paths else []):
        if call.module not in fanned_out and (leaves := _batches(call)):
            return Parting(names[call.module], leaves)
    return None if parting.module == "" else Parting("")


def _batches(call: Call) -> tuple[int, ...]:
    """Which leaves of a call's arguments are a batch that all tasks share."""
    values, _ = tree_flatten((call.args, call.kwargs))
    return tuple(
        leaf
        for leaf, value in enumerate(values)
        if isinstance(value, Tensor) and value.dim() and value.shape[0] % _SAMPLES == 0
        if value.grad_fn is None or not has_function(value.grad_fn)
    )


def _without_values(backbone: nn.Module, router: runs.Router) -> nn.Module:
    """A copy without the hooks of others, of fake tensors; its parameters require a gradient if they can."""
    memo: dict[int, Any] = {id(router): router}
    for module in backbone.modules():
        for value in chain(module._parameters.values(), module._buffers.values(), vars(module).values()):
            if isinstance(value, Tensor):
                empty = torch.empty(value.shape, dtype=value.dtype, device=value.device)
                learned = isinstance(value, nn.Parameter)
                memo[id(value)] = nn.Parameter(empty, value.is_floating_point()) if learned else empty
    twin = copy.deepcopy(backbone, memo)
    for module in twin.modules():
        if isinstance(module, TaskSpecific):
            module._tasks = None  # it has the rows of all processes
        for name in CALL_HOOKS:
            hooks = getattr(module, name)
            for key, hook in list(hooks.items()):
                if not str(getattr(hook, "__module__", "")).startswith("torch.nn.utils."):  # which make parameters
                    del hooks[key]
    return twin


def _hint(size: Any) -> int:
    """A size, or what it is in the example from which a graph is made."""
    return int(size) if isinstance(size, int) else int(size.node.hint)
