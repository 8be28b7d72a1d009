"""The example and the blocks of the tutorial run as they stand."""

from __future__ import annotations

import re
import runpy
from typing import Any

import pytest
import torch
from libmtl_stand_in import install
from support import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")


def test_quickstart_learns(capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "examples" / "quickstart.py"
    runpy.run_path(str(path))
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert len([line for line in path.read_text().splitlines() if line.strip()]) <= 32


def test_tutorial(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    install(monkeypatch)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), re.DOTALL)
    assert len(blocks) == 6
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/tutorial.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "FusedTSigmaBN2d(3, 16, " in printed
    assert "activation='relu')\nFusedActivation(ReLU())\n" in printed
    assert "[('base', 0.0003, 0.0001), ('gates', 0.03, 0.0)]" in printed
    shapes = {task: prediction.shape for task, prediction in names["predictions"].items()}
    assert shapes == dict.fromkeys(names["tasks"], torch.Size([8, 1]))
