"""A run of dense tasks goes on as if it had not been killed; the command, from options to tables and pictures."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from functools import cache

import pytest
import torch
from PIL import Image
from test_dense_data import write
from typer.testing import CliRunner

from benchmarks.commands import app
from experiments.dense_tasks import summary as study
from experiments.dense_tasks.data import DenseData, rooms
from experiments.dense_tasks.methods import Layout
from experiments.dense_tasks.summary import change, summaries
from experiments.dense_tasks.train_run import DenseEpoch, DenseFit, DenseRun, DenseSettings
from experiments.training.run import ResumeError

pytestmark = pytest.mark.usefixtures("unpooling")

CPU = torch.device("cpu")
SETTINGS = DenseSettings(
    "rooms", (4, 2), Layout("segnet", 1), "ts_sigma_bn", 100.0, 0, 3, 2, 1e-2, halve=2, crops=True, amp="float32"
)


@cache
def few_rooms() -> DenseData:
    return rooms(4, 2, 32, 64, lambda _: None)


def run(path, settings: DenseSettings = SETTINGS, **options) -> DenseRun:
    return DenseRun(settings, few_rooms(), CPU, path, **options)


class KilledError(Exception):
    pass


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path):
    whole = run(tmp_path / "whole.pt")
    rates = []
    whole.run(lambda *_: rates.append(whole.optimizer.param_groups[0]["lr"]))
    assert rates == [1e-2] * 4 + [5e-3] * 2  # halved after two epochs of two steps

    def kill(epoch: int, share: float, *_: object) -> None:
        if (epoch, share) >= (1, 0.5):
            raise KilledError

    with pytest.raises(KilledError):
        run(tmp_path / "parts.pt").run(kill)
    torch.manual_seed(9)
    resumed = run(tmp_path / "parts.pt", resume=True)
    assert len(resumed.fit.history) == 1
    resumed.run()
    assert resumed.fit.history == whole.fit.history
    state = resumed.network.state_dict()
    assert all(state[name].equal(tensor) for name, tensor in whole.network.state_dict().items())
    with pytest.raises(ResumeError, match=r"parts\.pt was trained with halve 2 \(now 1\)"):
        run(tmp_path / "parts.pt", replace(SETTINGS, halve=1), resume=True)


def test_it_learns_and_autocast_is_near(tmp_path):
    settings = replace(SETTINGS, crops=False, epochs=6, halve=6)
    exact = run(tmp_path / "exact.pt", settings).run()
    assert exact.history[-1].loss < 0.9 * exact.history[0].loss
    half = run(tmp_path / "half.pt", replace(settings, amp="bfloat16", epochs=1)).run()
    assert half.history[0].loss == pytest.approx(exact.history[0].loss, rel=0.05)
    assert half.history[0].loss != exact.history[0].loss


def test_the_last_epochs_are_reported_and_compared_with_single_tasks():
    tasks = few_rooms().tasks

    def fit(method: str, seed: int, miou: float, error: float) -> DenseFit:
        scores = {"segmentation": [miou, 0.5], "depth": [error, 0.2], "normals": [20.0, 10.0, 0.5, 0.7, 0.9]}
        return DenseFit(replace(SETTINGS, method=method, seed=seed), [DenseEpoch(1.0, scores)])

    fits = [fit("single_task", 0, 0.4, 0.5), fit("mtan", 0, 0.5, 0.4), fit("mtan", 1, 0.6, 0.4)]
    found = summaries(tasks, fits)
    assert found["single_task"].delta_m == (0,)
    # A quarter more mIoU and as much accuracy are 12.5 %; a fifth less error and as much relative error 10 %.
    assert found["mtan"].delta_m == pytest.approx(((12.5 + 10) / 3, (25 + 10) / 3))
    assert found["mtan"].scores["segmentation"][0] == pytest.approx(0.55)
    worse = {name: list(scores) for name, scores in found["single_task"].scores.items()}
    worse["normals"][0] *= 2
    assert change(tasks, worse, found["single_task"].scores) == pytest.approx(-100 / 5 / 3)
    long = DenseFit(SETTINGS, [DenseEpoch(1.0, {"depth": [float(epoch)]}) for epoch in range(200)])
    assert long.final() == {"depth": [statistics.fmean(range(190, 200))]}


@pytest.fixture
def invoke(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiments.dense_tasks.command.ROOM_SIZES", {"small": (32, 64)})
    for name, kind in study.DATASETS.items():
        monkeypatch.setitem(study.DATASETS, name, replace(kind, width=1, epochs=1, batch=2))
    return lambda *arguments: CliRunner().invoke(app.app, ["train-dense", "--device", "cpu", *arguments])


@pytest.fixture
def no_pictures(monkeypatch):
    for name in ("learning_curves", "maps"):
        monkeypatch.setattr(f"experiments.dense_tasks.pictures.{name}", lambda *_: None)


def test_methods_train_on_rooms_and_results_are_written(invoke, tmp_path, request):
    methods = "single_task", "cross_stitch", "ts_sigma_bn"
    options = *(part for name in methods for part in ("--method", name)), "--rooms", "4", "--seeds", "1"
    result = invoke(*options, "--output", "out")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out/results.json").read_text())
    names = ["single_task", "cross_stitch", "ts_sigma_bn x100"]
    assert [one["name"] for one in found["summaries"]] == names
    assert set(found["sizes"]) == set(methods) and len(found["runs"]) == 3
    assert {path.name for path in (tmp_path / "out").glob("*.pt")} == {
        f"{name.replace(' ', '-')}-seed0.pt" for name in names
    }
    for picture in ("learning_curves.png", "maps.png"):
        with Image.open(tmp_path / "out" / picture) as image:
            assert image.width > 600 and len(image.convert("RGB").getcolors(1 << 24) or ()) > 10  # not blank
    text = " ".join(result.output.split())
    assert "rooms3 of 32x64: segmentation, depth, normals, 4 pictures to train on, 1 to validate" in text
    assert "delta_m%" in text and "#P" in text
    request.getfixturevalue("no_pictures")
    again = invoke(*options, "--output", "out", "--resume")
    assert again.exit_code == 0 and json.loads((tmp_path / "out/results.json").read_text()) == found


def test_a_folder_trains(invoke, no_pictures, tmp_path):
    write(tmp_path / "data", normals=False)
    options = "--dataset", "cityscapes", "--data", "data", "--method", "ts_sigma_bn", "--seeds", "1", "--workers", "0"
    refused = invoke(*options)
    assert refused.exit_code == 1
    assert "segnet needs heights and widths that are multiples of 32, got 24x32" in refused.output
    result = invoke(*options, "--network", "deeplab", "--output", "out")
    assert result.exit_code == 0, result.output
    (tmp_path / "data/train/depth/1.npy").write_bytes(b"")
    broken = invoke(*options, "--network", "deeplab", "--output", "again")
    assert broken.exit_code == 1 and "data/train/depth/1.npy cannot be read as an array" in broken.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "nyuv2"], "nyuv2 needs the folder of its files"),
        (["--data", "."], "rooms3 takes no folder"),
        (["--network", "vgg"], "unknown 'vgg'; known are segnet, deeplab"),
        (["--method", "magic"], "unknown 'magic'; known are single_task, hard_sharing"),
        (["--multiplier", "0"], "a multiplier must be above 0, got 0"),
        (["--rooms", "4", "--batch", "5"], "has 4 training pictures, fewer than a batch of 5"),
        (["--amp", "int8"], "unknown 'int8'; known are float32, bfloat16, float16"),
        (["--size", "huge"], "unknown 'huge'; known are small"),
    ],
)
def test_bad_options_are_refused(invoke, arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
