"""From a plain model to a task-specific one, and back to the plain model of one task."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

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

    They stay where they were, so that the names of parameters are those of the plain model.
    """

    _act_plain: type[nn.Module]
    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor, residual: Tensor | None = None, **options: Any) -> Tensor:
        """As :meth:`FusedTSigmaBN.forward`, followed by ``drop`` and ``act``."""
        y: Tensor = self.act(self.drop(super().forward(x, residual, **options)))
        return y

    def task(self, index: int) -> nn.Module:
        """The ``BatchNormAct2d`` of one task, a copy."""
        plain = super().task(index)
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
    pretrained: bool = True,
    exclude: str | Iterable[str] = (),
    inplace: bool = False,
) -> nn.Module:
    """Replaces every batch normalisation of a model by a task-specific one for ``num_tasks`` streams.

    ``nn.BatchNorm1d``, ``2d``, ``3d``, ``nn.SyncBatchNorm`` and timm's ``BatchNormAct2d`` become ``FusedTSigmaBN1d``,
    ``2d``, ``3d``, ``FusedTSigmaBN`` (statistics of each process alone) and ``FusedTSigmaBNAct2d``. A module that
    stands in several places is replaced by one layer in all of them. ``eps``, ``momentum``, ``track_running_stats``,
    ``requires_grad`` of the weight, training mode, device and dtypes stay.

    The converted model takes the streams of all tasks stacked into its batch; :class:`~tsbn_kernels.MultiTaskModel`
    does the stacking. Its ``load_state_dict`` also takes checkpoints of the plain model.

    Args:
        model: the shared backbone. Task heads are not to be converted: leave them out, or name them in ``exclude``.
        num_tasks: T.
        variant: ``"ts_sigma_bn"`` (gate ``sigmoid(weight)``) or ``"tsbn"`` (weight and bias learned).
        stacking: of the streams, as in ``FusedTSigmaBN2d``.
        pretrained: start every task from the plain layer: running statistics and ``num_batches_tracked`` are copied;
            for ``"ts_sigma_bn"`` the weight is clipped to [1e-5, 1 - 1e-5] and becomes ``logit(weight)``, and the bias
            is copied and frozen; for ``"tsbn"`` weight and bias are copied. False starts from new layers: gates of
            one half and no bias, or weight 1 and bias 0.
        exclude: names of modules, as in ``named_modules()``, that stay as they are with all that is in them.
        inplace: change ``model`` itself instead of a copy.

    Returns:
        The converted model; a new layer where ``model`` itself is a batch normalisation.

    Raises:
        ValueError: there is nothing to convert, a layer has hooks, or an option or a name in ``exclude`` is unknown.
        TypeError: a batch normalisation of an unknown class.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    if not inplace:
        model = copy.deepcopy(model)
    excluded = _modules_under(model, (exclude,) if isinstance(exclude, str) else exclude)
    layers: dict[nn.Module, nn.Module] = {
        module: _task_specific(module, name, model, num_tasks, variant, stacking, pretrained)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module not in excluded
    }
    if not layers:
        raise ValueError(f"{type(model).__name__} has no batch normalisation to convert, apart from what is excluded")
    return _replace(model, layers)


def revert_model(model: nn.Module, task: int) -> nn.Module:
    """The plain model of one task: a copy in which every task-specific layer is the plain layer of that task.

    Its weights are the gates, its bias is the learned or frozen one, its running statistics are the task's.

    Raises:
        ValueError: the model has no task-specific layer.
        IndexError: there is no such task.
    """
    model = copy.deepcopy(model)
    layers: dict[nn.Module, nn.Module] = {
        module: module.task(task) for module in model.modules() if isinstance(module, FusedTSigmaBN)
    }
    if not layers:
        raise ValueError(f"{type(model).__name__} has no task-specific layer to revert")
    return _replace(model, layers)


def _modules_under(model: nn.Module, names: Iterable[str]) -> set[nn.Module]:
    named = dict(model.named_modules(remove_duplicate=False))
    if unknown := [name for name in names if name not in named]:
        raise ValueError(f"exclude names {', '.join(map(repr, unknown))}, not a module of {type(model).__name__}")
    return {module for name in names for module in named[name].modules()}


def _task_specific(
    module: _BatchNorm, name: str, model: nn.Module, num_tasks: int, variant: str, stacking: Any, pretrained: bool
) -> FusedTSigmaBN:
    layer_class = _layer_class(module, name)
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise ValueError(
            f"{name!r} has hooks, which would be lost; remove them, convert, and register them on the new layer"
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
