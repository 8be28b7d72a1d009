"""Other people's tools on these layers: docs/tools.md has a row for each, and a test here."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tsbn_kernels import FusedTSigmaBN1d, FusedTSigmaBN2d, convert_model

T, N, C = 3, 4, 5


def network() -> nn.Sequential:
    """A task-specific layer, a plain one, and one inside."""
    return nn.Sequential(FusedTSigmaBN2d(T, C), nn.BatchNorm2d(C), nn.Sequential(FusedTSigmaBN1d(T, C, bias=True)))


# ---- synchronised statistics ---------------------------------------------------------------------------------------


def test_pytorch_synchronises_task_specific_layers_and_plain_ones() -> None:
    model = network()
    before = copy.deepcopy(model)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert [type(layer) for layer in converted[:2]] == [FusedTSigmaBN2d, nn.SyncBatchNorm]
    assert converted[0] is model[0]
    assert converted[0].process_group == converted[2][0].process_group == "world"
    assert converted.state_dict().keys() == before.state_dict().keys()
    x = torch.randn(T * N, C, 3, 3)
    torch.testing.assert_close(converted[:2].eval()(x), before[:2].eval()(x))
    layer = FusedTSigmaBN2d(T, C)
    assert nn.SyncBatchNorm.convert_sync_batchnorm(layer) is layer


def test_importing_changes_no_other_conversion() -> None:
    class Other(nn.BatchNorm2d):
        pass

    class Synchronised(nn.SyncBatchNorm):
        pass

    for plain in (Other(C), nn.BatchNorm2d(C, affine=False), nn.BatchNorm3d(C, track_running_stats=False)):
        for conversion in (nn.SyncBatchNorm, Synchronised):
            converted: Any = conversion.convert_sync_batchnorm(plain, process_group="any")
            assert type(converted) is nn.SyncBatchNorm
            assert converted.process_group == "any"
            assert converted.weight is plain.weight
            assert converted.running_mean is plain.running_mean
    linear = nn.Linear(2, 2)
    assert nn.SyncBatchNorm.convert_sync_batchnorm(linear) is linear
    assert nn.SyncBatchNorm.convert_sync_batchnorm.__doc__.startswith("Converts all")


def test_a_layer_that_cannot_be_synchronised_says_so() -> None:
    with pytest.raises(ValueError, match="has recover_input=True, which does not work with a process_group"):
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(FusedTSigmaBN2d(T, C, recover_input=True)))


def convert_sync_batchnorm(module: Any, process_group: Any = None) -> Any:
    """As timm's, which has a loop of its own."""
    output = module
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        output = nn.SyncBatchNorm(
            module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats, process_group
        )
        if module.affine:
            output.weight, output.bias = module.weight, module.bias
    for name, child in module.named_children():
        output.add_module(name, convert_sync_batchnorm(child, process_group))
    return output


@pytest.mark.parametrize("num_tasks", [1, T])
@pytest.mark.parametrize("whose", ["a user's", "timm's"])
def test_conversions_of_others_are_refused_with_the_remedy(whose: str, num_tasks: int) -> None:
    """Of one task the sizes would fit, and the sigmoid be lost in silence."""
    model = convert_model(nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C)), num_tasks, pretrained=False)
    timms = whose == "timm's"
    conversion = pytest.importorskip("timm.layers").convert_sync_batchnorm if timms else convert_sync_batchnorm
    with pytest.raises(TypeError, match=r"call torch.nn.SyncBatchNorm.convert_sync_batchnorm\(model\)"):
        conversion(model)
    assert type(model[1]) is FusedTSigmaBN2d
    assert model[1].affine
