"""From a plain model to a task-specific one, and back to the plain model of one task."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from tsbn_kernels import checks
from tsbn_kernels.activations import of_module
from tsbn_kernels.chains import FusedActivation, SharedActivation, find_chains, has_hooks, plain_activations
from tsbn_kernels.modules import FusedTSigmaBN, FusedTSigmaBN1d, FusedTSigmaBN2d, FusedTSigmaBN3d

VARIANTS = ("ts_sigma_bn", "tsbn")

_LAYERS: dict[type[nn.Module], type[FusedTSigmaBN]] = {
    nn.BatchNorm1d: FusedTSigmaBN1d,
    nn.BatchNorm2d: FusedTSigmaBN2d,
    nn.BatchNorm3d: FusedTSigmaBN3d,
    nn.SyncBatchNorm: FusedTSigmaBN,
}


class FusedTSigmaBNAct2d(FusedTSigmaBN2d):
    """timm's ``BatchNormAct2d`` for T tasks: the normalisation, then the ``drop`` and ``act`` of the plain layer.

    They stay where they were, so that the names of parameters are those of the plain model. Where ``activation`` is
    set, it is what they compute.
    """

    _act_plain: type[nn.Module]
    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor, residual: Tensor | None = None, **options: Any) -> Tensor:
        """Computes :meth:`FusedTSigmaBN.forward`, followed by ``drop`` and ``act``."""
        y: Tensor = super().forward(input, residual, **options)
        return y if self.activation is not None else self.act(self.drop(y))

    def streams(self, input: Tensor, residual: Tensor | None = None, **options: Any) -> tuple[Tensor, ...]:
        """Computes :meth:`FusedTSigmaBN.streams`, followed by ``drop`` and ``act``."""
        streams = super().streams(input, residual, **options)
        return streams if self.activation is not None else tuple(self.act(self.drop(y)) for y in streams)

    def task(self, index: int) -> nn.Module:
        """The ``BatchNormAct2d`` of one task, a copy."""
        plain = super().task(index)
        if isinstance(plain, nn.Sequential):  # with the activation, which act is already
            plain = plain[0]
        # timm's class adds two children to nn.BatchNorm2d; it cannot be built by its constructor without timm.
        plain.__class__ = self._act_plain
        plain.drop, plain.act = copy.deepcopy(self.drop), copy.deepcopy(self.act)
        return plain.train(self.training)


def convert_model(
    model: nn.Module,
    num_tasks: int,
    *,
    variant: Literal["ts_sigma_bn", "tsbn"] = "ts_sigma_bn",
    stacking: Literal["task_major", "sample_major"] = "task_major",
    fuse_activation: bool = True,
    pretrained: bool = True,
    exclude: str | Iterable[str] = (),
    inplace: bool = False,
) -> nn.Module:
    """Replaces every batch normalisation of a model by a task-specific one for ``num_tasks`` streams.

    ``nn.BatchNorm1d``, ``2d``, ``3d``, ``nn.SyncBatchNorm`` and timm's ``BatchNormAct2d`` become ``FusedTSigmaBN1d``,
    ``2d``, ``3d``, ``FusedTSigmaBN`` (with the ``process_group``) and ``FusedTSigmaBNAct2d``. A module that
    stands in several places is replaced by one layer in all of them. ``eps``, ``momentum``, ``track_running_stats``,
    ``requires_grad`` of the weight, training mode, device and dtypes stay.

    The converted model takes the streams of all tasks stacked into its batch; :class:`~tsbn_kernels.MultiTaskModel`
    does the stacking. Its ``load_state_dict`` also takes checkpoints of the plain model.

    **Activations.** Where the module of an activation that a layer can apply, such as ``nn.ReLU``, follows a layer
    and nothing else sees the layer's output, no hook either, the layer applies it in its own pass. ``torch.fx`` finds
    these chains, in training and in evaluation mode, with the default arguments of the model's ``forward``; what the
    model computes there must not change its way later. The activation's module gives its place, under its name, to an
    ``nn.Identity``; one that is called elsewhere too, as torchvision's residual blocks call one ``self.relu`` behind
    their norms and their addition, to a module that lets pass what a layer has activated and acts on all else. Classes
    and code of the model stay; :func:`revert_model` puts the activations back. timm's ``BatchNormAct2d`` applies its
    own ``act`` in the same way, where it has no ``drop``. An addition between layer and activation stays what it is, as
    does an activation that is a function, such as ``torch.relu``.

    Args:
        model: the shared backbone. Task heads are not to be converted: leave them out, or name them in ``exclude``.
        num_tasks: T.
        variant: ``"ts_sigma_bn"`` (gate ``sigmoid(weight)``) or ``"tsbn"`` (weight and bias learned).
        stacking: of the streams, as in ``FusedTSigmaBN2d``.
        fuse_activation: let the layers apply the activations that follow them.
        pretrained: start every task from the plain layer: running statistics and ``num_batches_tracked`` are copied;
            for ``"ts_sigma_bn"`` the weight is clipped to [1e-5, 1 - 1e-5] and becomes ``logit(weight)``, and the bias
            is copied and frozen; for ``"tsbn"`` weight and bias are copied. False starts from new layers: gates of
            one half and no bias, or weight 1 and bias 0.
        exclude: names of modules, as in ``named_modules()``, that stay as they are with all that is in them.
        inplace: change ``model`` itself instead of a copy.

    Returns:
        The converted model; a new layer where ``model`` itself is a batch normalisation.

    Warns:
        UserWarning: once, with the names of the layers that are left without their activation because ``torch.fx``
            cannot trace the model, or because it is a function.

    Raises:
        ValueError: there is nothing to convert, a layer has hooks or is parametrized, or an option or a name in
            ``exclude`` is unknown.
        TypeError: a batch normalisation of an unknown class, or an argument of another type.
    """
    checks.check_module("model", model)
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    if not inplace:
        groups = [module.process_group for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
        model = copy.deepcopy(model, {id(group): group for group in groups})  # which cannot be copied
    excluded = _modules_under(model, _names(exclude))
    layers: dict[nn.Module, FusedTSigmaBN] = {
        module: _task_specific(module, name, model, num_tasks, variant, stacking, pretrained)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and not isinstance(module, FusedTSigmaBN) and module not in excluded
    }
    if not layers:
        raise ValueError(f"{type(model).__name__} has no batch normalisation to convert, apart from what is excluded")
    activations = _fuse(model, layers, excluded) if fuse_activation else {}
    return _replace(model, {**layers, **activations})


def revert_model(model: nn.Module, task: int) -> nn.Module:
    """The plain model of one task: a copy in which every task-specific layer is the plain layer of that task.

    Its weights are the gates, its bias is the learned or frozen one, its running statistics are the task's. Activations
    that :func:`convert_model` has fused are modules of their own again.

    Raises:
        ValueError: the model has no task-specific layer.
        IndexError: there is no such task.
        TypeError: ``model`` is no module, or ``task`` no integer.
    """
    checks.check_module("model", model)
    model = copy.deepcopy(model)
    activations = plain_activations(model)  # before the layers are asked
    layers: dict[nn.Module, nn.Module] = {
        module: module.task(task) for module in model.modules() if isinstance(module, FusedTSigmaBN)
    }
    if not layers:
        raise ValueError(f"{type(model).__name__} has no task-specific layer to revert")
    return _replace(model, {**layers, **activations})


def convert_sync_batchnorm(model: nn.Module, process_group: Any = None) -> nn.Module:
    """Lets every task-specific layer of a model synchronise its statistics over the ranks of a process group.

    The counterpart of ``nn.SyncBatchNorm.convert_sync_batchnorm``, which is for the plain layers of a model.

    Args:
        model: is changed in place.
        process_group: a ``torch.distributed.ProcessGroup``; None stands for all ranks.

    Returns:
        ``model``.

    Raises:
        ValueError: the model has no task-specific layer, or one of them has ``recover_input=True``.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, FusedTSigmaBN)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no task-specific layer to synchronise")
    for name, layer in layers:
        if layer.recover_input:
            raise ValueError(f"{name!r} has recover_input=True, which does not work with a process_group; set it False")
    for _, layer in layers:
        layer.process_group = process_group or "world"
    return model


def _fuse(
    model: nn.Module, layers: dict[nn.Module, FusedTSigmaBN], excluded: set[nn.Module]
) -> dict[nn.Module, nn.Module]:
    """Gives the layers the activations that follow them; returns what takes the place of these."""
    norms: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        layer = layers.get(module)
        if isinstance(layer, FusedTSigmaBNAct2d):
            if type(layer.drop) is nn.Identity and not has_hooks(layer.drop) and not has_hooks(layer.act):
                _activate(layer, layer.act)
        elif layer is not None and module is not model:
            norms[module] = name
    if not norms:
        return {}
    try:
        chains = find_chains(model, norms, excluded)
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        _warn_unfused(norms.values(), f"torch.fx cannot trace {type(model).__name__}: {type(error).__name__}: {error}")
        return {}
    if chains.functions:
        _warn_unfused(chains.functions, "there they are functions; modules, such as nn.ReLU, would be fused")
    fused: dict[nn.Module, list[FusedTSigmaBN]] = {}
    for norm, activation in chains.activations.items():
        _activate(layers[norm], activation)
        fused.setdefault(activation, []).append(layers[norm])
    return {
        activation: (SharedActivation if activation in chains.shared else FusedActivation)(activation, group)
        for activation, group in fused.items()
    }


def _activate(layer: FusedTSigmaBN, activation: nn.Module) -> None:
    if (found := of_module(activation)) is not None:
        layer.activation, layer.negative_slope = found


def _warn_unfused(names: Iterable[str], reason: str) -> None:
    warnings.warn(f"activations stay unfused behind {', '.join(map(repr, names))}: {reason}", stacklevel=4)


def _names(exclude: Any) -> list[str]:
    names: list[Any] = (
        [exclude] if isinstance(exclude, str) else list(exclude) if isinstance(exclude, Iterable) else [None]
    )
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"exclude must be the name of a module, or several, got {exclude!r}")
    return names


def _modules_under(model: nn.Module, names: Iterable[str]) -> set[nn.Module]:
    named = dict(model.named_modules(remove_duplicate=False))
    if unknown := [name for name in names if name not in named]:
        raise ValueError(f"exclude names {', '.join(map(repr, unknown))}, not a module of {type(model).__name__}")
    return {module for name in names for module in named[name].modules()}


def _task_specific(
    module: _BatchNorm, name: str, model: nn.Module, num_tasks: int, variant: str, stacking: Any, pretrained: bool
) -> FusedTSigmaBN:
    layer_class = _layer_class(module, name)
    if has_hooks(module):
        raise ValueError(
            f"{name!r} has hooks, which would be lost; remove them, convert, and register them on the new layer"
        )
    if is_parametrized(module):
        raise ValueError(
            f"{name!r} is parametrized, which would be lost; call torch.nn.utils.parametrize.remove_parametrizations "
            f"first, or exclude it"
        )
    state: dict[str, Tensor] = {
        key: tensor.detach()
        for key, tensor in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    }
    # A layer without parameters and statistics lives where the rest of the model does.
    like = next((t for t in chain(state.values(), model.parameters()) if t.is_floating_point()), torch.empty(0))
    state.setdefault("weight", torch.ones(module.num_features, device=like.device, dtype=like.dtype))
    sigmoid = variant == "ts_sigma_bn"
    frozen_bias: Any = "frozen" if pretrained and module.bias is not None else False
    layer = layer_class(
        num_tasks,
        module.num_features,
        module.eps,
        module.momentum,
        gate="sigmoid" if sigmoid else "identity",
        bias=frozen_bias if sigmoid else True,
        stacking=stacking,
        track_running_stats=module.running_mean is not None,
        device=like.device,
        dtype=like.dtype,
    )
    layer.track_running_stats = module.track_running_stats
    if isinstance(module, nn.SyncBatchNorm):
        layer.process_group = module.process_group or "world"
    if pretrained:
        layer.load_state_dict(state, assign=True)  # assigned, for statistics may have a dtype of their own
    for plain, parameter in ((module.weight, layer.weight), (module.bias, layer.bias)):
        if plain is not None and isinstance(parameter, nn.Parameter):
            parameter.requires_grad_(plain.requires_grad)
    if isinstance(layer, FusedTSigmaBNAct2d):
        layer._act_plain = type(module)
        layer.add_module("drop", module.get_submodule("drop"))
        layer.add_module("act", module.get_submodule("act"))
    return layer.train(module.training)


def _layer_class(module: _BatchNorm, name: str) -> type[FusedTSigmaBN]:
    for plain, layer_class in _LAYERS.items():
        if isinstance(module, plain):
            if type(module).forward is plain.forward:
                return layer_class
            if plain is nn.BatchNorm2d and hasattr(module, "drop") and hasattr(module, "act"):
                return FusedTSigmaBNAct2d
    raise TypeError(
        f"{name!r} is a {type(module).__name__}, expected nn.BatchNorm1d, 2d or 3d, nn.SyncBatchNorm or timm's "
        f"BatchNormAct2d; initialise a lazy layer by a forward pass, replace another by one of these, or exclude it"
    )


def _replace(model: nn.Module, layers: dict[nn.Module, nn.Module]) -> nn.Module:
    """Puts each layer wherever the module that it replaces stands."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module in layers:
            if not path:
                return layers[module]
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layers[module])
    return model
