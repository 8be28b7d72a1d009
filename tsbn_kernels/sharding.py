"""Task parallelism: every process runs the streams of its own tasks, and only shared weights' gradients are exchanged.

Task-specific vectors become DTensors, sharded over the tasks, so that optimisers and distributed checkpoints know what
each process has. Shared weights stay what they are, equal on all processes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tsbn_kernels.layers.participation import local
from tsbn_kernels.layers.task_specific import TaskSpecific
from tsbn_kernels.models.multitask import MultiTaskModel
from tsbn_kernels.models.same_tasks import layers_of_same_tasks

if TYPE_CHECKING:  # importing the package loads no part of torch.distributed
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

_TASKS = "tasks"  # the dimension of the mesh
_HEADS = "heads."


def shard_tasks(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Leaves on each process its own tasks, in place: their rows of every ``[T, C]`` vector, and their heads.

    Along ``"tasks"`` the ranks get consecutive parts of ``ceil(T / ranks)`` tasks, the last one what remains. The
    model then runs these tasks alone: it takes one input for all of them, or their streams stacked, and a
    :class:`~tsbn_kernels.MultiTaskModel` returns the outputs of their heads. All ranks along ``"tasks"`` take the same
    samples (and draw the same random numbers before the first task-specific layer), so that what is shared there is
    equal; ranks along any other dimension take samples of their own. The forward pass exchanges nothing.

    The loss of a rank is the sum over its own tasks. At the end of each ``backward()`` the gradients become those of
    one process: of shared weights summed over the tasks, and all averaged over the other dimensions, where running
    statistics are averaged too. All ranks must run the same number of backward passes, apart from those inside
    :func:`no_sync`. Gradients that are accumulated over several passes are right with it and without.

    ``weight``, a learned ``bias`` and the buffers of the layers are DTensors of the shape ``[T, C]`` from then on, the
    parameters new objects: make the optimiser afterwards. ``load_state_dict`` takes the state of the whole model.

    Args:
        model: a ``MultiTaskModel``, or a backbone from :func:`~tsbn_kernels.convert_model`. Its parameters and buffers
            are first made those of the first rank.
        mesh: has a dimension named ``"tasks"``: ``init_device_mesh("cuda", (4,), mesh_dim_names=("tasks",))``, or with
            data parallelism ``init_device_mesh("cuda", (4, 2), mesh_dim_names=("tasks", "data"))``.

    Returns:
        The model.

    Raises:
        ValueError: the mesh has no such dimension, or so many ranks along it that one would have no task; the model
            has no task-specific layer, layers of different numbers of tasks, or is sharded already; tasks of different
            ranks share a head; statistics are synchronised over ranks that have different tasks.
        TypeError: the model has a :class:`~tsbn_kernels.LateFanOut`.
    """
    layers: list[Any] = _layers(model)
    whole: Any = model
    parts = _parts(layers[0].num_tasks, mesh)
    tasks = parts[mesh.get_local_rank(_TASKS)]
    if isinstance(model, MultiTaskModel):
        _check_heads(model, parts)
    _check_groups(layers, mesh)
    whole_state = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
    for dimension in range(mesh.ndim):
        _in_one(whole_state, mesh.get_group(dimension), average=False)
    if isinstance(model, MultiTaskModel):
        model.heads = nn.ModuleDict({name: model.heads[name] for name in list(model.heads)[tasks.start : tasks.stop]})
        whole.register_load_state_dict_pre_hook(_leave_other_heads)
    sharded: dict[Tensor, Tensor] = {}  # what two layers share stays one
    for layer in layers:
        layer._tasks = tasks
        for name, vector in _vectors(layer):
            if vector not in sharded:
                sharded[vector] = _shard(vector, tasks, mesh)
            setattr(layer, name, sharded[vector])
        layer.register_load_state_dict_pre_hook(_take_own_rows)
    whole._gradients = _Gradients(model, mesh)
    return model


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Backward passes inside this context leave the gradients to the next pass outside of it: for accumulation.

    Args:
        model: from :func:`shard_tasks`.
    """
    gradients = _gradients(model)
    before, gradients.wanted = gradients.wanted, False
    try:
        yield
    finally:
        gradients.wanted = before


def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """Clips the gradient by the norm over all tasks, wherever they are, as ``torch.nn.utils.clip_grad_norm_`` does.

    To be called on all ranks.

    Args:
        model: from :func:`shard_tasks`.
        max_norm: the Euclidean norm that the gradient has at most, afterwards.

    Returns:
        The norm before.
    """
    from torch import distributed

    gradients = _gradients(model)
    own, shared = ([local(p.grad) for p in part if p.grad is not None] for part in (gradients.own, gradients.shared))
    device = next(model.parameters()).device
    squares = [torch.nn.utils.get_total_norm(part).to(device, torch.float64).square() for part in (own, shared)]
    distributed.all_reduce(squares[0], group=gradients.mesh.get_group(_TASKS))
    norm = (squares[0] + squares[1]).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in chain(own, shared):
        gradient.mul_(factor.to(gradient.dtype))
    return norm


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Gives every rank the state of the whole model, as one process has it; all ranks must call it.

    Args:
        model: from :func:`shard_tasks`.
    """
    from torch import distributed
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    group = _gradients(model).mesh.get_group(_TASKS)
    state: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if not isinstance(model, MultiTaskModel):
        return dict(state)
    heads = {key: tensor.cpu() for key, tensor in state.items() if key.startswith(_HEADS)}
    all_heads: list[Any] = [None] * group.size()
    distributed.all_gather_object(all_heads, heads, group=group)
    backbone = {key: tensor for key, tensor in state.items() if key not in heads}
    device = next(model.parameters()).device
    return backbone | {key: tensor.to(device) for part in all_heads for key, tensor in part.items()}


class _Gradients:
    """Makes the gradients of a sharded model those of one process at the end of each backward pass.

    Gradients of shared weights are multiplied by the number of ranks along the tasks as they come, and averaged in the
    end. The average of what is equal on all ranks is itself: a gradient that an earlier pass has reduced, and to which
    this one has added, comes out right, as it would not by a sum.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.wanted = True
        self.queued = False
        self._model = model
        self._hooked: dict[Tensor, Any] = {}
        self._places = [  # of each parameter: its name, module and attribute
            (f"{path}.{name}".strip("."), module, name, parameter)
            for path, module in model.named_modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]
        heads = set(model.heads.modules()) if isinstance(model, MultiTaskModel) else set()
        shared = {p: None for _, module, _, p in self._places if module not in heads and not _is_sharded(p)}
        self.shared = list(shared)
        self.own = [parameter for parameter in model.parameters() if parameter not in shared]
        model.register_forward_pre_hook(self._watch)
        self._watch()

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model hooks its own parameters."""
        return {**self.__dict__, "_hooked": {}}

    def _watch(self, *_: Any) -> None:
        """Hooks what needs a gradient, before each forward pass."""
        self.queued = False  # a backward pass that raised has left it set
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        for path, module, name, parameter in self._places:
            if module._parameters.get(name) is not parameter:
                raise RuntimeError(
                    f"parameter {path!r} was replaced after shard_tasks(), and its gradients would stay on this rank; "
                    f"convert, assign, parametrise or wrap first, and shard_tasks() then"
                )
        # Hooks have no reference to the model: Python's collector does not see autograd's, and would never free it.
        for parameter in chain(self.shared, self.own):
            if parameter.requires_grad and parameter not in self._hooked:
                parameter.register_post_accumulate_grad_hook(partial(_queue, weakref.ref(self)))
                self._hooked[parameter] = None
        ranks = self.mesh.get_group(_TASKS).size()
        for parameter in self.shared:
            if parameter.requires_grad:
                # What accumulates is made anew where the dtype or the device of the parameter changes.
                accumulator = torch.autograd.graph.get_gradient_edge(parameter).node
                if self._hooked[parameter] is not accumulator:
                    accumulator.register_prehook(partial(_multiply, ranks))
                    self._hooked[parameter] = accumulator

    @torch.no_grad()
    def reduce(self) -> None:
        """Exchanges the gradients."""
        self.queued = False
        buffers = self._model.named_buffers()
        statistics = [buffer for name, buffer in buffers if name.endswith(("running_mean", "running_var"))]
        for dimension in self.mesh.mesh_dim_names or ():
            group = self.mesh.get_group(dimension)
            if dimension == _TASKS:
                _average_gradients(self.shared, group)
            else:
                _average_gradients([*self.shared, *self.own], group, statistics)


def _multiply(ranks: int, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Multiplies what reaches a parameter; autograd passes None for one that no loss of this rank depends on."""
    return tuple(None if gradient is None else gradient * ranks for gradient in gradients)


def _queue(reference: weakref.ref[_Gradients], _: Tensor) -> None:
    """The exchange at the end of the backward pass that runs."""
    gradients = reference()
    if gradients is not None and gradients.wanted and not gradients.queued:
        gradients.queued = True
        torch.autograd.Variable._execution_engine.queue_callback(gradients.reduce)


def _average_gradients(parameters: Sequence[Tensor], group: ProcessGroup, others: Sequence[Tensor] = ()) -> None:
    """A parameter that has no gradient on this rank takes part with zeros; one that has none anywhere gets none."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if not parameters:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    there = torch.tensor([float(p.grad is not None) for p in parameters]).to(local(gradients[0]))
    _in_one([*gradients, there, *others], group, average=True)
    if any(p.grad is None for p in parameters):
        for parameter, gradient, share in zip(parameters, gradients, there.tolist(), strict=True):
            if share > 0:
                parameter.grad = gradient


def _in_one(tensors: Sequence[Tensor], group: ProcessGroup, *, average: bool) -> None:
    """Averages tensors over a group, or gives all the first rank's, in place: one collective for each dtype."""
    from torch import distributed

    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in map(local, tensors):
        kinds.setdefault(tensor.dtype, []).append(tensor)
    for same in kinds.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        if average:
            distributed.all_reduce(flat, group=group)
            flat /= group.size()
        else:
            distributed.broadcast(flat, group=group, group_src=0)
        for tensor, part in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _gradients(model: nn.Module) -> _Gradients:
    found = getattr(model, "_gradients", None)
    if not isinstance(found, _Gradients):
        raise ValueError(f"expected a model from shard_tasks(), got a {type(model).__name__} that is not sharded")
    return found


def _layers(model: nn.Module) -> list[TaskSpecific]:
    """The task-specific layers, which must be all alike."""
    if any(isinstance(module, MultiTaskModel) for module in model.modules() if module is not model):
        raise ValueError(f"{type(model).__name__} has a MultiTaskModel inside; shard that one")
    layers = layers_of_same_tasks(model, "sharded")
    if sharded := [name for name, layer in layers.items() if any(_is_sharded(v) for _, v in _vectors(layer))]:
        raise ValueError(f"layer {sharded[0]!r} is sharded already; shard_tasks() comes first, and once")
    return list(layers.values())


def _parts(num_tasks: int, mesh: DeviceMesh) -> list[range]:
    """The tasks of each rank."""
    names = mesh.mesh_dim_names or ()
    if _TASKS not in names:
        raise ValueError(
            f"the mesh must have a dimension {_TASKS!r}, got {', '.join(map(repr, names)) or 'no names'}; "
            f"init_device_mesh(..., mesh_dim_names=({_TASKS!r},)) gives one"
        )
    ranks = mesh.size(names.index(_TASKS))
    size = -(-num_tasks // ranks)
    parts = [range(first, min(first + size, num_tasks)) for first in range(0, num_tasks, size)]
    if len(parts) < ranks:
        raise ValueError(
            f"{num_tasks} tasks, in parts of {size}, occupy {len(parts)} of the {ranks} ranks along {_TASKS!r}; "
            f"{len(parts)} ranks are as fast, and leave the others to a second dimension of the mesh"
        )
    return parts


def _check_heads(model: MultiTaskModel, parts: list[range]) -> None:
    backbone = set(model.backbone.parameters())
    owners: dict[Tensor, tuple[str, int]] = {}
    for task, (name, head) in enumerate(model.heads.items()):
        (rank,) = (rank for rank, part in enumerate(parts) if task in part)
        for parameter in head.parameters():
            other, owner = owners.setdefault(parameter, (name, rank))
            if owner != rank and parameter not in backbone:
                raise ValueError(
                    f"the heads {other!r} and {name!r} share parameters, and are of different ranks along {_TASKS!r}; "
                    f"give each task a head of its own, or a place beside the other"
                )


def _check_groups(layers: list[TaskSpecific], mesh: DeviceMesh) -> None:
    """Statistics may be synchronised among ranks that have the same tasks."""
    from torch import distributed

    own = mesh.mesh.movedim((mesh.mesh_dim_names or ()).index(_TASKS), 0)[mesh.get_local_rank(_TASKS)]
    for layer in layers:
        group = getattr(layer, "process_group", None)
        if group is None:
            continue
        ranks = distributed.get_process_group_ranks(None if group == "world" else group)
        if not set(ranks) <= set(own.flatten().tolist()):
            raise ValueError(
                f"a layer synchronises its statistics over the ranks {ranks}, which have different tasks; set "
                f"process_group=mesh.get_group() of another dimension than {_TASKS!r}, or None"
            )


def _leave_other_heads(model: MultiTaskModel, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Ignores what is in the state of the whole model for the heads of other ranks."""
    elsewhere = tuple(f"{prefix}{_HEADS}{name}." for name in model.tasks if name not in model.heads)
    for key in [key for key in state_dict if key.startswith(elsewhere)]:
        del state_dict[key]


def _take_own_rows(layer: TaskSpecific, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Lets a sharded layer load whole vectors."""
    for name, own in _vectors(layer):
        whole = state_dict.get(prefix + name)
        if whole is not None and not _is_sharded(whole) and whole.shape == own.shape:
            assert layer._tasks is not None
            state_dict[prefix + name] = _shard(whole, layer._tasks, own.device_mesh)


def _vectors(layer: TaskSpecific) -> Iterator[tuple[str, Any]]:
    yield from layer.named_parameters(recurse=False)
    yield from layer.named_buffers(recurse=False)


def _shard(vector: Tensor, tasks: range, mesh: DeviceMesh) -> Tensor:
    """``[T, *]`` as a DTensor of which this rank keeps its rows."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    rows = vector.detach()[tasks.start : tasks.stop].clone()
    placements = [Shard(0) if name == _TASKS else Replicate() for name in mesh.mesh_dim_names or ()]
    sharded = DTensor.from_local(
        rows, mesh, placements, run_check=False, shape=vector.shape, stride=vector.contiguous().stride()
    )
    return nn.Parameter(sharded, vector.requires_grad) if isinstance(vector, nn.Parameter) else sharded


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")
