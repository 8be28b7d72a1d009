"""Smaller networks: filters that no task uses are taken out, with all that only they need."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tsbn_kernels.definition.plain import copy_of
from tsbn_kernels.models import parting
from tsbn_kernels.models.features import tensors
from tsbn_kernels.models.filters import Filters, Group, close
from tsbn_kernels.models.multitask import MultiTaskModel
from tsbn_kernels.operator import checks

_ROUNDING = 1e-4  # of the outputs, by what they are compared
_NOTHING = 1e-30  # a kernel's sigmoid may stop at the least number of its dtype
_CONSTANT = 1e-6  # what a constant may differ by from position to position

Parts = list[tuple[Group, Tensor]]  # filters of groups, as indices


@dataclass(frozen=True)
class Pruning:
    """Which filters of a network are to go.

    The importance of a filter is the largest gate that any task has for it, in any layer: where layers are joined by a
    residual sum, a concatenation or a depthwise convolution, all of them must have closed it. A normalisation that is
    plain counts by the absolute value of its scale.

    Attributes:
        example: an input of the network, a tensor or the tuple of its arguments; only its shape matters.
        amount: the share of all filters that goes, the least important ones, from 0 up to 1.
        threshold: in place of an amount: the importance below which a filter goes.
        min_filters: how many each convolution or linear layer keeps at least.
        scope: of an amount: ``"global"`` ranks the filters of all layers together, ``"layer"`` those of each alone.
    """

    example: Any
    amount: float | None = None
    threshold: float | None = None
    min_filters: int = 3
    scope: Literal["global", "layer"] = "global"

    def __post_init__(self) -> None:
        if (self.amount is None) == (self.threshold is None):
            raise ValueError(
                f"give amount or threshold, one of them, got amount={self.amount!r} and threshold={self.threshold!r}"
            )
        if self.amount is not None and not checks.number("amount", self.amount, 0.0) < 1:
            raise ValueError(f"amount must be a share of the filters, at least 0 and below 1, got {self.amount!r}")
        if self.threshold is not None:
            checks.number("threshold", self.threshold, 0.0)
        checks.count("min_filters", self.min_filters)
        if self.scope not in ("global", "layer"):
            raise ValueError(f"scope must be 'global' or 'layer', got {self.scope!r}")
        if not isinstance(self.example, (Tensor, tuple)):
            raise TypeError(
                f"example must be an input of the network, a tensor or the tuple of its arguments, got "
                f"{type(self.example).__name__}"
            )

    def choose(self, groups: list[Group]) -> list[Tensor]:
        """The filters of each group that go, as indices."""
        ranks = [group.importance() for group in groups]
        free = []  # all but the most important ones, which stay
        for rank in ranks:
            order = rank.argsort(stable=True)
            free.append(order[: max(0, len(order) - self.min_filters)])
        if self.threshold is not None:
            return [order[rank[order] < self.threshold] for order, rank in zip(free, ranks, strict=True)]
        assert self.amount is not None
        if self.scope == "layer":
            return [order[: int(self.amount * len(rank))] for order, rank in zip(free, ranks, strict=True)]
        ranked = torch.cat([rank[order] for order, rank in zip(free, ranks, strict=True)])
        gone = torch.zeros(len(ranked), dtype=torch.bool)
        gone[ranked.argsort(stable=True)[: int(self.amount * sum(map(len, ranks)))]] = True
        return [order[part] for order, part in zip(free, gone.split(list(map(len, free))), strict=True)]


@torch.inference_mode(False)  # for torch-pruning follows gradients
def prune(
    model: nn.Module,
    example: Any,
    *,
    amount: float | None = None,
    threshold: float | None = None,
    min_filters: int = 3,
    scope: Literal["global", "layer"] = "global",
) -> nn.Module:
    """A smaller copy of a network with gates, in one shot: without the filters that no task uses.

    They go from the convolution or linear layer, from all normalisation behind it, and from all layers that read them,
    along residual sums, concatenations and depthwise convolutions. The outputs are those of the network in which these
    filters have a gate and a bias of 0 for all tasks. This is checked: where it is not so, for the network does with
    them what torch-pruning does not understand, a layer keeps its filters. A filter that would leave a constant behind,
    as a sigmoid does, stays. The copy trains on, with an optimiser of its own, and can be pruned again.

    It needs torch-pruning (``pip install 'tsbn-kernels[prune]'``), which finds what belongs together.

    Args:
        model: a converted model, a :class:`~tsbn_kernels.MultiTaskModel`, or any network with these layers.
        example: an input of the model, a tensor or the tuple of its arguments; only its shape matters.
        amount, threshold, min_filters, scope: as in :class:`Pruning`; an amount or a threshold is needed.

    Warns:
        UserWarning: layers with gates that keep all filters, by name, and why.

    Raises:
        ImportError: torch-pruning is not installed.
        ValueError: no filter can be taken out, with the layers by name, and why; or the options are wrong.
        RuntimeError: filters of several layers can go alone, and not together.
    """
    checks.check_module("model", model)
    pruning = Pruning(example, amount, threshold, min_filters, scope)
    pruned = copy_of(model)
    parting.remove(pruned)
    complaints = shrink(pruned, pruning)
    if complaints:
        warnings.warn(complaints, stacklevel=3)  # behind the decorator
    return pruned


def shrink(model: nn.Module, pruning: Pruning, *, fold: bool = False) -> str:
    """Takes filters out of a model, in place.

    Args:
        model: is left in the mode that it is in, and its parameters frozen if they are.
        pruning: which.
        fold: close a filter by its gate alone, and fold the constant that it leaves behind into the layers that read
            it; without it the bias is closed too, and what would leave a constant stays.

    Returns:
        Which layers stay whole, and why; empty if none.

    Raises:
        ValueError, RuntimeError: as :func:`prune` does.
    """
    example = _noise(pruning.example)
    with _kept_modes(model):
        filters = Filters(model, lambda twin: _run(twin, example))
        undo = filters.undo()
        while True:
            if not filters.groups:
                why = _named(filters.kept) or "no normalisation"
                raise ValueError(f"{type(model).__name__} has no filters that can be pruned; {why}")
            chosen = pruning.choose(filters.groups)
            parts = _removable(model, list(zip(filters.groups, chosen, strict=True)), example, fold=fold)
            difference = _remove(model, filters, parts, example, fold=fold)
            if not difference:
                break
            undo()
            alone = {}  # what is wrong where a group goes alone
            for index, part in enumerate(parts):
                if why := _remove(model, filters, [part], example, fold=fold):
                    alone[index] = why
                undo()
            if not alone:
                raise RuntimeError(f"filters of {type(model).__name__} cannot go together: {difference}")
            for index, why in alone.items():
                filters.keep(parts[index][0], why)
        for (group, gone), wanted in zip(parts, chosen, strict=True):
            if len(wanted) and not len(gone):
                filters.keep(group, "closed, they still give something to the layers that read them")
    return f"some layers keep all of their filters: {_named(filters.kept)}" if filters.kept else ""


def _named(kept: dict[str, str]) -> str:
    return checks.some(f"{name!r}: {why}" for name, why in kept.items())


def _noise(example: Any) -> tuple[Any, ...]:
    """The arguments of a call, of random numbers where they are floating-point."""
    arguments = example if isinstance(example, tuple) else (example,)
    return tuple(
        torch.randn_like(value) if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in arguments
    )


@contextmanager
def _kept_modes(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _run(model: nn.Module, example: tuple[Any, ...]) -> list[Tensor]:
    """The outputs of a model, of all heads behind the features of one task."""
    if not isinstance(model, MultiTaskModel):
        return tensors(model(*example))
    first, *others = model.heads.values()
    features: list[Any] = []
    hook = first.register_forward_pre_hook(lambda _, arguments: features.extend(arguments))
    try:
        outputs = [model(*example, tasks=[model.tasks[0]])]
    finally:
        hook.remove()
    return tensors(outputs + [head(*features) for head in others])


@contextmanager
@torch.no_grad()
def _closed(parts: Parts, *, fold: bool) -> Iterator[None]:
    """Closes filters by their gates, and by their biases but where a constant is to be folded; opens them again."""
    norms = dict.fromkeys(norm.module for group, _ in parts for norm in group.norms)
    tensors = [tensor for norm in norms for tensor in (norm.weight, norm.bias) if tensor is not None]
    before = [tensor.clone() for tensor in tensors]
    for group, gone in parts:
        for norm in group.norms:
            close(norm.module, norm.own[norm.of(gone)], bias=not fold)
    try:
        yield
    finally:
        for tensor, values in zip(tensors, before, strict=True):
            tensor.copy_(values)


class _Range(dict[nn.Module, tuple[Tensor, Tensor]]):
    """The least and the largest value of each input channel of a module, float64 on the CPU, over all of its calls."""

    def watch(self, module: Any, arguments: tuple[Any, ...]) -> None:
        x = arguments[0].detach()
        axis = -1 if isinstance(module, nn.Linear) else -1 - len(module.kernel_size)
        rows = x.movedim(axis, 0).flatten(1).to("cpu", torch.float64)
        least, largest = rows.amin(1), rows.amax(1)
        if module in self:
            least, largest = torch.minimum(self[module][0], least), torch.maximum(self[module][1], largest)
        self[module] = least, largest


@torch.no_grad()
def _run_closed(model: nn.Module, parts: Parts, example: tuple[Any, ...], *, fold: bool) -> tuple[list[Tensor], _Range]:
    """The outputs where filters are closed, and what the layers that read them get."""
    found = _Range()
    readers = {reader.module for group, _ in parts for reader in group.readers}
    hooks = [module.register_forward_pre_hook(found.watch) for module in readers]
    try:
        with _closed(parts, fold=fold):
            return _run(model, example), found
    finally:
        for hook in hooks:
            hook.remove()


def _removable(model: nn.Module, parts: Parts, example: tuple[Any, ...], *, fold: bool) -> Parts:
    """Keeps the filters of which nothing arrives at any layer that reads them, or a constant that can be folded."""
    _, inputs = _run_closed(model, parts, example, fold=fold)
    removable = []
    for group, gone in parts:
        stay = torch.zeros(group.size, dtype=torch.bool)
        for reader in group.readers:
            least, largest = (value[reader.own] for value in inputs[reader.module])
            silent = (least.abs() < _NOTHING) & (largest.abs() < _NOTHING)
            if fold and _takes_constants(reader.module):
                silent |= (largest - least) <= _CONSTANT * largest.abs().clamp_min(1)
            stay[reader.filters[~silent]] = True
        removable.append((group, gone[~stay[gone]]))
    return removable


@torch.no_grad()
def _remove(model: nn.Module, filters: Filters, parts: Parts, example: tuple[Any, ...], *, fold: bool) -> str:
    """Takes filters out; returns how the network then is another one than that with closed filters, or nothing."""
    expected, inputs = _run_closed(model, parts, example, fold=fold)
    before = dict(model.named_parameters())
    try:
        parts = [(group, gone) for group, gone in parts if len(gone)]
        if fold:  # all of them, before any goes: a layer behind a concatenation reads the filters of several groups
            for group, gone in parts:
                _fold_constants(group, gone, inputs)
        for group, gone in parts:
            filters.remove(group, gone)
        for name, parameter in model.named_parameters():
            if name in before:
                _look_like(parameter, before[name])
        return _difference(expected, _run(model, example))
    except Exception as error:  # of the model's own code, which meets other shapes
        return f"without some of them it fails with {type(error).__name__}: {error}"


def _look_like(parameter: nn.Parameter, before: Tensor) -> None:
    """Gives a parameter that has become smaller what hangs on the larger one, and its memory format."""
    parameter.requires_grad_(before.requires_grad)
    vars(parameter).update(vars(before))
    memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(before.dim())
    if memory_format and not before.is_contiguous() and before.is_contiguous(memory_format=memory_format):
        parameter.data = parameter.data.contiguous(memory_format=memory_format)


def _takes_constants(module: Any) -> bool:
    """Whether every position of the output gets the same share of a constant input."""
    if isinstance(module, nn.Linear):
        return True
    padded = module.padding != "valid" and any(module.padding if module.padding != "same" else module.kernel_size)
    return not module.transposed and (not padded or module.padding_mode != "zeros")


@torch.no_grad()
def _fold_constants(group: Group, gone: Tensor, inputs: _Range) -> None:
    for reader in group.readers:
        module, channels = reader.module, reader.own[reader.of(gone)]
        constant = inputs[module][0][channels]
        if not bool(constant.any()):
            continue
        taps = module.weight[:, channels].flatten(2).sum(2) if module.weight.dim() > 2 else module.weight[:, channels]
        more = (taps.double() @ constant.to(taps.device)).to(taps.dtype)
        bias = more if module.bias is None else module.bias + more
        module.bias = nn.Parameter(bias, requires_grad=module.weight.requires_grad)


def _difference(expected: list[Tensor], outputs: list[Tensor]) -> str:
    for y, ours in zip(expected, outputs, strict=True):
        allowed = max(_ROUNDING, 100 * torch.finfo(y.dtype).eps if y.is_floating_point() else 0)
        wide = torch.promote_types(y.dtype, torch.float64)  # of integers and of complex numbers too
        known = y.cpu().to(wide)
        difference = float((known - ours.cpu().to(wide)).abs().max() / known.abs().max().clamp_min(_NOTHING))
        if not difference <= allowed:
            return f"without some of them an output differs by {difference:.1e}"
    return ""
