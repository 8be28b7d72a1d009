"""Chains of a normalisation and its activation, found by torch.fx, and what stands for an activation in a fused one."""

from __future__ import annotations

import copy
import inspect
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tsbn_kernels.activations import TABLE, of_module
from tsbn_kernels.modules import FusedTSigmaBN

_FUNCTIONS = [function for row in TABLE.values() for function in row.functions]
_METHODS = [method for row in TABLE.values() for method in row.methods]
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Standing(nn.Module):
    """Stands where the plain model has an activation."""

    def __init__(self, plain: nn.Module, layers: Iterable[FusedTSigmaBN]) -> None:
        super().__init__()
        self._memory = plain, tuple(layers)  # in a tuple: they are not children, and have no names here
        self.train(plain.training)

    def plain(self) -> nn.Module:
        """The activation; the layers that applied it apply none from now on."""
        plain, layers = self._memory
        for layer in layers:
            layer.activation = None
        return plain.train(self.training)

    def extra_repr(self) -> str:
        return f"{self._memory[0]}"


class FusedActivation(_Standing, nn.Identity):
    """Does nothing: the layers before it apply the activation."""


class SharedActivation(_Standing):
    """An activation that layers apply where it follows them, and that is called elsewhere too, where it acts.

    torchvision's residual blocks call one ``self.relu`` behind their norms and behind their addition. The layers mark
    their output, and a marked tensor passes once.
    """

    def __init__(self, plain: nn.Module, layers: Iterable[FusedTSigmaBN]) -> None:
        super().__init__(plain, layers)
        for layer in self._memory[1]:
            layer.register_forward_hook(_mark)

    def forward(self, x: Tensor) -> Tensor:
        owner: Any = _owner(x)
        if getattr(owner, "_tsbn_activated", False):
            owner._tsbn_activated = False
            return x
        y: Tensor = self._memory[0](x)
        return y


def _mark(_layer: nn.Module, _args: Any, y: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        y = y.view_as(y)  # torch.compile sets no attribute of what an autograd.Function returns
    y._tsbn_activated = True  # type: ignore[attr-defined]
    return y


def _owner(x: Tensor) -> Tensor:
    """Modules with full backward hooks hand on views of what they get."""
    return x if torch.compiler.is_compiling() or x._base is None else x._base


def plain_activations(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """The activation for each module that stands for one; their layers apply them no more."""
    return {module: module.plain() for module in model.modules() if isinstance(module, _Standing)}


def has_hooks(module: nn.Module) -> bool:
    """Whether something else sees what goes into the module, or comes out of it."""
    return any(getattr(module, name) for name in _HOOKS)


class Tracer(fx.Tracer):
    """Does not look into normalisation layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (FusedTSigmaBN, _BatchNorm, _Standing)) or super().is_leaf_module(m, module_qualified_name)


def twin_of(model: nn.Module) -> nn.Module:
    """A copy to be traced, with the same parameters: tracing runs forward, which may write to the module."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


class Chains(NamedTuple):
    """What follows the normalisation layers of a model.

    Attributes:
        activations: of each layer that one activation module alone follows, this module.
        shared: those of these modules that are called elsewhere too.
        functions: names of the layers that an activation follows which is a function.
    """

    activations: dict[nn.Module, nn.Module]
    shared: set[nn.Module]
    functions: list[str]


def find_chains(model: nn.Module, norms: Mapping[nn.Module, str], kept: set[nn.Module]) -> Chains:
    """Traces a model with the default arguments of its forward, in training and in evaluation.

    Args:
        model: it is left as it is, and its hooks are not called.
        norms: the layers to look behind, with their names.
        kept: activations that are to stay.

    Raises:
        Exception: whatever the model's own code or ``torch.fx`` raises where it cannot be traced.
    """
    behind: dict[nn.Module, list[nn.Module | None]] = defaultdict(list)  # for each call of a layer
    functions: dict[str, None] = {}
    called: Counter[nn.Module] = Counter()
    for training in (True, False):
        twin = twin_of(model)
        twin.train(training)
        for module in twin.modules():
            for name in _HOOKS:
                getattr(module, name).clear()
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(twin.forward).parameters.items()
            if parameter.default is not inspect.Parameter.empty
        }
        graph = Tracer().trace(twin, concrete_args=defaults)
        modules = {node: model.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
        called.update(modules.values())
        inner = {part for module in modules.values() for part in module.modules() if part is not module}
        for node, norm in modules.items():
            if norm in norms:
                nodes = _follow(node, modules)
                if _is_function(nodes[-1]):
                    functions[norms[norm]] = None
                last = modules.get(nodes[-1])
                fusible = last is not None and of_module(last) is not None and last not in kept | inner
                behind[norm].append(last if fusible and not _watched(nodes, model) else None)
    activations = {norm: found[0] for norm, found in behind.items() if found[0] is not None and len(set(found)) == 1}
    applied = Counter(activation for norm, activation in activations.items() for _ in behind[norm])
    shared = {activation for activation in applied if called[activation] > applied[activation]}
    return Chains(activations, shared, list(functions))


def _follow(node: fx.Node, modules: Mapping[fx.Node, nn.Module]) -> list[fx.Node]:
    """A call, and what alone uses its result: through modules that do nothing, to the first that may do something."""
    nodes = [node]
    while len(nodes[-1].users) == 1:
        (user,) = nodes[-1].users
        if user.op == "call_module" and (user.args != (nodes[-1],) or user.kwargs):
            break
        nodes.append(user)
        if type(modules.get(user)) is not nn.Identity:
            break
    return nodes


def _is_function(node: fx.Node) -> bool:
    return node.target in (_FUNCTIONS if node.op == "call_function" else _METHODS if node.op == "call_method" else ())


def _watched(nodes: Sequence[fx.Node], model: nn.Module) -> bool:
    """Whether a module that the data enter or leave on their way from the first call to the last has hooks."""
    stacks: list[dict[str, tuple[str, Any]]] = [node.meta["nn_module_stack"] for node in nodes]  # by call
    around = set.intersection(*map(set, stacks))
    paths = {path for stack in stacks for call, (path, _) in stack.items() if call not in around}
    return any(has_hooks(model.get_submodule(path)) for path in paths)
