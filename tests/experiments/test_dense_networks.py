"""SegNet and DeepLabV3, converted: the fused network is its loop of plain layers, with every way to spare memory."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from benchmarks.layers.peers import LoopOfBatchNorms
from experiments.dense_tasks.deeplab import Aspp, DilatedResNet, Enlarge, deeplab_head
from experiments.dense_tasks.segnet import SegNet, segnet_head
from experiments.dense_tasks.tasks import Depth, Normals, Segmentation, total_loss
from tsbn_kernels import FusedTSigmaBN2d, LateFanOut, MultiTaskModel, convert_model

pytestmark = pytest.mark.usefixtures("one_thread", "unpooling")

TASKS = {task.name: task for task in (Segmentation(13), Depth(), Normals())}
T, STEPS = len(TASKS), 20


class SharedAspp(nn.Sequential):
    """A backbone that ends in ASPP, whose pooled branch has norms of one position."""

    def __init__(self) -> None:
        super().__init__(DilatedResNet(2, (1, 1, 1, 1)), Aspp(64, 4, dropout=0.0))
        self.features = 4


def enlarged_head(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(segnet_head(inputs, outputs), Enlarge())


def deeplab_head_without_dropout(inputs: int, outputs: int) -> nn.Module:
    head = deeplab_head(inputs, outputs)
    for module in head.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # it would draw
    return head


# Rounding grows with the steps, and the faster, the fewer values are normalised: DeepLab has six images.
NETWORKS = {
    "segnet": (partial(SegNet, (3, 4, 4, 5, 5)), segnet_head, (2, 32, 64), 26),
    "deeplab": (partial(DilatedResNet, 4), deeplab_head_without_dropout, (6, 16, 24), 53),
    "shared aspp": (SharedAspp, enlarged_head, (2, 16, 24), 23),
}


class Loop(nn.Module):
    """The plain backbone with a loop of T BatchNorms for each of its own, run on T copies of the images."""

    def __init__(self, backbone: nn.Module, heads: dict[str, nn.Module], leaky: bool) -> None:
        super().__init__()
        self.backbone, self.heads = copy.deepcopy(backbone), nn.ModuleDict(heads)
        for name, module in list(self.backbone.named_modules()):
            parent, _, own = name.rpartition(".")
            if isinstance(module, nn.BatchNorm2d):
                loop = LoopOfBatchNorms(T, module.num_features).double()
                setattr(self.backbone.get_submodule(parent), own, loop)
            elif leaky and isinstance(module, nn.ReLU):
                setattr(self.backbone.get_submodule(parent), own, nn.LeakyReLU(0.1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        streams = self.backbone(images.repeat(T, 1, 1, 1)).chunk(T)
        return {name: head(stream) for (name, head), stream in zip(self.heads.items(), streams, strict=True)}


def leaky_copy(backbone: nn.Module) -> nn.Module:
    found = copy.deepcopy(backbone)
    for name, module in list(found.named_modules()):
        if isinstance(module, nn.ReLU):
            parent, _, own = name.rpartition(".")
            setattr(found.get_submodule(parent), own, nn.LeakyReLU(0.1))
    return found


def fan_out_late(backbone: nn.Module) -> None:
    """SegNet: at the second convolution, in its weights; ResNet: behind the first pooling."""
    if isinstance(backbone, SegNet):
        first, rest = backbone.stages[0].first, backbone.stages[0].rest
        first[1] = LateFanOut.from_layer(first[1], conv=rest[0][0])
        rest[0][0] = nn.Identity()
    else:
        resnet = backbone if isinstance(backbone, DilatedResNet) else backbone[0]
        resnet.bn1 = LateFanOut.from_layer(resnet.bn1, pool=resnet.maxpool)
        resnet.maxpool = nn.Identity()


WAYS = ["fused", "recompute", "leaky recovery", "late fan-out"]


def pair(network: str, way: str) -> tuple[Loop, MultiTaskModel, tuple[int, ...]]:
    make, make_head, size, count = NETWORKS[network]
    torch.manual_seed(0)
    backbone = make().double()
    heads = {name: make_head(backbone.features, task.outputs).double() for name, task in TASKS.items()}
    leaky = way == "leaky recovery"
    loop = Loop(backbone, copy.deepcopy(heads), leaky)
    fused = convert_model(leaky_copy(backbone) if leaky else backbone, T, pretrained=False)
    layers = [module for module in fused.modules() if isinstance(module, FusedTSigmaBN2d)]
    loops = [module for module in loop.modules() if isinstance(module, LoopOfBatchNorms)]
    assert len(layers) == len(loops) == count
    with torch.no_grad():
        for layer, norms in zip(layers, loops, strict=True):
            layer.weight.normal_()
            for row, norm in zip(layer.weight, norms.norms, strict=True):
                norm.weight.copy_(row)
    if leaky:
        for layer in layers[1:]:  # the first fans out
            layer.recover_input = layer.activation == "leaky_relu"
    if way == "late fan-out":
        fan_out_late(fused)
    return loop, MultiTaskModel(fused, heads, recompute=way == "recompute"), size


def samples(size: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=generator, dtype=torch.double)
    batch, *size = size
    labels = torch.randint(-1, 13, (batch, *size), generator=generator)
    normals = nn.functional.normalize(draw(batch, 3, *size), dim=1)
    return draw(batch, 3, *size), {"segmentation": labels, "depth": draw(batch, 1, *size).abs(), "normals": normals}


@pytest.mark.parametrize(
    ("network", "way"),
    [(network, "fused") for network in NETWORKS]
    + [(network, way) for way in WAYS[1:] for network in ("segnet", "shared aspp")],
)
def test_steps_are_those_of_the_loop(network, way):
    *networks, size = pair(network, way)
    losses = []
    for model in networks:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        images, truth = samples(size)
        losses.append([])
        for _ in range(STEPS if way == "fused" else 2):
            optimizer.zero_grad()
            loss = total_loss(TASKS, model(images), truth)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-8) and losses[0][-1] != losses[0][0]
    for model in networks:
        model.eval()
    with torch.no_grad():
        loop, fused = (model(images) for model in networks)
    for name in TASKS:
        assert (fused[name] - loop[name]).abs().max() < 1e-8 * loop[name].abs().max().clamp_min(1)
