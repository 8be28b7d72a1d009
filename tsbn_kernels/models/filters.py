"""Which channels of a network go together: the graph of torch-pruning, and what it does not know of these layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from tsbn_kernels.layers.task_specific import TaskSpecific

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_SHUT = -1e4  # its sigmoid is 0 in every dtype
_OF_TASKS = ("weight", "bias", "running_mean", "running_var")  # [T, C]


class Member(NamedTuple):
    """A module in which the filters of a group lie: its channel ``own[i]`` is the filter ``filters[i]``."""

    module: Any
    own: Tensor
    filters: Tensor

    def of(self, chosen: Tensor) -> Tensor:
        """Which of its channels are among chosen filters."""
        return torch.isin(self.filters, chosen)


class Group(NamedTuple):
    """The filters of one convolution or linear layer, with all that must lose a channel where it loses a filter.

    Attributes:
        name: of the layer.
        root: the layer.
        size: how many filters it has.
        norms: the batch normalisation that sees these, behind the layer, a residual sum or a concatenation.
        readers: convolutions and linear layers that have them as their input.
    """

    name: str
    root: nn.Module
    size: int
    norms: list[Member]
    readers: list[Member]

    def importance(self) -> Tensor:
        """The largest scale that any task has in any layer for each filter, float64 on the CPU."""
        largest = torch.zeros(self.size, dtype=torch.float64)
        for norm in self.norms:
            scales = scales_of(norm.module).abs().amax(0)[norm.own]
            largest.scatter_reduce_(0, norm.filters, scales, "amax")
        return largest


def scales_of(norm: Any) -> Tensor:
    """The factors of the normalised activation, float64 ``[T, C]`` on the CPU; of a plain layer T is 1."""
    gates = norm.gates if isinstance(norm, TaskSpecific) else norm.weight[None]
    return gates.detach().to("cpu", torch.float64)


@torch.no_grad()
def close(norm: Any, channels: Tensor, *, bias: bool) -> None:
    """Lets nothing through: the gates of these channels become 0 for all tasks, and their biases, if asked for."""
    sigmoid = isinstance(norm, TaskSpecific) and norm.gate == "sigmoid"
    channels = channels.to(norm.weight.device)
    norm.weight.index_fill_(-1, channels, _SHUT if sigmoid else 0.0)
    if bias and norm.bias is not None:
        norm.bias.index_fill_(-1, channels, 0.0)


class Filters:
    """The filters of a network, in groups of which each may lose some.

    Args:
        model: its parameters require a gradient while this is made.
        run: calls the model, and returns the tensors that come out.

    Attributes:
        names: of all modules.
        groups: those whose filters may go.
        kept: why others stay, by the name of a layer with gates.

    Raises:
        ImportError: torch-pruning is not installed.
    """

    def __init__(self, model: nn.Module, run: Callable[[nn.Module], list[Tensor]]) -> None:
        pruning = _torch_pruning()
        self.graph = pruning.DependencyGraph()
        self.names = {module: name for name, module in model.named_modules()}
        own = {type(module) for module in self.names if isinstance(module, TaskSpecific)}
        owners = Counter(parameter for module in self.names for parameter in module.parameters(recurse=False))
        self._tied = {parameter for parameter, count in owners.items() if count > 1}
        self.groups: list[Group] = []
        self.kept: dict[str, str] = {}
        try:
            # A layer whose output is that of the network is no output in the graph of torch-pruning, but a product is.
            with torch.enable_grad(), _trainable(model):
                self.graph.build_dependency(
                    model,
                    None,
                    forward_fn=lambda model, _: [y * 1 for y in run(model) if y.grad_fn is not None],
                    customized_pruners=dict.fromkeys(own, _pruner(pruning)),
                    verbose=False,
                )
            found = set(self._find(pruning.ops))
        except Exception as error:  # of the model's own code too, which may raise anything
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"torch-pruning cannot read the graph of {type(model).__name__}: {what}") from error
        for module, name in self.names.items():
            if isinstance(module, TaskSpecific) and module not in found:
                self.kept.setdefault(name, "no convolution or linear layer before it is called as a module")

    def _find(self, ops: Any) -> Iterator[nn.Module]:
        """Finds the groups, and returns the normalisation that belongs to any convolution or linear layer."""
        seen: set[nn.Module] = set()
        for root in [module for module in self.graph.module2node if isinstance(module, (*_CONVOLUTIONS, nn.Linear))]:
            if root in seen:
                continue
            items: Any = []
            try:
                for filters in ([0], range(_outputs(root))):  # of all, where one has no obstacle
                    items = self._group(root, filters)
                    found = [self._obstacle(item, ops) for item in items]
                    obstacle = next(filter(None, chain(found, map(self._misfit, items))), None)
                    if obstacle:
                        break
            except Exception as error:  # whatever an index of its own that is wrong leads to
                obstacle = f"torch-pruning cannot follow them: {type(error).__name__}: {error}"
            norms = [item for item in items if isinstance(item.dep.target.module, (_BatchNorm, TaskSpecific))]
            yield from (item.dep.target.module for item in norms)
            readers = [item for item in items if _reads(item)]
            group = Group(
                self.names[root], root, _outputs(root), list(map(_member, norms)), list(map(_member, readers))
            )
            if obstacle:
                self.keep(group, obstacle)
            elif group.size > 1:  # one that is spread over the filters of another layer may not hide these
                seen |= {item.dep.target.module for item in items if self._gives(item)}
                self.groups += [group] if norms else []

    def _obstacle(self, item: Any, ops: Any) -> str | None:
        """Why the filters of a group cannot go, for one of its members."""
        module = item.dep.target.module
        if isinstance(module, nn.Parameter):
            return f"the network uses a parameter of shape {list(module.shape)} by itself with them"
        if isinstance(module, ops._OutputOp):
            return "they are an output of the network"
        if module not in self.names or isinstance(module, nn.PReLU):  # an operator
            repeated = None in item.root_idxs
            return "torch-pruning does not tell which is which behind a repetition" if repeated else None
        why = None
        if isinstance(module, _CONVOLUTIONS):
            why = "takes them in groups" if module.groups > 1 and not _depthwise(module) else None
        elif isinstance(module, _BatchNorm):
            sharded = isinstance(module, TaskSpecific) and module._tasks is not None
            why = "is sharded" if sharded else "has no scale" if module.weight is None else None
        elif not isinstance(module, nn.Linear):
            why = "computes with all of its channels at once"
        if is_parametrized(module):
            why = "is parametrized"
        elif any(parameter in self._tied for parameter in module.parameters(recurse=False)):
            why = "has a parameter that another module has too"
        return why and f"{self.names[module]!r} ({type(module).__name__}) {why}"

    def _misfit(self, item: Any) -> str | None:
        """Says where a member of a group that is no obstacle lacks channels that torch-pruning takes it to have."""
        module = item.dep.target.module
        if module not in self.names:
            return None
        pruner = self.graph.get_pruner_of_module(module)
        if max(item.idxs) < (pruner.get_out_channels if self._gives(item) else pruner.get_in_channels)(module):
            return None
        return f"{self.names[module]!r} ({type(module).__name__}) has fewer channels than torch-pruning thinks"

    def _gives(self, item: Any) -> bool:
        """Whether the filters are the output of a module."""
        return bool(self.graph.is_out_channel_pruning_fn(item.dep.handler))

    def keep(self, group: Group, why: str) -> None:
        """Leaves a group alone, and says why."""
        self.kept |= {self.names[norm.module]: why for norm in group.norms}
        self.groups = [other for other in self.groups if other is not group]

    def undo(self) -> Callable[[], None]:
        """Returns a function that puts back what modules hold now, and what torch-pruning knows of them."""
        modules = [module for module in self.graph.module2node if isinstance(module, nn.Module)]
        before = [(module, _copied(vars(module))) for module in {*self.names, *modules}]

        def put_back() -> None:
            for module, state in before:
                vars(module).clear()
                vars(module).update(_copied(state))

        return put_back

    def _group(self, root: nn.Module, filters: Sequence[int]) -> Any:
        return self.graph.get_pruning_group(
            root, self.graph.get_pruner_of_module(root).prune_out_channels, list(filters)
        )

    def remove(self, group: Group, filters: Tensor) -> None:
        """Takes filters of a group out of the whole network."""
        self._group(group.root, filters.tolist()).prune(record_history=False)


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ImportError as error:
        raise ImportError("pruning needs torch-pruning: pip install 'tsbn-kernels[prune]'") from error
    return torch_pruning


def _pruner(pruning: Any) -> Any:
    """What torch-pruning is to do with a task-specific layer, whose tensors are ``[T, C]``."""

    class Pruner(pruning.BasePruningFunc):  # type: ignore[misc]
        TARGET_MODULES = TaskSpecific

        def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
            for name in _OF_TASKS:
                tensor = getattr(layer, name, None)
                if tensor is not None:
                    gone = torch.tensor(idxs, device=tensor.device)
                    left = tensor.detach()[:, ~torch.isin(torch.arange(tensor.shape[1], device=tensor.device), gone)]
                    setattr(layer, name, nn.Parameter(left) if isinstance(tensor, nn.Parameter) else left)
            layer.num_features = layer.weight.shape[1]
            return layer

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: Any) -> int:
            return int(layer.weight.shape[-1])

        get_in_channels = get_out_channels

    return Pruner()


@contextmanager
def _trainable(model: nn.Module) -> Iterator[None]:
    """For torch-pruning follows gradients, from the output to all that has weights."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(parameter.is_floating_point())
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _outputs(layer: Any) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def _depthwise(layer: Any) -> bool:
    return bool(layer.groups == layer.in_channels == layer.out_channels)


def _reads(item: Any) -> bool:
    """Whether the filters are the input of a convolution or linear layer."""
    module = item.dep.target.module
    if isinstance(module, _CONVOLUTIONS) and _depthwise(module):
        return False
    return isinstance(module, (*_CONVOLUTIONS, nn.Linear)) and "in_channels" in item.dep.handler.__name__


def _member(item: Any) -> Member:
    return Member(item.dep.target.module, torch.tensor(item.idxs), torch.tensor(item.root_idxs))


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """Attributes of a module, its parameters and buffers among them; hooks stay in the dictionary of their handles."""
    return {name: value.copy() if type(value) in (dict, list) else value for name, value in state.items()}
