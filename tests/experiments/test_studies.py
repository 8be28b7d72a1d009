"""The studies of gates: on a few images and narrow networks."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("mlxtend")

from benchmarks.commands import app
from benchmarks.network.data import Splits
from benchmarks.network.model import Layout
from experiments.forty_tasks import studies, summary
from experiments.forty_tasks.studies import Corrupted

TINY = Layout(1, (2, 2, 2, 2, 2, 2, 4))


@cache
def few_digits(_folder: Path) -> Splits:
    from experiments.forty_tasks.digits import digits40

    splits = digits40()
    parts = (
        torch.utils.data.Subset(part, range(0, len(part), 60))
        for part in (splits.train, splits.validation, splits.test)
    )
    return Splits(*parts, splits.tasks, splits.source)


@pytest.fixture
def invoke(monkeypatch, tmp_path, one_thread):
    monkeypatch.chdir(tmp_path)
    tiny = summary.Dataset(few_digits, False, {"cnn": TINY}, epochs=1, batch=20, lr=1e-2)
    monkeypatch.setitem(summary.DATASETS, "digits40", tiny)
    monkeypatch.setattr(studies, "STEPS", 1)
    return lambda *arguments: CliRunner().invoke(app.app, ["study", *arguments, "--device", "cpu", "--output", "out"])


def test_a_share_of_one_tasks_labels_is_drawn_anew() -> None:
    images = [(torch.zeros(1), torch.full((3,), float(index % 2))) for index in range(400)]
    for share in (0.0, 0.5, 1.0):
        labels = torch.stack([each[1] for each in Corrupted(images, 1, share)])
        clean = torch.stack([each[1] for each in images])
        assert torch.equal(labels[:, [0, 2]], clean[:, [0, 2]])
        assert float((labels[:, 1] != clean[:, 1]).double().mean()) == pytest.approx(share / 2, abs=0.06)
        assert torch.equal(labels, torch.stack([each[1] for each in Corrupted(images, 1, share)]))
    assert float(torch.stack([each[1] for each in images])[:, 1].mean()) == 0.5  # the images are left alone


@pytest.mark.parametrize(
    ("name", "says", "file"),
    [
        ("stability", "stability of 2 seeds: ", "report.html"),
        ("pruning", "drop of F1 in points: own ", "drops.png"),
        ("conflicts", "hard_sharing: mean cosine ", "conflicts.png"),
    ],
)
def test_studies_measure_what_they_train(invoke, tmp_path, name: str, says: str, file: str) -> None:
    result = invoke(name, "--seeds", "2" if name == "stability" else "1")
    assert result.exit_code == 0, result.output
    assert says in result.output
    assert (tmp_path / "out" / file).stat().st_size > 1000


def test_nothing_is_trained_twice(invoke, monkeypatch) -> None:
    result = invoke("noise", "--seeds", "1")
    assert "100% of zero's labels at random: cosine with others " in result.output
    monkeypatch.setattr("experiments.forty_tasks.train_run.train_step", None)
    again = invoke("noise", "--seeds", "1")
    assert again.exit_code == 0, again.output
    assert again.output == result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["magic"], "unknown 'magic'; known are stability, pruning"),
        (["noise", "--task", "eleven"], "unknown 'eleven'; tasks are zero"),
        (["noise", "--data", "."], "digits40 takes no folder"),
    ],
)
def test_bad_options_are_refused(invoke, arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
