"""Layer normalisation, on every device and backend, against the definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.layer_problems import LayerProblem, LayerResults, assert_matches_definition, layer_problem, run
from support.tolerances import assert_same_bits

from on_gpu.rows import calls, moved
from tsbn_kernels.backends.plan.layer_norm import MOST
from tsbn_kernels.operator import layer_ops


def on_device(p: LayerProblem, by: str, device: str) -> LayerResults:
    """What a backend computes, on the CPU."""
    there = moved(p, lambda tensor: tensor.to(device))
    return LayerResults(*(found.cpu() for found in run(there, layer_ops.flat(layer_ops.operators(by)))))


@pytest.mark.parametrize("options", [pytest.param(options, id=name) for name, options in calls()])
def test_rows(device: str, by: str, options: dict[str, Any]) -> None:
    p = layer_problem(**options)
    if by in ("triton", "cuda") and p.weight[0].numel() > (MOST // 2 if p.x.dtype == torch.float64 else MOST):
        with pytest.raises(ValueError, match="longer than"):  # left to the reference where no backend is chosen
            on_device(p, by, device)
        return
    found = on_device(p, by, device)
    assert_matches_definition(p, found)
    for again, first in zip(on_device(p, by, device), found, strict=True):
        assert_same_bits(again, first)


@pytest.mark.parametrize("name", ["y", "rstd", "dx", "dweight", "dbias"])
def test_what_is_wrong_is_found(name: str) -> None:
    p = layer_problem(dtype=torch.float32)
    found = run(p)
    wrong = getattr(found, name) * (1 + 4e-5) + 4e-5
    with pytest.raises(AssertionError, match=r"out of bounds|relative error"):
        assert_matches_definition(p, found._replace(**{name: wrong}))
