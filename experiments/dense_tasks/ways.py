"""TS-sigma-BN on dense tasks in several ways: by a loop of plain layers, fused, and fused with memory spared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.layers.peers import LoopOfBatchNorms
from experiments.dense_tasks.deeplab import Bottleneck, DilatedResNet
from experiments.dense_tasks.segnet import SegNet
from tsbn_kernels import FusedTSigmaBN2d, LateFanOut, MultiTaskModel, convert_model

LOOP, FUSED, RECOMPUTE, RECOVERY, LATE = "loop", "fused", "recompute", "leaky recovery", "late fan-out"
WAYS = LOOP, FUSED, RECOMPUTE, RECOVERY, LATE
SLOPE = 0.1  # of the leaky ReLU, by which a layer's input can be recovered from its output


class LoopModel(nn.Module):
    """A plain backbone with a loop of T BatchNorms for each of its own, run on T copies of the images."""

    def __init__(self, backbone: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.backbone, self.heads = backbone, nn.ModuleDict(heads)
        tasks = len(heads)
        for module in list(backbone.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, LoopOfBatchNorms(tasks, child.num_features).to(child.weight))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        tasks = len(self.heads)
        streams = self.backbone(images.repeat(tasks, 1, 1, 1)).chunk(tasks)
        return {name: head(stream) for (name, head), stream in zip(self.heads.items(), streams, strict=True)}


def task_specific(way: str, backbone: nn.Module, heads: Mapping[str, nn.Module]) -> nn.Module:
    """A plain backbone, which is changed, as a network of TS-sigma-BN; one of :data:`WAYS`.

    ``"leaky recovery"`` has leaky ReLUs in the place of ReLUs, and computes something else for that.
    """
    if way == RECOVERY:
        leak(backbone)
    if way == LOOP:
        return LoopModel(backbone, heads)
    fused = convert_model(backbone, len(heads), pretrained=False, inplace=True)
    layers = [module for module in fused.modules() if isinstance(module, FusedTSigmaBN2d)]
    if way == RECOVERY:
        for layer in layers[1:]:  # the first fans out, and keeps the one input that all tasks share
            layer.recover_input = layer.activation == "leaky_relu"
    if way == LATE:
        _fan_out_late(fused)
    return MultiTaskModel(fused, heads, recompute=way == RECOMPUTE)


def leak(network: nn.Module) -> None:
    """Puts leaky ReLUs in the place of ReLUs behind norms.

    The last ReLU of a residual block is behind a sum: PyTorch's leaky ReLU would keep that too, a ReLU does not.
    """
    behind_sums = {module.relu3 for module in network.modules() if isinstance(module, Bottleneck)}
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU) and child not in behind_sums:
                setattr(module, name, nn.LeakyReLU(SLOPE))


def _fan_out_late(fused: nn.Module) -> None:
    """SegNet parts its streams at the second convolution, in its weights; a residual network behind its pooling."""
    for module in fused.modules():
        if isinstance(module, SegNet):
            stage: Any = module.stages[0]
            stage.first[1] = LateFanOut.from_layer(stage.first[1], conv=stage.rest[0][0])
            stage.rest[0][0] = nn.Identity()
        elif isinstance(module, DilatedResNet):
            resnet: Any = module
            resnet.bn1 = LateFanOut.from_layer(resnet.bn1, pool=resnet.maxpool)
            resnet.maxpool = nn.Identity()


def gates_of(network: nn.Module) -> list[list[Tensor]]:
    """The raw gates of each layer, in their order: T of ``[C]``."""
    found: list[list[Tensor]] = []
    late = {module.norm for module in network.modules() if isinstance(module, LateFanOut)}
    for module in network.modules():
        if isinstance(module, LoopOfBatchNorms):
            found.append([norm.weight for norm in module.norms])  # type: ignore[misc]
        elif isinstance(module, (FusedTSigmaBN2d, LateFanOut)) and module not in late:
            found.append(list(module.weight))
    return found


def fill_gates(network: nn.Module, seed: int) -> None:
    """Draws the raw gates, the same for every way: such that the gates lie about one half."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for rows in gates_of(network):
            for row in rows:
                row.copy_(0.5 * torch.randn(row.shape, generator=generator, dtype=torch.double))
