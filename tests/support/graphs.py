"""A look into the graphs that torch.compile makes, and the ways to call a layer that must not break them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from functorch.compile import aot_module_simplified, make_boxed_func
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tsbn_kernels import (
    FusedTSigmaBN2d,
    FusedTSigmaLN,
    FusedTSigmaLN2d,
    FusedTSigmaRMSNorm,
    LateFanOut,
    MultiTaskModel,
    convert_model,
    recompute_outputs,
)


class GraphCounter:
    """A torch.compile backend that notes what is in the graphs, after autograd has split them."""

    def __init__(self) -> None:
        self.compiled = 0  # attempts included that Dynamo gave up
        self.ran: list[int] = []  # numbers of the graphs
        self.targets: list[str] = []
        self.dtypes: set[torch.dtype] = set()

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        number = self.compiled
        self.compiled += 1

        def keep(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            self.targets += [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
            values = [node.meta.get("val") for node in module.graph.nodes]
            self.dtypes.update(value.dtype for value in values if isinstance(value, Tensor))
            return make_boxed_func(module.forward)

        compiled = aot_module_simplified(graph, inputs, fw_compiler=keep, bw_compiler=keep)

        def run(*arguments: Any) -> Any:
            self.ran.append(number)
            return compiled(*arguments)

        return run


T, C = 3, 8


class Way(NamedTuple):
    """A module that calls a layer, and how many samples it takes for each of a task; ``residual``: two inputs.

    ``operators`` are those that are in a graph: of training, of evaluation, and of the backward pass.
    """

    make: Callable[[], nn.Module]
    streams: int
    residual: bool = False
    operators: tuple[str, str, str] = ("tsbn.forward_training.", "tsbn.forward_eval.", "tsbn.backward.")

    def inputs(self, samples: int) -> list[Tensor]:
        count = 2 if self.residual else 1
        return [torch.randn(self.streams * samples, C, 6, 5, requires_grad=True) for _ in range(count)]


class Calling(nn.Module):
    """Calls a layer in a way of its own."""

    def __init__(self, call: Callable[..., Any], layer: nn.Module | None = None, **options: Any) -> None:
        super().__init__()
        self.call = call
        self.layer = FusedTSigmaBN2d(T, C, **options) if layer is None else layer

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        return self.call(self.layer, x) if residual is None else self.call(self.layer, x, residual)


def model(**options: Any) -> nn.Module:
    """A backbone of two blocks for three tasks."""
    backbone = nn.Sequential(
        nn.Conv2d(C, C, 1),
        nn.BatchNorm2d(C),
        nn.ReLU(),
        nn.Conv2d(C, C, 1),
        nn.BatchNorm2d(C),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    heads = {name: nn.Linear(C, 1 + index) for index, name in enumerate("abc")}
    return MultiTaskModel(convert_model(backbone, num_tasks=T), heads, **options)


def recomputed(layer: nn.Module, x: Tensor) -> Tensor:
    with recompute_outputs():
        return torch.nn.functional.avg_pool2d(layer(x), 2)


def checkpointed(layer: nn.Module, x: Tensor) -> Any:
    """In a graph; it must equal the layer itself, and update the statistics once."""
    return checkpoint(layer, x, use_reentrant=False) if torch.compiler.is_compiling() else layer(x)


def added(layer: Any, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    y, s = layer.add(x, residual)
    return y, s


def of_rows(make: Callable[[], nn.Module], streams: int = T, residual: bool = False) -> Way:
    """A way to call a layer normalisation, which does not train and evaluate by different operators."""
    return Way(make, streams, residual, ("tsbn.layer_norm.", "tsbn.layer_norm.", "tsbn.layer_norm_backward."))


WAYS = {
    "plain": Way(lambda: FusedTSigmaBN2d(T, C, bias=True), T),
    "cumulative average": Way(lambda: FusedTSigmaBN2d(T, C, momentum=None), T),
    "sample_major": Way(lambda: FusedTSigmaBN2d(T, C, stacking="sample_major"), T),
    "activation": Way(lambda: FusedTSigmaBN2d(T, C, activation="silu"), T),
    "residual": Way(lambda: FusedTSigmaBN2d(T, C, activation="relu"), T, residual=True),
    "fan_out": Way(lambda: FusedTSigmaBN2d(T, C, fan_out=True), 1),
    "tasks": Way(lambda: Calling(lambda layer, x: layer(x, tasks=[2, 0])), 2),
    "streams": Way(lambda: Calling(lambda layer, x: layer.streams(x)), T),
    "streams of one input": Way(lambda: Calling(lambda layer, x: layer.streams(x), fan_out=True), 1),
    "recover_input": Way(lambda: FusedTSigmaBN2d(T, C, recover_input=True), T),
    "recompute_outputs": Way(lambda: Calling(recomputed), T),
    "checkpoint": Way(lambda: Calling(checkpointed, activation="relu"), T),
    "late fan-out": Way(lambda: LateFanOut(T, C, pool=nn.MaxPool2d(2)), 1),
    "late fan-out, convolution": Way(lambda: LateFanOut(T, C, conv=nn.Conv2d(C, C, 3, padding=1)), 1),
    "model": Way(model, 1),
    "model, recomputed": Way(lambda: model(recompute=True), 1),
    "LN": of_rows(lambda: FusedTSigmaLN(T, 5, bias=True)),
    "LN, sample_major": of_rows(lambda: FusedTSigmaLN(T, (6, 5), stacking="sample_major")),
    "LN, fan_out": of_rows(lambda: FusedTSigmaLN(T, 5, fan_out=True), 1),
    "LN, tasks": of_rows(lambda: Calling(lambda layer, x: layer(x, tasks=[2, 0]), FusedTSigmaLN(T, 5)), 2),
    "LN, streams": of_rows(lambda: Calling(lambda layer, x: layer.streams(x), FusedTSigmaLN(T, 5))),
    "LN, addition": of_rows(lambda: Calling(added, FusedTSigmaLN(T, 5)), residual=True),
    "LN, channels first": of_rows(lambda: FusedTSigmaLN2d(T, C)),
    "RMS": of_rows(lambda: FusedTSigmaRMSNorm(T, 5)),
    "RMS, addition": of_rows(lambda: Calling(added, FusedTSigmaRMSNorm(T, 5)), residual=True),
}


def tensors(output: Any) -> list[Tensor]:
    """Those of a tensor, a tuple or a dict."""
    if isinstance(output, Tensor):
        return [output]
    return list(output.values() if isinstance(output, dict) else output)
