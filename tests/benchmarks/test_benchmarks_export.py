"""The networks of single tasks, as they are measured."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from benchmarks.commands import app
from benchmarks.commands import export as command
from benchmarks.network.exported import HARD_SHARING, UNPRUNED, blocked_flops, chain_of, exported, network_of
from benchmarks.network.model import Layout
from benchmarks.timing.measure import Effort
from tsbn_kernels import Pruning, export_task

SMALL = Layout(1, (4, 4, 8, 8, 8, 8, 8))
EFFORT = Effort(1, 1, 0.0, 0.0)


def test_a_chain_is_one_task_of_the_network() -> None:
    network = network_of(3, SMALL)
    images = torch.randn(5, 1, 28, 28)
    with torch.no_grad():
        logits = network(images)
        for task in range(3):
            torch.testing.assert_close(export_task(chain_of(network, task), task)(images)[:, 0], logits[task])


def test_what_is_measured_is_what_was_exported() -> None:
    pytest.importorskip("torch_pruning")
    found = exported(
        network_of(3, SMALL), {0: "a", 2: "c"}, 28, EFFORT, lambda x: Pruning(x, amount=0.4, min_filters=1)
    )
    assert list(found) == ["a", "c", UNPRUNED, HARD_SHARING]
    full = found[UNPRUNED]
    assert max(found[name].parameters for name in "ac") < 0.8 * full.parameters
    assert max(found[name].flops for name in "ac") < full.flops < found[HARD_SHARING].flops
    ways = 9 * sum(a * b for a, b in zip((1, *SMALL.channels), SMALL.channels, strict=False)) + 2 * 8 * 8 + 8
    assert full.parameters == ways + sum(SMALL.channels) + 2 * 8 + 1  # weights, and biases of what was folded
    assert all(one.seconds[batch].median > 0 for one in found.values() for batch in (1, 64))


def test_operations_in_blocks() -> None:
    model = nn.Sequential(nn.Conv2d(3, 17, 3), nn.ReLU(), nn.Conv2d(17, 16, 1), nn.Conv2d(16, 5, 2))
    counts = 36 * 9 * 3 * 32 + 36 * 32 * 16 + 25 * 4 * 16 * 16
    assert blocked_flops(model, torch.randn(1, 3, 8, 8)) == 2 * counts


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    pytest.importorskip("torch_pruning")
    monkeypatch.setattr(command, "CELEBA", SMALL)
    monkeypatch.setattr(command, "QUICK_EFFORT", EFFORT)
    result = CliRunner().invoke(app.app, ["export", "--tasks", "2", "--quick", "--amount", "0.3"])
    assert result.exit_code == 0, result.output
    assert "task 1" in result.output and "batch 64: " in result.output and "median of 2 tasks" in result.output
    result = CliRunner().invoke(app.app, ["export", "--checkpoint", str(tmp_path / "none.pt")])
    assert result.exit_code == 1 and "is no checkpoint of a TS-sigma-BN network" in result.output
    result = CliRunner().invoke(app.app, ["export", "--amount", "2"])
    assert result.exit_code == 1 and "amount must be a share of the filters" in " ".join(result.output.split())
