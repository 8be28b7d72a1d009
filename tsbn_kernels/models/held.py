"""What a model holds beside its modules and tensors: in attributes, objects, sets, closures and partial functions."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

_MOST = 100_000  # objects that are looked at: a trainer or a data set may hang on a model
_ENDS = (type, ModuleType, CodeType, FrameType, Tensor)


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
    while waiting and len(seen) < _MOST:
        value = waiting.pop()
        if wanted(value):
            found[id(value)] = value
        elif id(value) not in seen and not isinstance(value, (nn.Module, *_ENDS)):
            seen.add(id(value))
            waiting += _parts(value)
    return list(found.values())


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, FunctionType):  # not its globals
        return [value.__closure__, value.__defaults__, value.__kwdefaults__, vars(value)]
    return gc.get_referents(value)
