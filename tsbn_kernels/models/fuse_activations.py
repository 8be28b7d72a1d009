"""Chains of a normalisation and its activation, found by torch.fx, and what stands for an activation in a fused one."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tsbn_kernels.definition.activations import FUNCTION_NAMES, Name, of_function, of_module
from tsbn_kernels.definition.plain import CALL_HOOKS, has_hooks, held, is_plain, leaf_call
from tsbn_kernels.layers.batch_norm import FusedTSigmaBN
from tsbn_kernels.layers.task_specific import TaskSpecific
from tsbn_kernels.models import sites

_FUSED = "_tsbn_fused"  # the layers that apply what a block does not


class FusedActivation(nn.Identity):
    """Stands where the plain model has an activation, and does nothing: the layers before it apply that."""

    def __init__(self, plain: nn.Module, layers: Iterable[FusedTSigmaBN]) -> None:
        super().__init__()
        self._memory = plain, tuple(layers)  # in a tuple: they are not children, and have no names here
        self.train(plain.training)

    @property
    def plain(self) -> nn.Module:
        """The activation."""
        return self._memory[0]

    @property
    def layers(self) -> tuple[FusedTSigmaBN, ...]:
        """The layers that apply the activation."""
        return self._memory[1]

    def forward(self, input: Any) -> Any:
        """Returns what it gets."""
        return leaf_call(self, input) if isinstance(input, fx.Proxy) and not has_hooks(self) else input

    def extra_repr(self) -> str:
        return f"{self.plain}"


class Chains(NamedTuple):
    """What follows the normalisation layers of a model.

    Attributes:
        activations: of the layers that can apply what follows them, and its slope.
        modules: for each activation whose every call follows such a layer, these layers.
        blocks: modules whose forward calls an activation behind such a layer and elsewhere, or a function: which calls
            it is to leave out, and the layers.
        unfused: names of the layers that an activation follows whose call cannot be told from others.
        unknown: normalisations that the model calls although they are none of its modules.
    """

    activations: dict[nn.Module, tuple[Name, float]]
    modules: dict[nn.Module, list[nn.Module]]
    blocks: dict[nn.Module, tuple[set[int], list[nn.Module]]]
    unfused: list[str]
    unknown: list[nn.Module]


def fuse(chains: Chains, layers: Mapping[nn.Module, FusedTSigmaBN]) -> dict[nn.Module, nn.Module]:
    """Gives the layers the activations that follow them; returns what takes the place of these."""
    for norm, (name, slope) in chains.activations.items():
        layers[norm].activation, layers[norm].negative_slope = name, slope
    for block, (indices, norms) in chains.blocks.items():
        sites.leave_out(block, indices)
        setattr(block, _FUSED, (*getattr(block, _FUSED, ()), *(layers[norm] for norm in norms)))
    return {plain: FusedActivation(plain, [layers[n] for n in norms]) for plain, norms in chains.modules.items()}


def unfuse(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Has the layers apply no activation, and the code that :func:`fuse` has changed do so.

    Returns:
        The activation for each module that stands for one.

    Raises:
        ValueError: a hook sees the output of one of the layers, which would no longer be activated.
    """
    standing = [module for module in model.modules() if isinstance(module, FusedActivation)]
    layers = [layer for module in standing for layer in module.layers]
    layers += [layer for module in model.modules() if sites.restore(module) for layer in vars(module).pop(_FUSED)]
    for layer in layers:
        if any(has_hooks(layer, name) for name in CALL_HOOKS if name != "_forward_pre_hooks"):
            name = next((name for name, module in model.named_modules() if module is layer), type(layer).__name__)
            raise ValueError(
                f"{name!r} applies an activation of the model, and has hooks that see its output activated, which that "
                f"of a plain layer is not; remove them, or convert with fuse_activation=False"
            )
        layer.activation = None
    return {module: module.plain.train(module.training) for module in standing}


class Tracer(fx.Tracer):
    """Does not look into normalisation layers, and keeps those that are no modules of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.unknown: list[nn.Module] = []

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(m, _BatchNorm) and m not in set(self.root.modules()):
            self.unknown.append(m)
            return self.create_proxy("call_function", type(m).__call__, args, kwargs)
        return super().call_module(m, forward, args, kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (TaskSpecific, _BatchNorm, FusedActivation)) or super().is_leaf_module(
            m, module_qualified_name
        )


def twin_of(model: nn.Module) -> nn.Module:
    """A copy to be traced, with the same parameters: tracing runs forward, which may write to the module."""
    return deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


class _Call(NamedTuple):
    """A call in one of the traces."""

    activation: tuple[Name, float] | None  # what it computes, where a layer may do so
    module: nn.Module | None  # None where a function is called
    site: sites.Site | None


def find_chains(model: nn.Module, norms: Mapping[nn.Module, str], kept: Collection[nn.Module]) -> Chains:
    """Traces a model with the default arguments of its forward, in training and in evaluation.

    Args:
        model: it is left as it is, and its hooks are not called.
        norms: the layers to look behind, with their names.
        kept: activations that are to stay.

    Raises:
        Exception: whatever the model's own code or ``torch.fx`` raises where it cannot be traced.
    """
    calls: dict[fx.Node, _Call] = {}
    behind: dict[nn.Module, list[fx.Node | None]] = defaultdict(list)  # for each call of a layer, that of an activation
    unknown: list[nn.Module] = []
    module: nn.Module | None
    for training in (True, False):
        twin = twin_of(model).train(training)
        own: dict[nn.Module, nn.Module] = dict(zip(twin.modules(), model.modules(), strict=True))
        for copied, module in own.items():
            for hooks in CALL_HOOKS:
                getattr(copied, hooks).clear()
            children = {name for name, child in module.named_children() if of_module(child) is not None}
            sites.mark(copied, FUNCTION_NAMES | children)
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(twin.forward).parameters.items()
            if parameter.default is not inspect.Parameter.empty
        }
        tracer = Tracer()
        graph = tracer.trace(twin, concrete_args=defaults)
        unknown += tracer.unknown
        kept_nodes = {proxy.node for proxy in held(twin, lambda value: isinstance(value, fx.Proxy))}
        called = {node: twin.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
        modules = {node: own[module] for node, module in called.items()}
        inner = {part for module in modules.values() for part in module.modules() if part is not module}
        for node in graph.nodes:
            module, site = modules.get(node), sites.site_of(node, called.get(node))
            activation = None if module in inner or module in kept else _activation(node, module)
            calls[node] = _Call(activation, module, site and sites.Site(own[site.owner], site.number))
        for node, norm in modules.items():
            if norm in norms:
                nodes = _follow(node, modules)
                watched = _watched(nodes, model) or not kept_nodes.isdisjoint(nodes[:-1])
                behind[norm].append(nodes[-1] if calls[nodes[-1]].activation and not watched else None)
    return _choose(norms, behind, calls)._replace(unknown=list(dict.fromkeys(unknown)))


def _choose(
    norms: Mapping[nn.Module, str], behind: Mapping[nn.Module, list[fx.Node | None]], calls: dict[fx.Node, _Call]
) -> Chains:
    """The layers of which every call is followed by a call that can be taken away.

    That is one of a module that is called behind such layers alone, or one from a place in the code that is reached
    behind such layers alone.
    """
    following: dict[nn.Module, list[fx.Node]] = {}
    for norm, nodes in behind.items():
        present = [node for node in nodes if node is not None]
        if len(present) == len(nodes) and len({calls[node].activation for node in present}) == 1:
            following[norm] = present
    candidates = list(following)
    while True:
        fused = {node: norm for norm, nodes in following.items() for node in nodes}
        stay = [call for node, call in calls.items() if node not in fused]
        modules = {calls[node].module for node in fused} - {call.module for call in stay} - {None}
        places = {calls[node].site for node in fused} - {call.site for call in stay} - {None}
        stuck = {n for node, n in fused.items() if calls[node].module not in modules and calls[node].site not in places}
        if not stuck:
            break
        following = {norm: nodes for norm, nodes in following.items() if norm not in stuck}
    activations = {norm: calls[nodes[0]].activation for norm, nodes in following.items()}
    found = Chains(activations, {}, {}, [norms[norm] for norm in candidates if norm not in following], [])  # type: ignore[arg-type]
    for node, norm in fused.items():
        module, site = calls[node].module, calls[node].site
        if module in modules:
            layers = found.modules.setdefault(module, [])  # type: ignore[arg-type]
        else:
            indices, layers = found.blocks.setdefault(site.owner, (set(), []))  # type: ignore[union-attr]
            indices.add(site.number)  # type: ignore[union-attr]
        if norm not in layers:
            layers.append(norm)
    return found


def _activation(node: fx.Node, module: nn.Module | None) -> tuple[Name, float] | None:
    if module is not None:
        return of_module(module) if len(node.args) == 1 and not node.kwargs else None
    return of_function(node.target, *node.args, **node.kwargs) if node.op in ("call_function", "call_method") else None


def _follow(node: fx.Node, modules: Mapping[fx.Node, nn.Module]) -> list[fx.Node]:
    """A call, and what alone uses its result: through modules that do nothing, to the first that may do something."""
    nodes = [node]
    while len(nodes[-1].users) == 1:
        (user,) = nodes[-1].users
        if user.op == "call_module" and (user.args != (nodes[-1],) or user.kwargs):
            break
        nodes.append(user)
        if user not in modules or not is_plain(modules[user], (nn.Identity,)):
            break
    return nodes


def _watched(nodes: Sequence[fx.Node], model: nn.Module) -> bool:
    """Whether a module that the data enter or leave on their way from the first call to the last has hooks."""
    stacks: list[dict[str, tuple[str, Any]]] = [node.meta.get("nn_module_stack", {}) for node in nodes]  # by call
    around = set.intersection(*map(set, stacks))
    paths = {path for stack in stacks for call, (path, _) in stack.items() if call not in around}
    return any(has_hooks(model.get_submodule(path)) for path in paths)
