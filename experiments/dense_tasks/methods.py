"""The methods that dense tasks are trained by: networks of one layout that give the predictions of all tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from experiments.dense_tasks.deeplab import DilatedResNet, deeplab_head
from experiments.dense_tasks.mtan import MtanResNet, MtanSegNet
from experiments.dense_tasks.segnet import SEGNET, SegNet, segnet_head
from experiments.dense_tasks.tasks import Task
from experiments.training.cross_stitch import CrossStitch
from experiments.training.methods import (
    CROSS_STITCH,
    HARD_SHARING,
    MTAN,
    SINGLE_TASK,
    TS_SIGMA_BN,
    TSBN,
)
from experiments.training.sizes import Size, size_of
from tsbn_kernels import MultiTaskModel, convert_model

Heads = dict[str, nn.Module]
NETWORKS = "segnet", "deeplab"


@dataclass(frozen=True)
class Layout:
    """The network: one of :data:`NETWORKS`, and channels of its first layer, 64 as in the paper."""

    network: str
    width: int


def make_backbone(layout: Layout) -> SegNet | DilatedResNet:
    """The plain backbone."""
    if layout.network == "segnet":
        return SegNet([max(1, layout.width * channels // SEGNET[0]) for channels in SEGNET])
    return DilatedResNet(layout.width)


def make_heads(tasks: Mapping[str, Task], layout: Layout, features: int) -> Heads:
    """A head for each task, of a backbone with so many channels."""
    make = segnet_head if layout.network == "segnet" else deeplab_head
    return {name: make(features, task.outputs) for name, task in tasks.items()}


class SingleTasks(nn.Module):
    """T networks that share nothing."""

    def __init__(self, backbones: Mapping[str, nn.Module], heads: Heads) -> None:
        super().__init__()
        self.backbones, self.heads = nn.ModuleDict(backbones), nn.ModuleDict(heads)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {name: head(self.backbones[name](images)) for name, head in self.heads.items()}


class HardSharing(nn.Module):
    """One backbone for all heads."""

    def __init__(self, backbone: nn.Module, heads: Heads) -> None:
        super().__init__()
        self.backbone, self.heads = backbone, nn.ModuleDict(heads)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.backbone(images)
        return {name: head(features) for name, head in self.heads.items()}


def _single_tasks(tasks: Mapping[str, Task], layout: Layout) -> nn.Module:
    backbones = {name: make_backbone(layout) for name in tasks}
    return SingleTasks(backbones, make_heads(tasks, layout, next(iter(backbones.values())).features))


def _hard_sharing(tasks: Mapping[str, Task], layout: Layout) -> nn.Module:
    backbone = make_backbone(layout)
    return HardSharing(backbone, make_heads(tasks, layout, backbone.features))


def _task_specific(variant: Literal["ts_sigma_bn", "tsbn"]) -> Callable[[Mapping[str, Task], Layout], nn.Module]:
    def make(tasks: Mapping[str, Task], layout: Layout) -> nn.Module:
        backbone = make_backbone(layout)
        converted = convert_model(backbone, len(tasks), variant=variant, pretrained=False)
        return MultiTaskModel(converted, make_heads(tasks, layout, backbone.features))

    return make


def _cross_stitch(tasks: Mapping[str, Task], layout: Layout) -> nn.Module:
    backbones = [make_backbone(layout) for _ in tasks]
    return CrossStitch(backbones, make_heads(tasks, layout, backbones[0].features))


def _mtan(tasks: Mapping[str, Task], layout: Layout) -> nn.Module:
    backbone = make_backbone(layout)
    heads = make_heads(tasks, layout, backbone.features)
    return MtanSegNet(backbone, heads) if isinstance(backbone, SegNet) else MtanResNet(backbone, heads)


MAKERS: dict[str, Callable[[Mapping[str, Task], Layout], nn.Module]] = {
    SINGLE_TASK: _single_tasks,
    HARD_SHARING: _hard_sharing,
    CROSS_STITCH: _cross_stitch,
    MTAN: _mtan,
    TSBN: _task_specific("tsbn"),
    TS_SIGMA_BN: _task_specific("ts_sigma_bn"),
}


def make_network(method: str, tasks: Mapping[str, Task], layout: Layout) -> nn.Module:
    """The network of a method: predictions by the tasks' names of images ``[N, 3, H, W]``."""
    return MAKERS[method](tasks, layout)


def sizes(methods: Sequence[str], tasks: Mapping[str, Task], layout: Layout, size: tuple[int, int]) -> dict[str, Size]:
    """The size of each method's network for pictures of this height and width."""
    image = torch.empty(1, 3, *size, device="meta")
    return {method: size_of(partial(make_network, method, tasks, layout), image) for method in methods}
