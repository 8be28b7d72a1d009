"""Inference: the plain network of one task, its normalisation folded into its convolutions."""

from __future__ import annotations

import copy
import operator
import warnings
from collections import Counter, OrderedDict
from collections.abc import Mapping
from functools import reduce
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from tsbn_kernels.definition.plain import carry_hooks, copy_of, is_plain
from tsbn_kernels.layers.batch_norm import FusedTSigmaBN, FusedTSigmaBN1d, FusedTSigmaBN2d, FusedTSigmaBN3d
from tsbn_kernels.layers.task_specific import TaskSpecific
from tsbn_kernels.models import parting
from tsbn_kernels.models.convert import _replace, plain_layer
from tsbn_kernels.models.fast_paths import open_fast_paths
from tsbn_kernels.models.fuse_activations import Tracer, twin_of, unfuse
from tsbn_kernels.models.multitask import MultiTaskModel
from tsbn_kernels.models.norms import BATCH_NORMS, FusedTSigmaBNAct, FusedTSigmaBNAct2d
from tsbn_kernels.models.prune import Pruning, shrink
from tsbn_kernels.operator import checks

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear)
_NORMS = (*BATCH_NORMS, *BATCH_NORMS.values(), FusedTSigmaBNAct, FusedTSigmaBNAct2d)
# What has as many axes as it is given.
_SAME_AXES = (
    nn.Linear, nn.Identity, nn.Dropout, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SiLU, nn.GELU,
    nn.Hardswish, nn.Tanh, nn.Sigmoid, nn.BatchNorm1d, FusedTSigmaBN, FusedTSigmaBN1d,
)  # fmt: skip
_FOLDING = ("reparameterize", "fuse", "switch_to_deploy")  # methods of blocks that fold themselves, as timm calls them


def fold_into_conv(conv: nn.Module, layer: FusedTSigmaBN, task: int) -> nn.Module:
    """A copy of a convolution or linear layer that does the normalisation of one task too, as ``layer.eval()`` does.

    Half-precision parameters are folded in float32 and rounded once.

    Args:
        conv: ``nn.Conv1d``, ``2d``, ``3d``, ``nn.ConvTranspose1d``, ``2d``, ``3d``, or ``nn.Linear``. A linear
            layer takes ``[N, C]`` alone from then on: of ``[N, C, L]`` a BatchNorm normalises another axis.
        layer: what follows it.
        task: index of the task.

    Returns:
        The folded copy; where the layer has an activation, ``nn.Sequential`` of the copy and the activation.

    Raises:
        TypeError: ``conv`` is another module (a subclass may compute something else), or ``layer`` is.
        ValueError: the layer has no running statistics or does not fit, or ``conv`` has hooks, which would be kept
            but see another output.
        IndexError: there is no such task.
    """
    if not isinstance(layer, FusedTSigmaBN):
        raise TypeError(f"layer must be a FusedTSigmaBN, got {type(layer).__name__}")
    if type(conv) not in _FOLDABLE:
        expected = ", ".join(f"nn.{kind.__name__}" for kind in _FOLDABLE)
        raise TypeError(f"cannot fold into {type(conv).__name__}, expected one of {expected}")
    if obstacle := _obstacle(conv, layer):
        raise ValueError(f"cannot fold {type(layer).__name__} into {type(conv).__name__}: {obstacle}")
    folded, rest = _fold(conv, layer, task)
    if isinstance(folded, nn.Linear):
        folded.__class__ = _FlatLinear
    return folded if isinstance(rest, nn.Identity) else nn.Sequential(folded, rest).eval()


@torch.inference_mode(False)  # for it may prune
def export_task(model: nn.Module, task: int | str, *, prune: Pruning | None = None) -> nn.Module:
    """The plain network of one task, in eval mode, for ``torch.export``, ONNX and everything that takes plain modules.

    It is the copy that :func:`~tsbn_kernels.revert_model` gives, in which each normalisation that alone uses the
    output of a convolution or linear layer is folded into that; an ``nn.Identity`` or the activation stays in its
    place. All other modules keep class and name. ``torch.fx`` finds what can be folded. A model that it cannot trace
    keeps its normalisation, with the same outputs and a warning. Into a linear layer is folded where the model flattens
    its input before; into a block that folds itself, such as RepVGG's, nothing is: it has ``reparameterize()``,
    ``fuse()`` or ``switch_to_deploy()``, which ``timm.utils.reparameterize_model`` calls afterwards.

    With ``prune`` the network is smaller: filters that the gates of this task have closed are gone. What such a filter
    leaves behind, its bias after the activation, is folded into the layers that read it, where it is 0 or these have no
    padding with zeros; elsewhere the filter stays. The outputs are those of the network in which the gates of these
    filters are 0, which is checked.

    Args:
        model: a converted model, or a :class:`~tsbn_kernels.MultiTaskModel`.
        task: index of the task; of a ``MultiTaskModel`` also the name of its head.
        prune: which filters are to go, such as ``Pruning(images, threshold=0.05)``. Its example is an input of the
            network of one task. It needs torch-pruning (``pip install 'tsbn-kernels[prune]'``).

    Returns:
        The network; of a ``MultiTaskModel`` the ``nn.Sequential`` of backbone and head.

    Raises:
        ValueError: the model has no task-specific layer, there is no head of that name, or heads of other processes;
            or, as :func:`~tsbn_kernels.prune` says it, no filter can be taken out.
        ImportError, RuntimeError: as :func:`~tsbn_kernels.prune` raises them.
        IndexError: there is no such task.
        TypeError: a name was given, and the model has no heads.
    """
    checks.check_module("model", model)
    complaints: list[str] = []
    if isinstance(model, MultiTaskModel):
        names = list(model.tasks)
        if len(model.heads) < len(names):
            raise ValueError(
                "the tasks of the model are sharded; load its full_state_dict() into a model of one process"
            )
        if isinstance(task, str) and task not in names:
            raise ValueError(f"task must be one of {', '.join(names)}, or an index, got {task!r}")
        index = names.index(task) if isinstance(task, str) else checks.index("task", task)
        if not -len(names) <= index < len(names):
            raise IndexError(f"task {index} is out of range for num_tasks={len(names)}")
        plain = _export_parts({model.backbone: index, model.heads[names[index]]: 0}, complaints, prune)
    elif isinstance(task, str):
        raise TypeError(f"{type(model).__name__} has no heads to be named, task must be an index, got {task!r}")
    else:
        if not any(isinstance(module, TaskSpecific) for module in model.modules()):
            raise ValueError(f"{type(model).__name__} has no task-specific layer; convert it with convert_model()")
        if any(isinstance(module, MultiTaskModel) for module in model.modules()):
            raise ValueError(f"{type(model).__name__} has a MultiTaskModel inside; export that one")
        plain = _export_parts({model: task}, complaints, prune)
    if complaints:
        warnings.warn("; ".join(complaints), stacklevel=3)  # behind the decorator
    return plain


def _export_parts(parts: Mapping[nn.Module, int], complaints: list[str], prune: Pruning | None) -> nn.Module:
    """The network of a backbone and its head, or of a backbone, of these tasks; raises where there is no such one."""
    if prune is not None:
        unfolded = [_export(part, task, [], fold=False)[0] for part, task in parts.items()]
        complaints += filter(None, [shrink(nn.Sequential(*unfolded), prune, fold=True)])
        parts = dict.fromkeys(unfolded, 0)
    flat, exported = False, []
    for part, task in parts.items():
        plain, flat = _export(part, task, complaints, flat=flat)
        exported.append(plain)
    return exported[0] if len(exported) == 1 else nn.Sequential(*exported).eval()


class _FlatLinear(nn.Linear):
    """Takes ``[N, C]``: the channels of a BatchNorm are axis 1, those of a linear layer the last."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 2:
            raise ValueError(
                f"a normalisation is folded into Linear, which takes [N, C] and got {input.dim()} dimensions"
            )
        return functional.linear(input, self.weight, self.bias)


class _Epilogue(nn.Module):
    """Stands where a task-specific layer is called with more than its input: adds the residual, then activates."""

    def __init__(self, norm: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor, residual: Tensor | None = None, *, fan_out: bool | None = None) -> Tensor:
        """One stream of one task fans out into itself."""
        y = self.norm(x)
        return self.activation(y if residual is None else y + residual)  # type: ignore[no-any-return]


def _export(
    model: nn.Module, task: int, complaints: list[str], *, flat: bool = False, fold: bool = True
) -> tuple[nn.Module, bool]:
    """The plain network, and whether it is known to return ``[N, C]``; ``flat`` says that it is given that."""
    model = copy_of(model).eval()
    parting.remove(model)
    model = _replace(model, unfuse(model))
    norms = {module: name for name, module in model.named_modules() if isinstance(module, (TaskSpecific, _BatchNorm))}
    calls: list[_Call] = []
    foldable = [name for module, name in norms.items() if isinstance(module, _BatchNorm)]
    if foldable:
        try:
            calls, flat = _calls(model, flat=flat)
        except Exception as error:  # tracing runs the model's own code, which may raise anything
            complaints.append(
                f"torch.fx cannot trace {type(model).__name__}, its normalisation stays unfolded in "
                f"{checks.some(map(repr, foldable))}: {type(error).__name__}: {error}"
            )
    replaced: dict[nn.Module, nn.Module] = {
        norm: plain_layer(norm, name, task) for norm, name in norms.items() if isinstance(norm, TaskSpecific)
    }
    for norm, conv, extended in calls:
        if conv is not None and fold:
            replaced[conv], rest = _fold(conv, norm, task)
            replaced[norm] = _Epilogue(nn.Identity(), rest) if extended else rest
        elif extended:
            replaced[norm] = _Epilogue(*_split(norm, task))
            carry_hooks(norm, replaced[norm])
    model = _replace(model, replaced).eval()
    open_fast_paths(model)
    return model, flat


class _Call(NamedTuple):
    norm: Any
    conv: nn.Module | None  # what it can be folded into
    extended: bool  # called with a residual or an option


def _calls(model: nn.Module, *, flat: bool) -> tuple[list[_Call], bool]:
    """The calls of task-specific and plain normalisation, as ``torch.fx`` finds them, and whether ``[N, C]`` comes."""
    twin = twin_of(model)
    graph = Tracer().trace(twin)
    modules = {node: twin.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    count = Counter(module for called in modules.values() for module in called.modules())
    read = {id(operator.attrgetter(str(node.target))(twin)) for node in graph.nodes if node.op == "get_attr"}
    folding = [
        f"{path}."
        for path, module in model.named_modules()
        if path and any(callable(getattr(module, name, None)) for name in _FOLDING)
    ]

    def used_once(module: nn.Module) -> bool:
        return count[module] == 1 and not any(id(t) in read for t in chain(module.parameters(), module.buffers()))

    def folds(before: Any, norm: nn.Module, node: fx.Node) -> bool:
        return (
            is_plain(before, _FOLDABLE)
            and used_once(before)
            and used_once(norm)
            and not _obstacle(before, norm)
            and (not isinstance(before, nn.Linear) or _is_flat(node.args[0], modules, flat=flat))
            and not str(node.target).startswith(tuple(folding))
        )

    calls = []
    for node, norm in modules.items():
        if not isinstance(norm, FusedTSigmaBN) and type(norm) not in BATCH_NORMS:
            continue
        source, *more = node.args or (None,)
        options = [*more, *node.kwargs.values()]
        conv = None
        if (
            isinstance(source, fx.Node)
            and list(source.users) == [node]
            and source not in options
            and folds(modules.get(source), norm, source)
        ):
            conv = model.get_submodule(str(source.target))
        extended = bool(options) and isinstance(norm, FusedTSigmaBN)
        calls.append(_Call(model.get_submodule(str(node.target)), conv, extended))
    (output,) = (node for node in graph.nodes if node.op == "output")
    return calls, _is_flat(output.args[0], modules, flat=flat)


def _is_flat(node: Any, modules: Mapping[fx.Node, nn.Module], *, flat: bool) -> bool:
    """Whether what a node gives is known to be ``[N, C]``; ``flat`` says it of the model's input."""
    while isinstance(node, fx.Node) and node in modules:
        module: Any = modules[node]
        if is_plain(module, (nn.Flatten,)):
            return bool(module.start_dim == 1 and module.end_dim == -1)
        if not is_plain(module, _SAME_AXES):
            return False
        node = node.args[0] if node.args else None
    if not isinstance(node, fx.Node) or node.op == "placeholder":
        return flat and node is not None
    return node.target in (torch.flatten, "flatten") and [*node.args[1:], *node.kwargs.values()] == [1]


def _obstacle(conv: nn.Module, norm: Any) -> str | None:
    """Why a normalisation cannot be folded into a convolution or linear layer before it."""
    channels: Any = conv.out_features if isinstance(conv, nn.Linear) else conv.out_channels
    if channels != norm.num_features:
        return f"it has {norm.num_features} channels and its input {channels}"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics, and normalises by those of its batch in evaluation too"
    spatial = (FusedTSigmaBN2d, FusedTSigmaBN3d, nn.BatchNorm2d, nn.BatchNorm3d)
    if isinstance(conv, nn.Linear) and isinstance(norm, spatial):
        return "its channels are not the last axis"
    for module in (conv, norm):
        if not is_plain(module, (*_FOLDABLE, *_NORMS)):
            return f"{type(module).__name__} has hooks, or methods of its own, remove them"
    return None


def _split(norm: Any, task: int) -> tuple[nn.Module, nn.Module]:
    """The BatchNorm of one task, and what the layer does after it."""
    if not isinstance(norm, FusedTSigmaBN):
        return norm, nn.Identity()
    plain = FusedTSigmaBN.task(norm, task)
    plain, rest = (plain[0], plain[1]) if isinstance(plain, nn.Sequential) else (plain, nn.Identity())
    if isinstance(norm, FusedTSigmaBNAct):
        rest = nn.Sequential(OrderedDict(drop=copy.deepcopy(norm.drop), act=copy.deepcopy(norm.act)))
    return plain, rest


@torch.no_grad()
def _fold(conv: Any, norm: Any, task: int) -> tuple[nn.Module, nn.Module]:
    """A copy of ``conv`` with the normalisation in it, and what is left of ``norm``."""
    _, rest = _split(norm, task)
    wide = reduce(torch.promote_types, (conv.weight.dtype, norm.running_mean.dtype, torch.float32))
    plain: Any = _split(copy.deepcopy(norm).to(wide), task)[0]  # the gates, too, are computed in that dtype
    groups = conv.groups if isinstance(conv, _TRANSPOSED) else None
    weight, bias = fuse_conv_bn_weights(
        _outputs_first(conv.weight.to(wide), groups),
        None if conv.bias is None else conv.bias.to(wide),
        plain.running_mean,
        plain.running_var,
        plain.eps,
        plain.weight,
        plain.bias,
    )
    folded: Any = copy.deepcopy(conv).eval()
    folded.weight.copy_(_outputs_first(weight, groups))
    folded.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad)
    return folded, rest.eval()


def _outputs_first(weight: Tensor, groups: int | None) -> Tensor:
    """From ``[in, out / groups, *]`` of a transposed convolution to ``[out, in / groups, *]``, and back."""
    return weight if groups is None else weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
