"""Which task-specific layer takes the place of a plain normalisation, and how it starts."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from tsbn_kernels.definition.plain import carry_attributes, carry_hooks, deviation
from tsbn_kernels.layers.batch_norm import FusedTSigmaBN, FusedTSigmaBN1d, FusedTSigmaBN2d, FusedTSigmaBN3d
from tsbn_kernels.layers.layer_norm import FusedTSigmaLN, FusedTSigmaLN2d, FusedTSigmaRMSNorm, TaskRowNorm
from tsbn_kernels.layers.task_specific import TaskSpecific
from tsbn_kernels.models.starts import Starts

_STATE = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
_OF_ROWS = {*vars(nn.LayerNorm(1)), "_fast_norm", "variance_epsilon"}  # attributes that stay behind


class FusedTSigmaBNAct(FusedTSigmaBN):
    """timm's normalisation for T tasks that carries ``drop`` and ``act``: the layer, and then these.

    They stay where they were, so that the names of parameters are those of the plain model. Where ``activation`` is
    set, it is what they compute.
    """

    _plain_class: type[nn.Module]
    drop: nn.Module
    act: nn.Module

    def _call(self, *args: Any) -> Any:
        return tuple(map(self.activate, super()._call(*args)))

    def _mixed(self, *args: Any) -> Tensor:
        return self.activate(super()._mixed(*args))

    def activate(self, y: Tensor) -> Tensor:
        """Computes ``act(drop(y))``, where ``activation`` does not; a Proxy stands for a call of the whole layer."""
        if self.activation is not None or isinstance(y, fx.Proxy):
            return y
        activated: Tensor = self.act(self.drop(y))
        return activated

    def task(self, index: int) -> nn.Module:
        """The plain layer of one task, a copy."""
        plain = super().task(index)
        if isinstance(plain, nn.Sequential):  # with the activation, which act is already
            plain = plain[0]
        # timm's classes add two children to PyTorch's; they cannot be built by their constructors without timm.
        plain.__class__ = self._plain_class
        plain.drop, plain.act = copy.deepcopy(self.drop), copy.deepcopy(self.act)
        return plain.train(self.training)


class FusedTSigmaBNAct2d(FusedTSigmaBNAct, FusedTSigmaBN2d):
    __doc__ = FusedTSigmaBNAct.__doc__


BATCH_NORMS: dict[type[nn.Module], type[FusedTSigmaBN]] = {  # by the plain ones
    layer_class._plain: layer_class
    for layer_class in (FusedTSigmaBN1d, FusedTSigmaBN2d, FusedTSigmaBN3d, FusedTSigmaBN)
}
_ROW_NORMS: dict[type[nn.Module], type[TaskRowNorm]] = {
    layer_class._plain: layer_class for layer_class in (FusedTSigmaLN, FusedTSigmaRMSNorm, FusedTSigmaLN2d)
}
# Those of packages that need not be installed, by the name of their class.
_NAMED: dict[str, dict[str, type[TaskSpecific]]] = {
    "timm.layers.norm_act": {"BatchNormAct2d": FusedTSigmaBNAct2d, "SyncBatchNormAct": FusedTSigmaBNAct},
    "timm.models.layers.norm_act": {"BatchNormAct2d": FusedTSigmaBNAct2d, "SyncBatchNormAct": FusedTSigmaBNAct},
    "timm.layers.norm": {
        "LayerNorm": FusedTSigmaLN,
        "LayerNormFp32": FusedTSigmaLN,
        "LayerNorm2d": FusedTSigmaLN2d,
        "LayerNorm2dFp32": FusedTSigmaLN2d,
        "LayerNormExp2d": FusedTSigmaLN2d,
        "RmsNorm": FusedTSigmaRMSNorm,
        "RmsNormFp32": FusedTSigmaRMSNorm,
    },
    "torchvision.models.convnext": {"LayerNorm2d": FusedTSigmaLN2d},
}
_EXPECTED = (
    "nn.BatchNorm1d, 2d or 3d, nn.SyncBatchNorm, nn.LayerNorm, nn.RMSNorm, or what timm, torchvision and Hugging Face "
    "have of these"
)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a plain batch normalisation, which may not be known."""
    return isinstance(module, _BatchNorm) and not isinstance(module, TaskSpecific)


def is_layer_norm(module: nn.Module) -> bool:
    """Whether a module is a plain layer normalisation, by its class or the name of that; it may not be known."""
    if isinstance(module, (TaskSpecific, _BatchNorm)):
        return False
    name = type(module).__name__.lower()
    called_so = "layernorm" in name or "rmsnorm" in name
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or (
        called_so and isinstance(module._parameters.get("weight"), Tensor) and not module._modules
    )


class Known(NamedTuple):
    """What is known of a plain normalisation.

    Attributes:
        kind: the class of the module, or a base of it that computes the same.
        layer_class: what takes its place.
    """

    kind: type[nn.Module]
    layer_class: type[TaskSpecific]


def known(module: nn.Module, name: str) -> Known:
    """What takes the place of a normalisation, which must be known to compute what its class or base does.

    Raises:
        TypeError: it is not known.
        ValueError: it has what its place cannot have: parametrizations, more parameters, or hooks of gradients.
    """
    found = next((found for base in type(module).__mro__ if (found := _of_class(base, module))), None)
    if found is None:
        raise TypeError(
            f"{name!r} is a {type(module).__name__}, expected {_EXPECTED}; initialise a lazy layer by a forward pass, "
            f"replace another by one of these, or exclude it"
        )
    if is_parametrized(module):
        raise ValueError(
            f"{name!r} is parametrized, which would be lost; call torch.nn.utils.parametrize.remove_parametrizations "
            f"first, or exclude it"
        )
    if why := deviation(module, found.kind):
        raise TypeError(
            f"{name!r} is a {type(module).__name__} that {why}: it is not known to be equal to {found.kind.__name__}. "
            f"Replace it by one, or exclude it"
        )
    expected = {*_STATE, *(("drop", "act") if issubclass(found.layer_class, FusedTSigmaBNAct) else ())}
    if more := [key for key in (*module._parameters, *module._buffers, *module._modules) if key not in expected]:
        raise ValueError(
            f"{name!r} has its own {', '.join(more)}, which would be lost; remove it, with its hooks (of pruning or "
            f"weight normalisation), or exclude the layer"
        )
    if any(tensor._backward_hooks or tensor._post_accumulate_grad_hooks for tensor in module.parameters(recurse=False)):
        raise ValueError(f"{name!r} has parameters with gradient hooks, which would be lost; register them afterwards")
    return found


def _of_class(base: type[Any], module: nn.Module) -> Known | None:
    layer_class = (
        BATCH_NORMS.get(base) or _ROW_NORMS.get(base) or _NAMED.get(base.__module__, {}).get(base.__qualname__)
    )
    if layer_class is None and base.__module__.startswith("transformers.models.") and _is_rms_norm(module):
        layer_class = FusedTSigmaRMSNorm
    return None if layer_class is None else Known(base, layer_class)


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether a module of Hugging Face computes ``nn.RMSNorm``; some of that name have another scale, as Gemma's."""
    eps, weight = getattr(module, "variance_epsilon", None), module._parameters.get("weight")
    if not isinstance(eps, float) or weight is None or weight.dim() != 1 or len(list(module.parameters())) > 1:
        return False
    random = torch.Generator().manual_seed(0)
    x, scale = torch.randn(2, len(weight), generator=random)
    twin = copy.deepcopy(module, {id(weight): nn.Parameter(scale)})
    with torch.no_grad():
        return torch.allclose(twin(x[None]), functional.rms_norm(x[None], (len(x),), scale, eps), rtol=1e-5, atol=1e-6)


def task_specific(
    module: nn.Module,
    name: str,
    layer_class: type[TaskSpecific],
    like: Tensor,
    num_tasks: int,
    stacking: Any,
    starts: Starts,
) -> TaskSpecific:
    """The layer that takes the place of a normalisation.

    Args:
        module: the plain one.
        name: of it.
        layer_class: of the layer.
        like: a tensor of the dtype and on the device of a layer without parameters and statistics of its own.
        num_tasks: T.
        stacking: of the streams.
        starts: where the gates start from.
    """
    plain: Any = module
    state: dict[str, Tensor] = {
        key: tensor.detach()
        for key, tensor in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    }
    like = next((tensor for tensor in state.values() if tensor.is_floating_point()), like)
    has_bias = getattr(module, "bias", None) is not None
    bias: bool | Literal["frozen"] = has_bias
    if starts.sigmoid:
        bias = "frozen" if has_bias and starts.pretrained is not False else False
    options: dict[str, Any] = {
        "gate": "sigmoid" if starts.sigmoid else "identity",
        "stacking": stacking,
        "device": like.device,
        "dtype": like.dtype,
    }
    make: Any = layer_class
    layer: Any
    if issubclass(layer_class, TaskRowNorm):
        if layer_class is not FusedTSigmaRMSNorm:
            options["bias"] = bias
        eps = plain.variance_epsilon if hasattr(plain, "variance_epsilon") else plain.eps
        shape = getattr(plain, "normalized_shape", None) or plain.weight.shape
        layer = make(num_tasks, shape, eps, **options)
    else:
        tracked = plain.running_mean is not None
        options |= {"bias": bias if starts.sigmoid else True, "track_running_stats": tracked}
        layer = make(num_tasks, plain.num_features, plain.eps, plain.momentum, **options)
        layer.track_running_stats = plain.track_running_stats
    if isinstance(module, nn.SyncBatchNorm):
        layer.process_group = module.process_group or "world"
    if starts.pretrained is not False:
        weight = state.get("weight", torch.ones(layer.weight.shape[1:], device=like.device, dtype=like.dtype))
        state["weight"] = starts.weight(module, name, weight)
        layer.load_state_dict(state, assign=True)  # assigned, for statistics may have a dtype of their own
    for key in ("weight", "bias"):
        parameter = getattr(module, key, None)
        if parameter is not None and isinstance(getattr(layer, key), nn.Parameter):
            getattr(layer, key).requires_grad_(parameter.requires_grad)
    if isinstance(layer, FusedTSigmaBNAct):
        layer._plain_class = type(module)
        layer.drop, layer.act = module.get_submodule("drop"), module.get_submodule("act")
    carry_attributes(module, layer, known=_OF_ROWS if isinstance(layer, TaskRowNorm) else vars(nn.SyncBatchNorm(1)))
    carry_hooks(module, layer)
    return layer.train(module.training)  # type: ignore[no-any-return]
