"""The gates in the state of a model: by what the layers have written there, else by the shapes of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tsbn_kernels.layers.task_specific import GATE_KEY

_WEIGHT = "weight"


def gates(state: Mapping[str, Any], gate: str | None) -> dict[str, Tensor]:
    """The gates by the name of their layer; ``gate`` is their kind where the state does not say it.

    Raises:
        ValueError: the state does not say it, and no ``gate`` is given; what it says is gates is not there.
    """
    written = {
        name: kind[GATE_KEY] for name, kind in getattr(state, "_metadata", {}).items() if kind.get(GATE_KEY) is not None
    }
    if written:
        outermost = [name for name in written if not any(_inside(name, other) for other in written)]
        return {name: _of_kind(_weight(state, name), written[name]) for name in outermost}
    found = {}
    biased = []
    for key, weight in state.items():
        prefix, _, last = key.rpartition(".")
        if last != _WEIGHT or not isinstance(weight, Tensor) or weight.dim() < 2:
            continue
        shapes = {name: getattr(state.get(_join(prefix, name)), "shape", None) for name in ("bias", "running_mean")}
        if weight.shape in shapes.values():
            found[prefix] = weight
            if shapes["bias"] is not None:
                biased.append(prefix)
    if gate is None and biased:
        raise ValueError(
            f"the state does not say whether the weights of {biased[0]!r} are gates or their logits: say "
            f"gate='sigmoid' or gate='identity', or give the model"
        )
    return {name: _of_kind(weight, gate or "sigmoid") for name, weight in found.items()}


def heads(state: Mapping[str, Any]) -> list[str]:
    """The names of the heads of a ``MultiTaskModel``, in their order; heads without parameters are not among them."""
    parts = (key.split(".") for key in state)
    return list(dict.fromkeys(part[part.index("heads") + 1] for part in parts if "heads" in part[:-1]))


def _weight(state: Mapping[str, Any], name: str) -> Tensor:
    key = _join(name, _WEIGHT)
    if not isinstance(state.get(key), Tensor):
        raise ValueError(
            f"the state has no {key!r}, the weight of a layer with gates; where it is pruned, parametrized or shared "
            f"with another, load the state into the model and give that"
        )
    return state[key]  # type: ignore[no-any-return]


def _of_kind(weight: Tensor, kind: str) -> Tensor:
    return torch.sigmoid(weight) if kind == "sigmoid" else weight


def _inside(name: str, other: str) -> bool:
    return name != other and name.startswith(f"{other}." if other else "")


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
