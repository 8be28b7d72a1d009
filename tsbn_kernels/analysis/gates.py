"""The gates of a model as one matrix: how much each task uses each filter of each layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from tsbn_kernels.analysis import states
from tsbn_kernels.layers.task_specific import whole
from tsbn_kernels.models.multitask import MultiTaskModel
from tsbn_kernels.operator.checks import some


@dataclass(frozen=True, eq=False)
class Importance:
    """How much each task uses each filter: the absolute value of its gate.

    Attributes:
        matrix: float64 ``[T, F]`` on the CPU; the filters of all layers side by side, in the order of the layers.
        tasks: the names of the T tasks.
        layers: the names of the layers.
        sizes: how many filters each layer has; their sum is F.
    """

    matrix: Tensor
    tasks: tuple[str, ...]
    layers: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def slices(self) -> dict[str, slice]:
        """The columns of each layer, by its name."""
        ends = list(accumulate(self.sizes, initial=0))
        return {layer: slice(*part) for layer, *part in zip(self.layers, ends[:-1], ends[1:], strict=True)}

    def filter(self, column: int) -> tuple[str, int]:
        """The layer of a column, and the index of its filter in that layer.

        Raises:
            IndexError: there is no such column.
        """
        for layer, part in self.slices.items():
            if part.start <= column < part.stop:
                return layer, column - part.start
        raise IndexError(f"column {column} is out of range for {self.matrix.shape[1]} filters")

    def by_layer(self) -> dict[str, Importance]:
        """The importance in each layer alone, by its name."""
        parts = self.slices.items()
        return {
            layer: Importance(self.matrix[:, part], self.tasks, (layer,), (part.stop - part.start,))
            for layer, part in parts
        }


Source: TypeAlias = "nn.Module | Mapping[str, Any] | Importance | Tensor"


def importance(
    source: Source,
    tasks: Sequence[str] | None = None,
    *,
    gate: Literal["sigmoid", "identity"] | None = None,
    modules: Sequence[str] | None = None,
) -> Importance:
    """Reads how much each task uses each filter, over all layers with gates.

    A gate is a factor of the normalised activation, and its absolute value is the importance: ``sigmoid(weight)`` of
    the paper's layers, ``|weight|`` of layers with ``gate="identity"``, whose scales may be negative. Vectors that are
    distributed over processes are gathered: all of these must call.

    A state says of itself which tensors are gates, and of what kind, where layers of this package have written it with
    ``model.state_dict()``, and ``torch.save`` and ``torch.load`` keep that. Where it does not (a file of safetensors,
    a state that was put together anew), the layers are those whose ``weight`` ``[T, *]`` has a ``bias`` or a
    ``running_mean`` of the same shape. Their gates are taken for sigmoids where no layer has a bias. A ``weight`` that
    stands alone, as that of an RMS norm or of a plain layer without a bias, is refused where it may be of gates;
    ``modules`` says which are.

    Args:
        source: a model, or its state alone; an ``Importance``, or a matrix ``[T, F]`` of gates.
        tasks: the names of the tasks. By default those of the :class:`~tsbn_kernels.MultiTaskModel` that is the model
            or a part of it; without one, ``"task 0"`` and so on.
        gate: of a state that does not say it.
        modules: of a state that does not say it, the names of the modules whose ``weight`` is that of gates.

    Raises:
        TypeError: ``source`` is none of these, or ``modules`` no sequence of names, or of no state.
        ValueError: there are no gates, layers have different numbers of tasks, or the number of names is another; a
            state does not say which of its tensors are gates, or of what kind.
    """
    if gate not in (None, "sigmoid", "identity"):
        raise ValueError(f"gate must be 'sigmoid' or 'identity', got {gate!r}")
    if modules is not None and (isinstance(modules, str) or not isinstance(source, Mapping)):
        raise TypeError(f"modules must be names in a state, got {modules!r:.80} and a {type(source).__name__}")
    names: Sequence[str] | None = None
    if isinstance(source, Importance):
        names, found = source.tasks, {layer: source.matrix[:, part] for layer, part in source.slices.items()}
    elif isinstance(source, Tensor):
        found = {"gates": source}
    elif isinstance(source, nn.Module):
        models = [module for module in source.modules() if isinstance(module, MultiTaskModel)]
        names, found = (models[0].tasks if models else None), {name: module.gates for name, module in layers(source)}
    elif isinstance(source, Mapping):
        found = states.gates(source, gate, modules)
        names = states.heads(source)
    else:
        raise TypeError(
            f"expected a model, its state, an Importance or a matrix [T, F] of gates, got a {type(source).__name__}"
        )
    if not found:
        remedy = "; where a state does not say it, name modules by modules=" if isinstance(source, Mapping) else ""
        raise ValueError(
            f"{type(source).__name__} has no layer with gates: a tensor [T, *] of factors, as FusedTSigmaBN2d has "
            f"it{remedy}"
        )
    matrices = {name: _matrix(name, gates) for name, gates in found.items()}
    counts = {matrix.shape[0]: name for name, matrix in matrices.items()}
    if len(counts) > 1:
        different = " and ".join(f"{count} of {name!r}" for count, name in counts.items())
        raise ValueError(f"all layers must have the same number of tasks, got {different}")
    (count,) = counts
    if tasks is None:
        tasks = names if names and len(names) == count else [f"task {index}" for index in range(count)]
    elif len(tasks) != count or isinstance(tasks, str):
        raise ValueError(f"tasks must name the {count} tasks of the gates, got {tasks!r:.80}")
    sizes = tuple(matrix.shape[1] for matrix in matrices.values())
    return Importance(torch.cat(list(matrices.values()), 1).abs(), tuple(tasks), tuple(matrices), sizes)


def layers(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The modules with gates and their names, in the order of the model; none that lie inside of another one."""
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, Any]]:
        if module in seen:
            return
        seen.add(module)
        if isinstance(getattr(module, "gates", None), Tensor):
            yield name, module
            return
        for key, child in module.named_children():
            yield from walk(child, f"{name}.{key}" if name else key)

    yield from walk(model, prefix)


def _matrix(name: str, gates: Tensor) -> Tensor:
    """The gates of a layer, float64 ``[T, F]`` on the CPU."""
    if gates.dim() < 2 or not gates.is_floating_point() or not gates.numel():
        raise ValueError(
            f"the gates of {name!r} must be floating-point [T, *], a factor for each task and filter, got "
            f"{gates.dtype} of shape {list(gates.shape)}"
        )
    if gates.is_meta:
        raise ValueError(f"the gates of {name!r} are on the meta device, and have no values; load the model first")
    matrix: Tensor = whole(gates.detach()).to("cpu", torch.float64).flatten(1)
    if not bool(matrix.isfinite().all()):
        raise ValueError(f"the gates of {name!r} are not all finite; the model has diverged")
    return matrix


def same_tasks(sources: Sequence[Source]) -> list[Importance]:
    """Reads several runs of one set of tasks.

    Raises:
        TypeError: ``sources`` is no sequence.
        ValueError: the runs have different numbers of tasks, or different names for them.
    """
    if isinstance(sources, (nn.Module, Mapping, Importance, Tensor)) or not isinstance(sources, Sequence):
        raise TypeError(f"expected a sequence of models, states or matrices, got a {type(sources).__name__}")
    runs = [importance(source) for source in sources]
    if len({run.tasks for run in runs}) > 1:
        found = " and ".join(some(run.tasks) for run in runs[:2])
        raise ValueError(f"all runs must have the same tasks in the same order, got {found}")
    return runs
