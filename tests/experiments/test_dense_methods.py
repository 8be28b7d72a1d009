"""The methods of dense tasks: their sizes as the papers have them, and what their networks compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from experiments.dense_tasks.methods import MAKERS, NETWORKS, Layout, make_network, sizes
from experiments.dense_tasks.mtan import MtanSegNet
from experiments.dense_tasks.tasks import Depth, Normals, Segmentation
from experiments.training.cross_stitch import CrossStitch
from experiments.training.run import optimizer_of
from tsbn_kernels import FusedTSigmaBN2d

pytestmark = pytest.mark.usefixtures("unpooling")

TASKS = {task.name: task for task in (Segmentation(13), Depth(), Normals())}
LAYOUTS = {"segnet": Layout("segnet", 2), "deeplab": Layout("deeplab", 1)}
NYUV2 = (288, 384)


def test_parameters_and_operations_of_segnet_are_those_of_the_papers():
    found = sizes(list(MAKERS), TASKS, Layout("segnet", 64), NYUV2)
    single = found["single_task"].parameters / 3
    # SegNet with the head of 13 classes: what the authors of MTAN count as one.
    heads = [37_773, 36_993, 37_123]  # 64 * 64 * 9 + 64, and 65 times the outputs
    assert single == pytest.approx(24_981_069 - heads[0] + sum(heads) / 3, abs=1)
    assert {name: size.relative(found["single_task"], 3) for name, size in found.items()} == {
        "single_task": ("3.00", "3.00"),
        "hard_sharing": ("1.00", "1.14"),
        "cross_stitch": ("3.00", "3.00"),  # a network for each task
        "mtan": ("1.77", "3.58"),  # 1.77 is of MTAN's first table
        "tsbn": ("1.00", "2.99"),
        "ts_sigma_bn": ("1.00", "2.99"),
    }
    assert found["cross_stitch"].parameters == found["single_task"].parameters + 9 * 9
    gates = found["ts_sigma_bn"].parameters - found["hard_sharing"].parameters
    norms = make_network("hard_sharing", TASKS, Layout("segnet", 64)).modules()
    channels = sum(norm.num_features for norm in norms if isinstance(norm, nn.BatchNorm2d))
    assert gates == 3 * channels - 2 * channels  # gates of three tasks in the place of weight and bias
    assert found["tsbn"].parameters - found["hard_sharing"].parameters == 2 * (3 - 1) * channels
    operations = {name: size.operations for name, size in found.items()}
    # Of pictures of 9x12, enlarged: what leaves the stages of the encoder, and those of the decoder but the last.
    values = 9 * 12 * (512 + 2 * sum(channels * 4**level for level, channels in enumerate((512, 256, 128, 64), 1)))
    assert operations["cross_stitch"] == operations["single_task"] + 2 * 3 * 3 * values  # the units, 3x3
    assert operations["ts_sigma_bn"] == operations["tsbn"]
    assert 0.97 < operations["ts_sigma_bn"] / operations["single_task"] < 1  # the first convolution runs once


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", MAKERS)
def test_every_network_predicts_all_tasks_and_learns(network, method):
    torch.manual_seed(0)
    model = make_network(method, TASKS, LAYOUTS[network])
    optimizer = optimizer_of(model, 1e-3, 1.0)
    images = torch.randn(2, 3, 32, 64)
    predictions = model(images)
    assert {name: tuple(found.shape) for name, found in predictions.items()} == {
        "segmentation": (2, 13, 32, 64),
        "depth": (2, 1, 32, 64),
        "normals": (2, 3, 32, 64),
    }
    sum((found * torch.randn_like(found)).sum() for found in predictions.values()).backward()
    optimizer.step()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing  # nothing is made that is not used
    layers = [module for module in model.modules() if isinstance(module, FusedTSigmaBN2d)]
    assert len(layers) == ((26 if network == "segnet" else 53) if method in ("tsbn", "ts_sigma_bn") else 0)


def test_cross_stitch_with_units_of_one_is_single_task_and_mixes_else():
    torch.manual_seed(0)
    stitched = make_network("cross_stitch", TASKS, LAYOUTS["segnet"]).double()
    assert isinstance(stitched, CrossStitch)
    assert stitched.units.sum(2).allclose(torch.ones(1, dtype=torch.double))
    single = make_network("single_task", TASKS, LAYOUTS["segnet"]).double()
    for name, backbone in zip(TASKS, stitched.backbones, strict=True):
        single.backbones[name].load_state_dict(backbone.state_dict())
        single.heads[name].load_state_dict(stitched.heads[name].state_dict())
    images = torch.randn(2, 3, 32, 64, dtype=torch.double)
    expected = single(images)
    assert not stitched(images)["depth"].allclose(expected["depth"])
    with torch.no_grad():
        stitched.units.copy_(torch.eye(3))
    for name, found in stitched(images).items():
        torch.testing.assert_close(found, expected[name])
    with torch.no_grad():  # depth goes on with what segmentation has, behind the first stage
        stitched.units[0, 1] = torch.tensor([1.0, 0.0, 0.0])
    changed = stitched(images)
    assert not changed["depth"].allclose(expected["depth"])
    assert changed["segmentation"].allclose(expected["segmentation"])


def test_an_open_mask_of_mtan_lets_the_last_features_pass():
    torch.manual_seed(0)
    model = make_network("mtan", TASKS, LAYOUTS["segnet"])
    assert isinstance(model, MtanSegNet)
    with torch.no_grad():
        for mask in model.up_masks["depth"]:
            nn.init.zeros_(mask[4].weight)
            nn.init.constant_(mask[4].bias, 50.0)  # a sigmoid of one
    images = torch.randn(2, 3, 32, 64)
    expected = model.heads["depth"](model.backbone(images))
    torch.testing.assert_close(model(images)["depth"], expected)
    assert not model(images)["normals"].allclose(model.heads["normals"](model.backbone(images)))
