"""What may be assumed of a module: that it computes what its class says, and nothing else hangs on it."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Collection, Iterable
from inspect import getattr_static
from itertools import chain
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.module import _WrappedHook

CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS = (
    *CALL_HOOKS,
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_load_state_dict_pre_hooks",
)
_COMPUTING = ("forward", "_call_impl", "_conv_forward", "_call")  # methods of PyTorch's modules and ours
_HARMLESS = {"__init__", "__repr__", "_get_name", "extra_repr", "reset_parameters", "reset_running_stats"}
_MOST_HELD = 100_000  # objects that are looked at: a trainer or a data set may hang on a model
_ENDS = (type, ModuleType, CodeType, FrameType, Tensor)


def is_plain(module: nn.Module, kinds: Collection[type[nn.Module]]) -> bool:
    """Whether a module is of exactly one of these classes, and computes what that class does.

    A subclass may have a forward of its own; a parametrized module has a class of its own; pruning and the older
    weight and spectral norms are hooks; and a method may be set on the instance.
    """
    return type(module) in kinds and not any(name in vars(module) for name in _COMPUTING) and not has_hooks(module)


def has_hooks(module: nn.Module, *kinds: str) -> bool:
    """Whether something else sees what goes into a module or comes out of it, apart from this package.

    ``kinds`` are names of :data:`CALL_HOOKS`; all of them by default.
    """
    return any(
        not _is_from(hook, "tsbn_kernels.") for kind in kinds or CALL_HOOKS for hook in getattr(module, kind).values()
    )


def deviation(module: nn.Module, kind: type[nn.Module], methods: Collection[str] = ()) -> str | None:
    """Says in which methods a module is not known to be equal to one of class ``kind``, a base of its own class.

    It compares ``methods``, by default all that ``kind`` has, apart from harmless ones.
    """
    members = {name: getattr_static(kind, name) for name in dir(kind)}
    called = [name for name, member in members.items() if callable(member) or hasattr(member, "__get__")]
    compared = set(methods or called) - _HARMLESS
    own = [n for n in compared if getattr_static(type(module), n, None) is not getattr_static(kind, n, None)]
    if own:
        return f"has a class with its own {', '.join(sorted(own))}"
    if own := [name for name in compared if name in vars(module)]:
        return f"has its own {', '.join(own)}, set on the instance"
    return None


def leaf_call(module: nn.Module, x: Any, *args: Any, **options: Any) -> Any:
    """Puts a call of a module down in the graph of torch.fx as one node, whatever the tracer takes for a leaf.

    Raises:
        TypeError: ``x`` is no ``fx.Proxy``, or the module has hooks, which would run in the trace and in the graph.
    """
    if not isinstance(x, fx.Proxy):
        raise TypeError(f"input must be a tensor, got {type(x).__name__}")
    path = x.tracer.path_of_module(module)  # type: ignore[attr-defined]
    if not path or has_hooks(module):
        raise TypeError(
            f"torch.fx cannot trace {type(module).__name__} {path!r} "
            + ("with its hooks" if path else "by itself")
            + ": take a tracer whose is_leaf_module() says True of it, in a model"
        )
    given = {name: value for name, value in options.items() if value is not None}
    return x.tracer.create_proxy("call_module", path, (x, *args), given)


def _is_from(hook: Any, *packages: str) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(packages)


def carry_attributes(source: nn.Module, target: nn.Module, known: Collection[str]) -> None:
    """Takes the attributes that a user has put on a module, or on its tensors, to what takes its place.

    Those of the module that are ``known`` are no user's.

    Raises:
        ValueError: ``target`` has an attribute of that name already.
    """
    own = {name: value for name, value in vars(source).items() if name not in {*known, "_compiled_call_impl"}}
    if taken := [name for name in own if hasattr(target, name)]:
        raise ValueError(f"attribute {', '.join(taken)} has the name of one of {type(target).__name__}'s; rename it")
    for name, value in own.items():
        setattr(target, name, value)
    for name, tensor in chain(source.named_parameters(recurse=False), source.named_buffers(recurse=False)):
        if (counterpart := getattr(target, name, None)) is not None:
            vars(counterpart).update(vars(tensor))


def carry_hooks(source: nn.Module, target: nn.Module) -> None:
    """Moves the hooks of a module to another, which takes its place: they get that, its inputs and outputs.

    Those of this package are dropped, and those that make a tensor of the module, as pruning does.
    """
    if source._is_full_backward_hook is not None:
        target._is_full_backward_hook = source._is_full_backward_hook
    for name in _HOOKS:
        hooks = getattr(source, name)
        for key, hook in list(hooks.items()):
            if _is_from(hook, "tsbn_kernels.", "torch.nn.utils."):
                del hooks[key]
            elif isinstance(hook, _WrappedHook) and hook.with_module:
                hooks[key] = _WrappedHook(hook.hook, target)
        setattr(target, name, hooks)  # the same dictionary, in which handles remove their hooks


def copy_of(model: nn.Module, shared: Iterable[Any] = ()) -> nn.Module:
    """A deep copy that keeps the attributes of parameters, and shares process groups, which cannot be copied.

    It shares the objects in ``shared`` too.
    """
    groups = [module.process_group for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    twin = copy.deepcopy(model, {id(kept): kept for kept in (*groups, *shared)})
    for parameter, copied in zip(model.parameters(), twin.parameters(), strict=True):
        vars(copied).update(vars(parameter))
    return twin


def held(model: nn.Module, wanted: Callable[[Any], bool]) -> list[Any]:
    """Finds the objects that are ``wanted``; the way to them leads through no module but those of the model."""
    found: dict[int, Any] = {}
    seen: set[int] = set()
    waiting = [
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if name not in ("_modules", "_parameters", "_buffers")
    ]
    while waiting and len(seen) < _MOST_HELD:
        value = waiting.pop()
        if wanted(value):
            found[id(value)] = value
        elif id(value) not in seen and not isinstance(value, (nn.Module, *_ENDS)):
            seen.add(id(value))
            waiting += _held_by(value)
    return list(found.values())


def _held_by(value: Any) -> Iterable[Any]:
    if isinstance(value, FunctionType):  # not its globals
        return [value.__closure__, value.__defaults__, value.__kwdefaults__, vars(value)]
    return gc.get_referents(value)
