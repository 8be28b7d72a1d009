"""The methods that are trained, and the networks that each of them has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.network.model import Layout
from experiments.forty_tasks import convolutional, staged, transformer
from experiments.forty_tasks.transformer import TransformerLayout
from experiments.training.methods import (
    CROSS_STITCH,
    HARD_SHARING,
    MTAN,
    SINGLE_TASK,
    TS_SIGMA_BN,
    TS_SIGMA_LN,
    TSBN,
    TSLN,
)
from experiments.training.sizes import Size, size_of
from tsbn_kernels.layers.task_specific import TaskSpecific

AnyLayout = Layout | TransformerLayout

LOOP = "loop"  # the method that has gates by plain layers in a loop: to be timed against, and not trained

# By the class of its layout and the method: makes the network of T tasks, which gives logits [T, N].
NETWORKS: dict[type, dict[str, Callable[[int, Any], nn.Module]]] = {
    Layout: {
        SINGLE_TASK: convolutional.SingleTasks,
        HARD_SHARING: convolutional.hard_sharing,
        CROSS_STITCH: staged.cross_stitch,
        MTAN: staged.mtan,
        TSBN: convolutional.tsbn,
        TS_SIGMA_BN: convolutional.ts_sigma_bn,
        LOOP: convolutional.loop,
    },
    TransformerLayout: {
        HARD_SHARING: transformer.hard_sharing,
        TSLN: transformer.tsln,
        TS_SIGMA_LN: transformer.ts_sigma_ln,
        LOOP: transformer.loop,
    },
}
METHODS = tuple(dict.fromkeys(name for makers in NETWORKS.values() for name in makers if name != LOOP))


def make_network(method: str, tasks: int, layout: AnyLayout) -> nn.Module:
    """The network of a method, or of :data:`LOOP`."""
    return NETWORKS[type(layout)][method](tasks, layout)


def methods_of(layout: AnyLayout) -> list[str]:
    """The methods by which networks of this kind are trained."""
    return [name for name in NETWORKS[type(layout)] if name != LOOP]


def sizes(methods: Sequence[str], tasks: int, layout: AnyLayout, sample: Tensor) -> dict[str, Size]:
    """The size of each method's network for one sample: #P and #F are relative to hard sharing of one task."""
    return {name: size_of(partial(make_network, name, tasks, layout), sample[None]) for name in methods}


def gates(network: nn.Module) -> Tensor | None:
    """Factors of the normalised activations, of all layers side by side: ``[T, F]``; None where tasks have none."""
    layers = [module for module in network.modules() if isinstance(module, TaskSpecific)]
    return torch.cat([layer.gates.detach().cpu() for layer in layers], 1) if layers else None
