"""The networks of single tasks that come out of the CelebA network: how large they are, and how fast."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.network.data import DataError
from benchmarks.network.model import POOL_AFTER, CelebaNetwork, Layout, norm_of
from benchmarks.records.network_run import VARIANTS
from benchmarks.records.summary import Summary
from benchmarks.timing.measure import Effort, measure, step_candidate, summarize
from tsbn_kernels import FusedTSigmaBN, Pruning, export_task

BATCHES = (1, 64)
HARD_SHARING, UNPRUNED = "hard sharing", "unpruned"
BLOCK = 16  # channels that oneDNN computes together with AVX-512


def chain_of(network: Any, task: int) -> nn.Sequential:
    """The backbone of a ``CelebaNetwork`` and the head of one task, as modules one after the other."""
    layers: list[nn.Module] = []

    def add(layer: nn.Module, norm: Any) -> None:
        layers.extend([layer, norm])
        if not isinstance(norm, FusedTSigmaBN) or norm.activation is None:
            layers.append(nn.ReLU())

    norms = iter(network.norms)
    for index, convolution in enumerate(network.convolutions):
        add(convolution, next(norms))
        layers += [nn.MaxPool2d(2)] if index in POOL_AFTER else []
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    for linear in network.linears:
        add(linear, next(norms))
    head = nn.Linear(network.head_weight.shape[1], 1)
    with torch.no_grad():
        head.weight.copy_(network.head_weight[task].T)
        head.bias.copy_(network.head_bias[task])
    return copy.deepcopy(nn.Sequential(*layers, head.to(network.head_weight))).eval()


def load_network(checkpoint: Path) -> tuple[CelebaNetwork, tuple[str, ...]]:
    """The network of a TS-sigma-BN run of the training command, with its best weights, and the names of its tasks.

    Raises:
        DataError: the file is no such checkpoint.
    """
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        settings, tasks = state["settings"], tuple(state["tasks"])
        layout = Layout(settings["layout"]["inputs"], tuple(settings["layout"]["channels"]))
        network = network_of(len(tasks), layout)
        network.load_state_dict(state["best_weights"])
    except (OSError, RuntimeError, pickle.UnpicklingError, KeyError, TypeError) as error:
        raise DataError(f"{checkpoint} is no checkpoint of a TS-sigma-BN network of `train`: {error}") from None
    return network, tasks


def network_of(tasks: int, layout: Layout) -> CelebaNetwork:
    """A TS-sigma-BN network whose gates are as good as random."""
    variant = VARIANTS["and fan-out"]
    network = CelebaNetwork(tasks, partial(norm_of, variant, tasks), tasks, variant, layout)
    for norm in network.norms:
        nn.init.normal_(norm.weight)  # type: ignore[arg-type]
    return network.eval()


@dataclass(frozen=True)
class Exported:
    """A network that has been exported.

    Attributes:
        parameters: how many it has.
        flops: of one image.
        blocked_flops: of its convolutions, as oneDNN computes them: with channels filled up to blocks of :data:`BLOCK`.
        seconds: of a pass, by the number of images.
    """

    parameters: int
    flops: int
    blocked_flops: int
    seconds: dict[int, Summary]


def exported(
    network: CelebaNetwork,
    tasks: Mapping[int, str],
    size: int,
    effort: Effort,
    pruning: Callable[[Tensor], Pruning],
    notify: Callable[[str], None] = lambda _: None,
) -> dict[str, Exported]:
    """Exports tasks of a network with and without pruning, and times what comes out in turns, on the CPU.

    What hard sharing would take for all tasks at once, and the unpruned network of any task, are there under
    :data:`HARD_SHARING` and :data:`UNPRUNED`: how long these take depends on no weight.

    Args:
        network: with a stream for each task.
        tasks: the names of those that are exported, by index.
        size: height and width of an image.
        effort: of timing.
        pruning: gives what is pruned, for an example.
        notify: is told what is being done.
    """
    inputs: Any = network.convolutions[0].in_channels
    example = torch.randn(2, inputs, size, size)
    found: dict[str, nn.Module] = {}
    for index, name in tasks.items():
        notify(f"exporting {name}")
        found[name] = export_task(chain_of(network, index), index, prune=pruning(example))
    unpruned: Any = export_task(chain_of(network, next(iter(tasks))), next(iter(tasks)))
    shared = copy.deepcopy(unpruned)
    shared[-1] = nn.Linear(shared[-1].in_features, len(network.head_weight))
    found |= {UNPRUNED: unpruned, HARD_SHARING: shared}
    seconds: dict[str, dict[int, Summary]] = {name: {} for name in found}
    with torch.inference_mode():
        for batch in BATCHES:
            notify(f"timing {len(found)} networks, batch {batch}")
            images = torch.randn(batch, *example.shape[1:])
            passes = {name: step_candidate(partial(model, images)) for name, model in found.items()}
            for name, (summary,) in summarize(measure(passes, effort)).items():
                seconds[name][batch] = summary
    return {
        name: Exported(
            sum(p.numel() for p in model.parameters()),
            _flops(model, example[:1]),
            blocked_flops(model, example[:1]),
            seconds[name],
        )
        for name, model in found.items()
    }


def _flops(model: nn.Module, image: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return int(counter.get_total_flops())


def blocked_flops(model: nn.Module, image: Tensor) -> int:
    """Operations of all convolutions: outputs in whole blocks, inputs too where there are more than one block."""
    found = []

    def count(module: nn.Module, _: Any, y: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            outputs, inputs, *taps = module.weight.shape
            inputs = inputs if inputs <= BLOCK else _filled(inputs)
            found.append(2 * y[:, 0].numel() * math.prod(taps) * inputs * _filled(outputs))

    hooks = [module.register_forward_hook(count) for module in model.modules()]
    with torch.no_grad():
        model(image)
    for hook in hooks:
        hook.remove()
    return sum(found)


def _filled(channels: int) -> int:
    return -(-channels // BLOCK) * BLOCK
