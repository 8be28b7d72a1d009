"""The gates in the state of a model: by what the layers have written there, else by the shapes of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tsbn_kernels.layers.task_specific import GATE_KEY

_WEIGHT, _STATISTICS = "weight", "running_mean"


def gates(state: Mapping[str, Any], gate: str | None, modules: Sequence[str] | None) -> dict[str, Tensor]:
    """The gates by the name of their layer.

    Args:
        state: of a model.
        gate: their kind, where the state does not say it.
        modules: whose weights are gates, where the state does not say it; None: by their shapes.

    Raises:
        ValueError: the state does not say what is a gate, or of what kind, and nobody else does; what is named is not
            there, or is no weight of tasks.
    """
    written = {
        name: kind[GATE_KEY] for name, kind in getattr(state, "_metadata", {}).items() if kind.get(GATE_KEY) is not None
    }
    if written and modules is None:
        outermost = [name for name in written if not any(_inside(name, other) for other in written)]
        return {name: _of_kind(_weight(state, name), written[name]) for name in outermost}
    found = _by_shape(state) if modules is None else {name: _weight(state, name) for name in modules}
    kinds = {name: written.get(name, gate) for name in found}
    unsure = [name for name in found if kinds[name] is None and not _has_twin(state, name, _STATISTICS)]
    unsure += [name for name in found if kinds[name] is None and _has_twin(state, name, "bias")]
    if unsure:
        raise ValueError(
            f"the state does not say whether the weights of {unsure[0]!r} are gates or their logits: say "
            f"gate='sigmoid' or gate='identity', or give the model"
        )
    return {name: _of_kind(weight, kinds[name] or "sigmoid") for name, weight in found.items()}


def _by_shape(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights ``[T, *]`` that stand beside a bias or statistics of the same shape.

    Raises:
        ValueError: a weight ``[T, D]`` without either may be that of an RMS norm, or of a plain layer.
    """
    names = [key.rpartition(".")[0] for key in state if key.rpartition(".")[2] == _WEIGHT]
    weights = {name: state[_join(name, _WEIGHT)] for name in names}
    weights = {name: weight for name, weight in weights.items() if isinstance(weight, Tensor) and weight.dim() > 1}
    found = {name: weight for name, weight in weights.items() if _has_twin(state, name, "bias", _STATISTICS)}
    tasks = {weight.shape[0] for weight in found.values()} or {len(heads(state))}
    alone = [
        name
        for name, weight in weights.items()
        if name not in found and weight.dim() == 2 and weight.shape[0] in tasks and not _has(state, name, "bias")
    ]
    if alone:
        shape = list(weights[alone[0]].shape)
        raise ValueError(
            f"the state does not say whether {_join(alone[0], _WEIGHT)!r}, of shape {shape}, holds the gates of a "
            f"norm without bias or statistics, or is a plain weight: give modules=[...], the names of all modules with "
            f"gates, or the model"
        )
    return found


def _has(state: Mapping[str, Any], name: str, vector: str) -> bool:
    return isinstance(state.get(_join(name, vector)), Tensor)


def _has_twin(state: Mapping[str, Any], name: str, *vectors: str) -> bool:
    """Whether one of these stands beside the weight, and is of its shape."""
    shape = state[_join(name, _WEIGHT)].shape
    return any(_has(state, name, vector) and state[_join(name, vector)].shape == shape for vector in vectors)


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
