"""The state of a model from a file: that of ``torch.save``, alone or among other things, or of safetensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def load_state(path: str | Path, key: str | None = None) -> Mapping[str, Any]:
    """Reads the state of a model from a checkpoint; nothing in the file is executed.

    Args:
        path: a file of ``torch.save`` that holds a state, or dicts with one inside; or one of safetensors.
        key: where the state is, ``"model"`` or ``"ema.model"``. Needed where the file has several.

    Raises:
        ValueError: the file is no checkpoint, has no state, several, or none at ``key``.
        OSError: it cannot be read.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        content: Any = load_file(path)
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # whatever the bytes of another file make of its reader
            raise ValueError(
                f"{path} is no checkpoint of tensors alone ({str(error).splitlines()[0]:.120}); save "
                f"model.state_dict(), not the model"
            ) from error
    found = dict(_states(content, ""))
    if key is not None:
        if key not in found:
            raise ValueError(f"{path} has no state at {key!r}; it has {_listed(found)}")
        return found[key]
    if len(found) != 1:
        raise ValueError(
            f"{path} has several states, say which by key: {_listed(found)}" if found else f"{path} has no state"
        )
    return next(iter(found.values()))


def _states(content: Any, place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The dicts that have the weight of a module, and where they are."""
    if not isinstance(content, Mapping):
        return
    if any(isinstance(name, str) and _is_weight(name) and isinstance(content[name], Tensor) for name in content):
        yield place, content
        return
    for name, inner in content.items():
        if isinstance(name, str):
            yield from _states(inner, f"{place}.{name}".strip("."))


def _is_weight(name: str) -> bool:
    return name.rpartition(".")[2] == "weight"


def _listed(found: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, found)) or "none"
