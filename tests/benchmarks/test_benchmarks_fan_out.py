"""The comparison of fanning out with expanding first."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.commands import app
from benchmarks.layers import fan_out
from benchmarks.layers.verify import MismatchError
from benchmarks.timing.measure import Effort

CPU = torch.device("cpu")


def test_what_is_kept_is_one_stream():
    tasks = 5
    one = fan_out.fan_out_times(tasks, 2, "bfloat16", "contiguous", CPU, Effort(1, 1))
    assert one.stream_bytes == tasks * 2 * 64 * 64 * 64 * 2
    vectors = 3 * tasks * 64 * 4  # weight, mean and variance; there is no bias
    assert one.saved_bytes["fan-out"] == one.stream_bytes // tasks + vectors
    assert one.speedup(1) > 0
    assert one.copies("expand", 0) > 0


def test_a_wrong_result_is_not_timed(monkeypatch):
    plain = fan_out.FusedTSigmaBN2d.forward

    def wrong(self, x, **options):
        return plain(self, x, **options) * (1.1 if options else 1.0)

    monkeypatch.setattr(fan_out.FusedTSigmaBN2d, "forward", wrong)
    with pytest.raises(MismatchError, match="fan-out is wrong: y in float32"):
        fan_out.fan_out_times(3, 2, "float32", "contiguous", CPU, Effort(1, 1))


def test_the_command():
    result = CliRunner().invoke(app.app, ["fan-out", "--tasks", "3", "--batch", "2", "--quick", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "expand" in result.output
