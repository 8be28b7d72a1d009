"""A look into the graphs that torch.compile makes."""

from __future__ import annotations

from typing import Any

import torch
from functorch.compile import aot_module_simplified, make_boxed_func
from torch import Tensor


class GraphCounter:
    """A torch.compile backend that notes what is in the graphs, after autograd has split them."""

    def __init__(self) -> None:
        self.targets: list[str] = []
        self.dtypes: set[torch.dtype] = set()

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        def keep(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            self.targets += [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
            values = [node.meta.get("val") for node in module.graph.nodes]
            self.dtypes.update(value.dtype for value in values if isinstance(value, Tensor))
            return make_boxed_func(module.forward)

        return aot_module_simplified(graph, inputs, fw_compiler=keep, bw_compiler=keep)
