"""From a plain model to a task-specific one, and back to the plain model of one task."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from itertools import chain
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tsbn_kernels.definition.activations import of_module
from tsbn_kernels.definition.plain import carry_attributes, carry_hooks, copy_of, deviation, held, is_plain
from tsbn_kernels.layers.batch_norm import FusedTSigmaBN
from tsbn_kernels.layers.task_specific import TaskSpecific
from tsbn_kernels.models import norms, parting
from tsbn_kernels.models.fast_paths import close_fast_paths, open_fast_paths
from tsbn_kernels.models.fuse_activations import find_chains, fuse, unfuse
from tsbn_kernels.models.norms import FusedTSigmaBNAct, FusedTSigmaBNAct2d  # noqa: F401  # where they were
from tsbn_kernels.models.starts import Starts
from tsbn_kernels.models.sync_conversion import convert_sync_batchnorm  # noqa: F401  # where it was
from tsbn_kernels.operator import checks

VARIANTS = ("ts_sigma_bn", "tsbn")
_OWN = "_plain_class", "_tasks", "_participation", "_routers"  # attributes that only some layers have


def convert_model(
    model: nn.Module,
    num_tasks: int,
    *,
    variant: Literal["ts_sigma_bn", "tsbn"] = "ts_sigma_bn",
    layer_norm: bool | None = None,
    layer_norm_gate: Literal["identity", "sigmoid"] = "identity",
    stacking: Literal["task_major", "sample_major"] = "task_major",
    fuse_activation: bool = True,
    pretrained: bool | None = None,
    exclude: str | Iterable[str] = (),
    inplace: bool = False,
) -> nn.Module:
    """Replaces the normalisation of a model by a task-specific one for ``num_tasks`` streams.

    ``nn.BatchNorm1d``, ``2d``, ``3d``, ``nn.SyncBatchNorm`` and timm's ``BatchNormAct2d`` and ``SyncBatchNormAct``
    become ``FusedTSigmaBN1d``, ``2d``, ``3d``, ``FusedTSigmaBN`` (with the ``process_group``), ``FusedTSigmaBNAct2d``
    and ``FusedTSigmaBNAct``. ``nn.LayerNorm`` becomes ``FusedTSigmaLN``, ``nn.RMSNorm`` ``FusedTSigmaRMSNorm``, and
    the channels-first ``LayerNorm2d`` of torchvision and timm ``FusedTSigmaLN2d``; timm's ``LayerNorm`` and ``RmsNorm``
    are among these, as are RMS norms of Hugging Face where they compute the same. So do subclasses that add to these
    without changing what they compute. A module that stands in several places is replaced by one layer in all of them,
    in plain lists too. ``eps``, ``momentum``, ``track_running_stats``, ``requires_grad`` of the weight, training mode,
    device and dtypes stay, as do attributes that a user has given to the module or its parameters, and its hooks, which
    get the layer and all its streams.

    The converted model takes the streams of all tasks stacked into its batch; :class:`~tsbn_kernels.MultiTaskModel`
    does the stacking. Its ``load_state_dict`` also takes checkpoints of the plain model.

    **Activations.** Where the module of an activation that a layer can apply, such as ``nn.ReLU``, follows a layer
    and nothing else sees the layer's output, no hook either, the layer applies it in its own pass. ``torch.fx`` finds
    these chains, in training and in evaluation mode, with the default arguments of the model's ``forward``; what the
    model computes there must not change its way later. The activation's module gives its place, under its name, to an
    ``nn.Identity``. One that is called elsewhere too, as torchvision's residual blocks call one ``self.relu`` behind
    their norms and their addition, stays, as does a function such as ``torch.relu``: there the block gets a subclass of
    its class, of the same name, whose ``forward`` is the same code without that call. :func:`revert_model` puts all of
    it back. timm's ``BatchNormAct2d`` applies its own ``act``, where it has no ``drop``. An addition between layer and
    activation stays what it is. Hooks that are registered on a layer later see its output activated.

    Args:
        model: the shared backbone. Task heads are not to be converted: leave them out, or name them in ``exclude``.
        num_tasks: T.
        variant: of batch normalisation: ``"ts_sigma_bn"`` (gate ``sigmoid(weight)``) or ``"tsbn"`` (weight and bias
            learned).
        layer_norm: convert layer normalisation too, False leaves it alone. None does so where the model has no batch
            normalisation, and leaves it shared, with a warning, beside that.
        layer_norm_gate: ``"identity"`` (weight and bias learned), for pretrained scales often leave (0, 1), or
            ``"sigmoid"``, which clips them. The start is that of ``"tsbn"`` and ``"ts_sigma_bn"``.
        stacking: of the streams, as in ``FusedTSigmaBN2d``.
        fuse_activation: let the layers apply the activations that follow them.
        pretrained: True starts every task from the plain layer: running statistics and ``num_batches_tracked`` are
            copied; for ``"ts_sigma_bn"`` the weight is clipped to [1e-5, 1 - 1e-5] and becomes ``logit(weight)``, and
            the bias is copied and frozen; for ``"tsbn"`` weight and bias are copied. None does the same, but for
            ``"ts_sigma_bn"`` and layers that are new (no batch seen, bias 0 and all weights 1, or 0): their weights
            would become gates that cannot learn, and start at gates of one half instead. False starts from new layers
            everywhere: gates of one half and no bias, or weight 1 and bias 0.
        exclude: names of modules, as in ``named_modules()``, that stay as they are with all that is in them.
        inplace: change ``model`` itself instead of a copy.

    Returns:
        The converted model; a new layer where ``model`` itself is a batch normalisation.

    Warns:
        UserWarning: once for each of these, with the number of layers and the first three names: scales that were
            clipped, gates that hardly learn, other normalisation that stays shared, layers that are left without
            their activation, a normalisation that the model calls from a closure and that stays plain.

    Raises:
        ValueError: there is nothing to convert, a layer is parametrized or has state of its own or gradient hooks, or
            an option or a name in ``exclude`` is unknown.
        TypeError: a normalisation that is not known to compute what these classes do, as with a ``forward`` of
            its own; or an argument of another type.
    """
    checks.check_module("model", model)
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    checks.check_options(layer_norm_gate, stacking, None)
    for key, flag in (("pretrained", pretrained), ("layer_norm", layer_norm)):
        if flag is not None:
            checks.check_flag(key, flag)
    names = _names(exclude)
    excluded = _modules_under(model, names)
    candidates = [(name, module) for name, module in model.named_modules() if module not in excluded]
    found = [(name, module) for name, module in candidates if norms.is_batch_norm(module)]
    rows = [(name, module) for name, module in candidates if norms.is_layer_norm(module)]
    if layer_norm or (layer_norm is None and not found):
        found, rows = found + rows, []
    known = {name: norms.known(module, name) for name, module in found}
    shared = [
        f"{name!r} ({type(module).__name__})"
        for name, module in candidates
        if not isinstance(module, TaskSpecific)
        and not norms.is_batch_norm(module)
        and any(isinstance(getattr(module, statistic, None), Tensor) for statistic in ("running_mean", "running_var"))
    ]
    if not known:
        there = f"; it has {checks.some(shared)}, which an nn.BatchNorm2d would have to replace" if shared else ""
        there += f"; it has {checks.some(repr(name) for name, _ in rows)}, and layer_norm=False" if rows else ""
        raise ValueError(f"{type(model).__name__} has no normalisation to convert, apart from what is excluded{there}")
    names_of: dict[Any, str] = {model.get_submodule(name): name for name in known}
    if not inplace:
        model = copy_of(model)
        names_of |= {model.get_submodule(name): name for name in known}
    tensors = chain(model.parameters(), model.buffers())
    like = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))
    batch_starts = Starts(variant == "ts_sigma_bn", pretrained, "variant='tsbn'")
    row_starts = Starts(layer_norm_gate == "sigmoid", pretrained, "layer_norm_gate='identity'")
    layers: dict[nn.Module, Any] = {}
    for name, (_, layer_class) in known.items():
        norm = model.get_submodule(name)
        starts = batch_starts if norms.is_batch_norm(norm) else row_starts
        layers[norm] = norms.task_specific(norm, name, layer_class, like, num_tasks, stacking, starts)
    complaints = batch_starts.complaints() + row_starts.complaints()
    if rows and layer_norm is None:
        complaints.append(
            f"{checks.some(repr(name) for name, _ in rows)} stay shared by all tasks: layer_norm=True converts layer "
            f"normalisation too, and layer_norm=False says that this is meant"
        )
    if shared:
        complaints.append(
            f"{checks.some(shared)} stay shared by all tasks: they are none of PyTorch's or timm's BatchNorms"
        )
    kept = _modules_under(model, names)
    batch_norms = {norm: layer for norm, layer in layers.items() if isinstance(layer, FusedTSigmaBN)}
    activations, unknown = _fuse(model, batch_norms, kept, complaints) if fuse_activation else ({}, [])
    model = _replace(model, {**layers, **activations})
    unknown += held(model, lambda value: isinstance(value, nn.Module) and value in names_of)
    if unknown:
        places = dict.fromkeys(repr(names_of.get(module, module)) for module in unknown)
        complaints.append(
            f"{checks.some(places)} is called by the model as an object of its own, from a closure, a set, an "
            f"object or the like, and stays plain and shared by all tasks; call it as a module of the model"
        )
    close_fast_paths(model)
    for complaint in complaints:
        warnings.warn(complaint, stacklevel=2)
    return model


def revert_model(model: nn.Module, task: int) -> nn.Module:
    """The plain model of one task: a copy in which every task-specific layer is the plain layer of that task.

    Its weights are the gates, its bias is the learned or frozen one, its running statistics are the task's. Activations
    that :func:`convert_model` has fused are where they were before. Attributes and hooks of users go along.

    Raises:
        ValueError: the model has no task-specific layer, or one with an activation of the model and with hooks, which
            see its output activated.
        IndexError: there is no such task.
        TypeError: ``model`` is no module, or ``task`` no integer.
    """
    checks.check_module("model", model)
    model = copy_of(model)
    parting.remove(model)
    activations = unfuse(model)  # before the layers are asked
    layers: dict[nn.Module, nn.Module] = {
        module: plain_layer(module, name, task)
        for name, module in model.named_modules()
        if isinstance(module, TaskSpecific)
    }
    if not layers:
        raise ValueError(f"{type(model).__name__} has no task-specific layer to revert")
    model = _replace(model, {**layers, **activations})
    open_fast_paths(model)
    return model


def plain_layer(layer: TaskSpecific, name: str, task: int) -> nn.Module:
    """What :meth:`TaskSpecific.task` gives, with the attributes and hooks that a user has put on the layer.

    Raises:
        TypeError: the layer computes something else than the class whose ``task()`` it has.
    """
    kinds = type(layer).__mro__
    kind = next(base for base in kinds if "task" in vars(base))
    if why := deviation(layer, kind, ("forward", "_call", "__call__", "_call_impl")):
        raise TypeError(f"{name!r} {why}, which its plain layer would not have; give it its own task(), or remove that")
    plain = layer.task(task)
    inside = plain[0] if isinstance(plain, nn.Sequential) else plain  # without the activation
    first: Any = kinds[kinds.index(TaskSpecific) - 1]  # the class that users' classes and ours extend
    carry_attributes(layer, inside, known={*vars(first(1, 1)), "weight", "bias", *_OWN})
    carry_hooks(layer, plain)
    return plain


def _fuse(
    model: nn.Module, layers: Mapping[nn.Module, FusedTSigmaBN], excluded: set[nn.Module], complaints: list[str]
) -> tuple[dict[nn.Module, nn.Module], list[nn.Module]]:
    """Gives the layers the activations that follow them, and adds to the complaints what the user is to be told.

    Returns:
        What takes the place of these activations, and the normalisation that the model calls and that is none of its
        modules.
    """
    norms: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        layer = layers.get(module)
        if isinstance(layer, FusedTSigmaBNAct):
            if is_plain(layer.drop, (nn.Identity,)) and (found := of_module(layer.act)) is not None:
                layer.activation, layer.negative_slope = found
        elif layer is not None and module is not model:
            norms[module] = name
    if not norms:
        return {}, []
    try:
        chains = find_chains(model, norms, excluded)
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        complaints.append(
            f"activations stay unfused behind {checks.some(map(repr, norms.values()))}: torch.fx cannot trace "
            f"{type(model).__name__}: {type(error).__name__}: {error}"
        )
        return {}, []
    if chains.unfused:
        complaints.append(
            f"activations stay unfused behind {checks.some(map(repr, chains.unfused))}: what calls "
            f"them calls them elsewhere too, or its code cannot be read; a module of its own for each place, such as "
            f"nn.ReLU, would be fused"
        )
    return fuse(chains, layers), chains.unknown


def _names(exclude: Any) -> list[str]:
    if isinstance(exclude, str):
        return [exclude]
    names = list(exclude) if isinstance(exclude, Iterable) else [exclude]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"exclude must be the name of a module, or several, got {exclude!r}")
    return names


def _modules_under(model: nn.Module, names: Iterable[str]) -> set[nn.Module]:
    named = dict(model.named_modules(remove_duplicate=False))
    if unknown := [name for name in names if name not in named]:
        raise ValueError(f"exclude names {', '.join(map(repr, unknown))}, not a module of {type(model).__name__}")
    return {module for name in names for module in named[name].modules()}


def _replace(model: nn.Module, layers: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Puts each layer wherever the module that it replaces stands, in plain lists and the like too."""
    seen: set[int] = set()
    for path, module in list(model.named_modules(remove_duplicate=False)):
        for name, value in list(vars(module).items()):
            if name not in ("_modules", "_parameters", "_buffers"):
                vars(module)[name] = _swapped(value, layers, seen)
        if module in layers:
            if not path:
                return layers[module]
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layers[module])
    return model


def _swapped(value: Any, layers: Mapping[nn.Module, nn.Module], seen: set[int]) -> Any:
    """A value with the layers in the place of the modules in it; lists and dictionaries are changed in place."""
    if isinstance(value, nn.Module):
        return layers.get(value, value)
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module) and value.__self__ in layers:
        return getattr(layers[value.__self__], value.__name__)
    if isinstance(value, (list, dict)) and id(value) not in seen:
        seen.add(id(value))
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            if (swapped := _swapped(item, layers, seen)) is not item:
                value[key] = swapped
    elif type(value) is tuple or hasattr(value, "_fields"):
        items = [_swapped(item, layers, seen) for item in value]
        if any(item is not before for item, before in zip(items, value, strict=True)):
            return tuple(items) if type(value) is tuple else type(value)(*items)
    return value
