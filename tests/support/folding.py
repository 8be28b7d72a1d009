"""Exported networks, and what they are compared with."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from support.networks import pretrained
from tsbn_kernels import (
    FusedTSigmaBN,
    convert_model,
    export_task,
    use_backend,
)

T, N = 3, 4
TASKS = ("age", "smile", "hat")
# Of outputs of a size near 1. A folded bfloat16 network rounds its weights once more and its activations once less.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 5e-2}


def randomise(model: nn.Module) -> Any:
    """Tasks that differ, and normalisation that matters."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, (FusedTSigmaBN, _BatchNorm)):
                layer.weight.normal_(0.7, 0.4)
                layer.running_mean.normal_(0, 0.2)
                layer.running_var.uniform_(0.5, 1.5)
                if layer.bias is not None:
                    layer.bias.uniform_(0.0, 0.5)
    return model.eval()


def converted(name: str, dtype: torch.dtype = torch.float32, variant: Any = "ts_sigma_bn") -> Any:
    return randomise(convert_model(pretrained(name, dtype), T, variant=variant))


def export(model: nn.Module, task: int | str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return export_task(model, task)


def stream_of(model: nn.Module, x: Tensor, task: int) -> Tensor:
    """What a converted model gives for one task, with the other streams holding other numbers."""
    streams = [x if t == task else torch.randn_like(x) for t in range(T)]
    with torch.no_grad(), use_backend("reference"):
        return model(torch.cat(streams)).chunk(T)[task]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCES[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * max(1.0, expected.abs().max().item()))


def normalisations(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, (FusedTSigmaBN, _BatchNorm))]
