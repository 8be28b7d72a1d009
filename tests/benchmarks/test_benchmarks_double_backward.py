"""The comparison of second derivatives."""

from __future__ import annotations

from typer.testing import CliRunner

from benchmarks.commands import app
from benchmarks.layers import peers


def test_the_command():
    shapes = ["--shape", "2x2,3,4,4", "--shape", "2x2,3,16"]
    result = CliRunner().invoke(app.app, ["double-backward", "--quick", "--device", "cpu", *shapes])
    assert result.exit_code == 0, result.output
    assert result.output.count("fused") == 3 * 4  # two memory formats and none, of four dtypes


def test_a_wrong_result_is_not_timed(monkeypatch):
    plain = peers.FusedTSigmaBN2d.forward
    monkeypatch.setattr(peers.FusedTSigmaBN2d, "forward", lambda self, x: plain(self, x) * 1.1)
    result = CliRunner().invoke(app.app, ["double-backward", "--quick", "--device", "cpu", "--shape", "2x2,3,4,4"])
    assert result.exit_code == 1
    assert "differs by" in result.output
