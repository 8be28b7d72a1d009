"""Which parameters are which: gates learn faster and are not decayed, and what is task-specific is not shared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from tsbn_kernels.models.multitask import MultiTaskModel
from tsbn_kernels.operator import checks

_GATES = ("weight", "weight_orig")  # the second is what pruning masks


def parameter_groups(
    model: nn.Module,
    lr: float | Tensor,
    *,
    gate_lr_multiplier: float = 100.0,
    layer_norm_lr_multiplier: float = 10.0,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Groups of all trainable parameters of a model, each parameter once, for any optimiser of ``torch.optim``.

    The gates are the ``weight`` of the modules that have ``gates``: ``FusedTSigmaBN2d`` and its kin, and a user's own;
    also what ``torch.nn.utils.parametrize`` and ``prune`` have made of it. Those that also have a
    ``normalized_shape``, as ``nn.LayerNorm`` has, take the multiplier of layer normalisation. Parameters that do not
    require a gradient are left out. Where steps leave tasks out, :func:`~tsbn_kernels.hold_absent_tasks` keeps momentum
    and decay off their rows.

    Args:
        model: any module.
        lr: learning rate of all but the gates.
        gate_lr_multiplier: of the gates' learning rate (100 for TS-sigma-BN in arXiv 2512.20420).
        layer_norm_lr_multiplier: the same in layer normalisation (10 for TS-sigma-LN).
        weight_decay: of all but the gates, which have none: decay would pull every gate towards one half.

    Returns:
        Dicts with ``name`` (``"base"``, ``"gates"`` or ``"layer_norm_gates"``), ``params``, ``lr`` and
        ``weight_decay``; a group without parameters is left out. DTensors and other tensors do not share a group, for
        optimisers on GPUs take them by lists of one kind.

    Raises:
        TypeError, ValueError: ``model`` is no module; a rate, multiplier or decay is no finite number of 0 or more.
    """
    checks.check_module("model", model)
    if not isinstance(lr, Tensor):  # which optimisers take too
        lr = checks.number("lr", lr, 0.0)
    gate_lr_multiplier = checks.number("gate_lr_multiplier", gate_lr_multiplier, 0.0)
    layer_norm_lr_multiplier = checks.number("layer_norm_lr_multiplier", layer_norm_lr_multiplier, 0.0)
    weight_decay = checks.number("weight_decay", weight_decay, 0.0)
    multipliers = {"base": 1.0, "gates": gate_lr_multiplier, "layer_norm_gates": layer_norm_lr_multiplier}
    kind: dict[nn.Parameter, str] = {parameter: "base" for parameter in model.parameters() if parameter.requires_grad}
    for module in model.modules():
        if not hasattr(module, "gates"):
            continue
        for name, parameter in module.named_parameters():
            if parameter in kind and (name in _GATES or name.startswith("parametrizations.weight.")):
                kind[parameter] = "layer_norm_gates" if hasattr(module, "normalized_shape") else "gates"
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {(name, False): [] for name in multipliers}
    for parameter, name in kind.items():
        groups.setdefault((name, hasattr(parameter, "to_local")), []).append(parameter)
    return [
        {
            "name": name,
            "params": parameters,
            "lr": lr * multipliers[name],
            "weight_decay": weight_decay if name == "base" else 0.0,
        }
        for (name, _), parameters in groups.items()
        if parameters
    ]


def task_vector_names(model: nn.Module) -> list[str]:
    """The names of the ``[T, *]`` parameters of a model, as in ``named_parameters()``: gates and learned biases.

    For rules that go by dimensions. They have two, and are no matrices: what decays all but vectors would decay them,
    and what orthogonalises matrices (Muon) would take them. Of timm, for example,
    ``param_groups_weight_decay(model, 0.05, no_weight_decay_list=task_vector_names(model))``.

    Raises:
        TypeError: ``model`` is no module.
    """
    checks.check_module("model", model)
    vectors = set(_task_vectors(model))
    return [name for name, parameter in model.named_parameters() if parameter in vectors]


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters that the tasks share, and those that are each of one task.

    Methods that weigh the tasks' gradients against each other (PCGrad, Nash-MTL and others) do so for what is shared.
    Specific are the gates and learned biases of task-specific layers, and the heads of a
    :class:`~tsbn_kernels.MultiTaskModel`, apart from what several of them or the backbone use.

    Raises:
        TypeError: ``model`` is no module.
    """
    checks.check_module("model", model)
    specific = set(_task_vectors(model))
    for module in model.modules():
        if isinstance(module, MultiTaskModel):
            users = Counter(parameter for head in module.heads.values() for parameter in set(head.parameters()))
            own = {parameter for parameter, count in users.items() if count == 1}
            specific.update(own - set(module.backbone.parameters()))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [p for p in trainable if p not in specific], [p for p in trainable if p in specific]


def _task_vectors(model: nn.Module) -> Iterator[nn.Parameter]:
    """Finds those of modules with ``gates``, also what parametrizations made of them; others have one dimension."""
    for module in model.modules():
        if hasattr(module, "gates"):
            for name, parameter in module.named_parameters():
                if parameter.dim() > 1 and ("." not in name or name.startswith("parametrizations.")):
                    yield parameter
