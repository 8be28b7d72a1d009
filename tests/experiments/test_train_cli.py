"""The training command, from options to tables, files and exit status."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from PIL import Image
from support.celeba_folder import TORCHVISION, write_celeba
from typer.testing import CliRunner

pytest.importorskip("mlxtend")

from benchmarks.commands import app
from benchmarks.network.data import Splits
from benchmarks.network.model import Layout
from benchmarks.records.summary import Summary
from benchmarks.timing.measure import Effort
from experiments.forty_tasks import command
from experiments.forty_tasks import summary as study
from experiments.forty_tasks.summary import MethodScores, summaries, verdict
from experiments.forty_tasks.transformer import TransformerLayout
from experiments.training.step_cost import StepCost

TINY = Layout(1, (2, 2, 2, 2, 2, 2, 4))
TINY_TRANSFORMER = TransformerLayout(inputs=1, patch=14, tokens=4, width=4, heads=1, depth=1)
METHODS = "single_task", "hard_sharing", "ts_sigma_bn"
NAMES = ["single_task", "hard_sharing", "ts_sigma_bn x1", "ts_sigma_bn x100"]


@cache
def few_digits(_folder) -> Splits:
    from experiments.forty_tasks.digits import digits40

    splits = digits40()
    parts = (
        torch.utils.data.Subset(part, range(0, len(part), 40))
        for part in (splits.train, splits.validation, splits.test)
    )
    return Splits(*parts, splits.tasks, splits.source)


@pytest.fixture
def invoke(monkeypatch, tmp_path):
    """Runs the command on a few images with narrow networks, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "COST_EFFORT", Effort(2, 2, 0.0, 0.0))
    tiny = study.Dataset(few_digits, False, {"cnn": TINY, "transformer": TINY_TRANSFORMER}, epochs=2, batch=25, lr=1e-2)
    monkeypatch.setitem(study.DATASETS, "digits40", tiny)
    return lambda *arguments: CliRunner().invoke(app.app, ["train", "--device", "cpu", *arguments])


@pytest.fixture
def no_costs(monkeypatch):
    """Leaves out the step's time and memory, which take a process for each method."""
    cost = StepCost(1, Summary(1.0, 0.0, 1, 0, (1.0,)), 1)
    monkeypatch.setattr(command, "step_costs", lambda methods, *_: dict.fromkeys([*methods, "loop"], cost))


def test_methods_train_and_results_and_pictures_are_written(invoke, tmp_path):
    methods = [part for name in METHODS for part in ("--method", name)]
    result = invoke(*methods, "--seeds", "2", "--multiplier", "1", "--multiplier", "100", "--output", "out")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [summary["name"] for summary in found["summaries"]] == NAMES
    assert len(found["runs"]) == 2 * len(NAMES) and len(found["tasks"]) == 40
    for one in found["runs"]:
        assert len(one["history"]) == 2 and len(one["test_f1"]) == 40 and one["best_epoch"] in (1, 2)
        assert one["mean_test_f1"] == pytest.approx(sum(one["test_f1"]) / 40)
        best = max(one["history"], key=lambda epoch: sum(epoch["validation_f1"]))
        assert best is one["history"][one["best_epoch"] - 1]
    assert set(found["costs"]) == set(found["sizes"]) == {*METHODS, "loop"}
    for name, cost in found["costs"].items():
        assert cost["step"]["median"] > 0 and 0 < cost["peak_bytes"] < 2**30
        assert cost["parameters"] == found["sizes"][name]["parameters"]
    assert found["sizes"]["loop"] == found["sizes"]["ts_sigma_bn"]
    assert {path.name for path in (tmp_path / "out").glob("*.pt")} == {
        f"{name.replace(' ', '-')}-seed{seed}.pt" for name in NAMES for seed in (0, 1)
    }
    for picture in ("learning_curves.png", "gates.png"):
        with Image.open(tmp_path / "out" / picture) as image:
            assert image.width > 600 and len(image.convert("RGB").getcolors(1 << 24) or ()) > 10  # not blank
    text = " ".join(result.output.replace("│", " ").split())
    for part in (
        "40 tasks, 75 samples to train on, 25 to validate, 25 to test; 8 runs",
        "delta_m%",
        "40.00 40.00",  # #P and #F of single tasks
        "x as fast as by",
    ):
        assert part in text


def test_resume_trains_nothing_twice_and_refuses_other_settings(invoke, no_costs, monkeypatch, tmp_path):
    arguments = "--seeds", "1", "--method", "hard_sharing", "--output", "out"
    assert invoke(*arguments).exit_code == 0
    first = (tmp_path / "out" / "results.json").read_text()
    with monkeypatch.context() as patch:
        patch.setattr("experiments.training.run.Run._epoch", None)
        again = invoke(*arguments, "--resume", "--json", "again.json")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again.json").read_text() == first
    result = invoke(*arguments, "--resume", "--lr", "0.5")
    assert result.exit_code == 1
    assert "hard_sharing-seed0.pt was trained with lr 0.01 (now 0.5)" in result.output


def test_an_interrupted_run_says_how_to_go_on(invoke, no_costs, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.training.run.Run._epoch", interrupted)
    result = invoke("--method", "hard_sharing")
    assert result.exit_code == 1
    assert "the same command with --resume goes on from the checkpoints in results/train" in result.output


def test_quick_is_one_epoch_of_one_seed(invoke, no_costs, tmp_path):
    result = invoke("--quick", "--method", "tsbn", "--tsbn-multiplier", "10")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "results" / "train" / "results.json").read_text())
    assert [(one["method"], one["multiplier"], one["seed"], one["epochs"]) for one in found["runs"]] == [
        ("tsbn", 10, 0, 1)
    ]
    assert [summary["delta_m"] for summary in found["summaries"]] == [None]


def test_a_transformer_trains_by_its_methods(invoke, no_costs, tmp_path):
    result = invoke(
        "--network", "transformer", "--seeds", "2", "--multiplier", "10", "--epochs", "1", "--output", "out"
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [summary["name"] for summary in found["summaries"]] == ["hard_sharing", "tsln x1", "ts_sigma_ln x10"]
    assert set(found["costs"]) == {"hard_sharing", "tsln", "ts_sigma_ln", "loop"}
    text = " ".join(result.output.split())
    assert "a step of ts_sigma_ln is" in text
    assert "the mean F1 of ts_sigma_ln x10 is" in text
    assert (tmp_path / "out" / "gates.png").exists()
    state = torch.load(tmp_path / "out" / "ts_sigma_ln-x10-seed1.pt", weights_only=True)
    assert state["settings"]["layout"]["patch"] == 14


def test_celeba_trains_from_its_folder(invoke, no_costs, monkeypatch, tmp_path):
    celeba = study.DATASETS["celeba"]
    layout = Layout(3, TINY.channels)
    monkeypatch.setitem(study.DATASETS, "celeba", study.Dataset(celeba.load, True, {"cnn": layout}, 1, 2, 1e-3))
    write_celeba(tmp_path / "faces", TORCHVISION, ("red", "green", "blue", "white"), (0, 0, 1, 2))
    methods = [part for name in ("ts_sigma_bn", "mtan", "cross_stitch") for part in ("--method", name)]
    options = "--dataset", "celeba", "--data", "faces", *methods, "--seeds", "1", "--workers", "1"
    result = invoke(*options)
    assert result.exit_code == 0, result.output
    assert "CelebA in faces: 3 tasks, 2 samples to train on, 1 to validate, 1 to test; 6 runs" in result.output
    (tmp_path / "faces" / TORCHVISION[2]).unlink()
    result = invoke(*options)
    assert result.exit_code == 1
    assert "CelebA in faces is not complete: faces/list_eval_partition.txt is missing" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "mnist"], "unknown 'mnist'; known are digits40, celeba, words24"),
        (["--network", "vgg"], "unknown 'vgg'; known are cnn, transformer"),
        (["--network", "transformer", "--method", "tsbn"], "unknown 'tsbn'; known are hard_sharing, tsln, ts_sigma_ln"),
        (["--dataset", "celeba"], "celeba needs the folder of its files"),
        (["--data", "."], "digits40 takes no folder"),
        (["--method", "magic"], "unknown 'magic'; known are single_task, hard_sharing"),
        (["--multiplier", "0"], "a multiplier must be above 0, got 0"),
        (["--batch", "100"], "has 75 training samples, fewer than a batch of 100"),
        (["--device", "toaster"], "device 'toaster' cannot be used here"),
    ],
)
def test_bad_options_are_refused(invoke, arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def summary(name: str, *f1: float) -> MethodScores:
    return MethodScores(name, name.partition(" x")[0], 1.0, f1, (), None, (), None)


def test_the_verdict_is_against_the_larger_spread():
    found = {one.name: one for one in (summary("hard_sharing", 0.5, 0.6), summary("ts_sigma_bn x100", 0.67, 0.69))}
    outcome = verdict(found)
    assert (outcome.difference, outcome.spread) == pytest.approx((0.13, 0.1))
    assert outcome.holds
    found["ts_sigma_bn x100"] = summary("ts_sigma_bn x100", 0.64, 0.65)
    assert not verdict(found).holds
    assert verdict({}) is None
    found["ts_sigma_bn x100"] = summary("ts_sigma_bn x100", 0.9)
    assert verdict(found) is None


def test_summaries_are_of_the_seeds():
    from experiments.forty_tasks.train_run import Fit
    from experiments.training.run import Settings

    def fit(method: str, seed: int, test_f1: tuple[float, ...], gates=None) -> Fit:
        settings = Settings("", (1, 1, 1), TINY, method, 1.0, seed, 1, 2, 1.0)
        return Fit(settings, [], 0, test_f1, gates)

    fits = [
        fit("single_task", 0, (0.4, 0.8)),
        fit("ts_sigma_bn", 0, (0.5, 0.8), torch.tensor([[0.0, 0.5], [0.5, 1.0]])),
        fit("single_task", 1, (0.6, 0.8)),
        fit("ts_sigma_bn", 1, (0.7, 0.8), torch.full((2, 2), 0.5)),
    ]
    found = summaries(fits)
    assert found["single_task"].delta_m == 0 and found["single_task"].gates is None
    ours = found["ts_sigma_bn x1"]
    assert ours.task_f1 == pytest.approx((0.6, 0.8)) and ours.f1 == pytest.approx((0.65, 0.75))
    assert ours.delta_m == pytest.approx(100 * (0.1 / 0.5) / 2)
    assert (ours.gates.mean, ours.gates.nearly_binary) == (0.5, 0.25)
    assert ours.gates.quartiles == (0.5, 0.5, 0.5)
