"""SegNet and DeepLabV3, converted: the fused network is its loop of plain layers, with every way to spare memory."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from benchmarks.commands import app
from benchmarks.records.summary import Summary
from experiments.dense_tasks.deeplab import Aspp, DilatedResNet, Enlarge, deeplab_head
from experiments.dense_tasks.methods import Layout
from experiments.dense_tasks.segnet import SegNet, segnet_head
from experiments.dense_tasks.step_cost import NAMES, measured_step
from experiments.dense_tasks.tasks import Depth, Normals, Segmentation, total_loss
from experiments.dense_tasks.ways import FUSED, LOOP, RECOVERY, WAYS, fill_gates, gates_of, leak, task_specific
from experiments.training.step_cost import StepCost

pytestmark = pytest.mark.usefixtures("unpooling")

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


def pair(network: str, way: str) -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    """The loop of plain layers, and the fused network, with the same weights and gates."""
    make, make_head, size, count = NETWORKS[network]
    torch.manual_seed(0)
    backbone = make().double()
    heads = {name: make_head(backbone.features, task.outputs).double() for name, task in TASKS.items()}
    plain = copy.deepcopy(backbone)
    if way == RECOVERY:
        leak(plain)
    networks = task_specific(LOOP, plain, copy.deepcopy(heads)), task_specific(way, backbone, heads)
    for model in networks:
        assert len(gates_of(model)) == count
        fill_gates(model, 2)
    return *networks, size


def samples(size: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=generator, dtype=torch.double)
    batch, *size = size
    labels = torch.randint(-1, 13, (batch, *size), generator=generator)
    normals = nn.functional.normalize(draw(batch, 3, *size), dim=1)
    return draw(batch, 3, *size), {"segmentation": labels, "depth": draw(batch, 1, *size).abs(), "normals": normals}


@pytest.mark.parametrize(
    ("network", "way"),
    [(network, FUSED) for network in NETWORKS]
    + [(network, way) for way in WAYS[2:] for network in ("segnet", "shared aspp")],
)
def test_steps_are_those_of_the_loop(network, way):
    *networks, size = pair(network, way)
    losses = []
    for model in networks:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        images, truth = samples(size)
        losses.append([])
        for _ in range(STEPS if way == FUSED else 2):
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


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_everything_can_be_measured(name):
    step, parameters = measured_step(name, Layout("segnet", 1), (2, 32, 32), torch.device("cpu"))
    losses = [step().item() for _ in range(2)]
    assert losses[0] != losses[1] and all(map(math.isfinite, losses)) and parameters > 500


def test_the_command_shows_what_steps_cost(monkeypatch):
    asked = []

    def costs(*arguments):
        asked.append(arguments[1:3])
        return {"fused": StepCost(1234, Summary(0.5, 0.0, 1, 0, (0.5,)), 2**21)}

    monkeypatch.setattr("experiments.dense_tasks.step_command.step_costs", costs)
    monkeypatch.setattr("experiments.dense_tasks.step_command.norm_share", lambda *_: 0.25)
    invoke = partial(CliRunner().invoke, app.app)
    result = invoke(["dense-step", "--name", "fused", "--network", "deeplab", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert asked == [(["fused"], (Layout("deeplab", 8), (4, 192, 256)))]
    assert all(part in result.output for part in ("batch 4 of 192x256", "1,234", "500.0", "2 MiB", "25%"))
    refused = invoke(["dense-step", "--height", "40", "--device", "cpu"])
    assert refused.exit_code == 2 and "multiples of 32, got 40x256" in refused.output
