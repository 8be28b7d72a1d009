"""What a backbone may return: tensors in dicts, lists, tuples and dataclasses, beside things that are no tensors."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from numbers import Number
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

_PLAIN = (Number, str, bytes, Enum, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.SymInt)


def tensors(value: Any) -> list[Tensor]:
    """Finds the tensors of a structure, in its order.

    Raises:
        TypeError: it holds something of which it is not known what it holds.
    """
    found: list[Tensor] = []
    replaced(value, found.append)
    return found


def replaced(value: Any, put: Callable[[Tensor], Any]) -> Any:
    """Copies a structure, in its classes, with ``put(tensor)`` in the place of each tensor."""
    if isinstance(value, Tensor):
        return put(value)
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, Mapping):
        return _mapping(value, {key: replaced(entry, put) for key, entry in value.items()})
    if isinstance(value, (list, tuple)) and not isinstance(value, PackedSequence):  # whose rows are no samples
        return _sequence(value, [replaced(entry, put) for entry in value])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        result = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(result, field.name, replaced(getattr(value, field.name), put))
        return result
    raise TypeError(
        f"the backbone returned a {type(value).__name__}, and it is not known which parts of that are batches; return "
        f"tensors, or a dict, list, tuple or dataclass of them"
    )


def _mapping(like: Any, items: dict[Any, Any]) -> Any:
    if type(like) is OrderedDict:
        return OrderedDict(list(items.items()))
    return items if type(like) is dict or not hasattr(like, "__setitem__") else _filled(like, items.items())


def _sequence(like: Any, entries: list[Any]) -> Any:
    if isinstance(like, list):
        return entries if type(like) is list else _filled(like, enumerate(entries))
    if hasattr(like, "_make"):  # which PyTorch 2.11 does not compile
        return type(like)(*entries) if torch.compiler.is_compiling() else like._make(entries)
    return type(like)(entries)


def _filled(container: Any, items: Iterable[tuple[Any, Any]]) -> Any:
    """A copy of a container with other contents."""
    result = copy.copy(container)
    for key, entry in items:
        result[key] = entry
    return result
