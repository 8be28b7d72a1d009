"""A training run: what an epoch keeps, and that a killed run goes on as if it had not been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.processes import ROOT
from torch.utils.data import TensorDataset

from benchmarks.network.data import Splits
from benchmarks.network.model import Layout
from experiments.forty_tasks import train_run as fits
from experiments.forty_tasks.methods import methods_of
from experiments.forty_tasks.train_run import Epoch, TrainRun
from experiments.forty_tasks.transformer import TransformerLayout
from experiments.training.run import ResumeError, Settings

CPU = torch.device("cpu")
LAYOUT = Layout(1, (2, 2, 2, 3, 3, 4, 4))
PATCHES = TransformerLayout(inputs=1, patch=4, tokens=4, width=4, heads=2, depth=1)
SETTINGS = Settings("noise", (24, 16, 16), LAYOUT, "ts_sigma_bn", 100.0, 0, 3, 8, 1e-2)


def noise() -> Splits:
    """Images of 8x8, three tasks: is the left, the upper half, or the whole image bright?"""
    generator = torch.Generator().manual_seed(0)

    def part(count: int) -> TensorDataset:
        images = torch.rand(count, 1, 8, 8, generator=generator)
        means = [images[..., :4], images[..., :4, :], images]
        return TensorDataset(images, torch.stack([(m.mean((1, 2, 3)) > 0.5).float() for m in means], 1))

    return Splits(part(24), part(16), part(16), ("left", "upper", "whole"), "noise")


def run(path: Path, settings: Settings = SETTINGS, **options) -> TrainRun:
    return TrainRun(settings, noise(), CPU, path, **options)


def assert_same(one: TrainRun, other: TrainRun) -> None:
    assert one.fit.history == other.fit.history
    assert (one.fit.best, one.fit.test_f1) == (other.fit.best, other.fit.test_f1)
    states = [r.network.state_dict() for r in (one, other)]
    assert all(states[1][name].equal(tensor) for name, tensor in states[0].items())
    moments = [r.optimizer.state_dict()["state"] for r in (one, other)]
    for index, state in moments[0].items():
        assert all(moments[1][index][name].equal(tensor) for name, tensor in state.items())
    assert one.order.get_state().equal(other.order.get_state())


class KilledError(Exception):
    pass


def kill_at(epoch: int, share: float):
    def notify(at: int, done: float, _loss: float, _f1: float | None) -> None:
        if (at, done) >= (epoch, share):
            raise KilledError

    return notify


@pytest.mark.parametrize(
    ("layout", "method"), [(layout, method) for layout in (LAYOUT, PATCHES) for method in methods_of(layout)]
)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, layout, method):
    settings = replace(SETTINGS, layout=layout, method=method)
    whole = run(tmp_path / "whole.pt", settings)
    whole.run()
    path = tmp_path / "parts.pt"
    for epoch in (1, 2):  # killed twice, in the middle of an epoch
        torch.manual_seed(epoch)
        with pytest.raises(KilledError):
            run(path, settings, resume=epoch > 1).run(kill_at(epoch, 0.5))
    resumed = run(path, settings, resume=True)
    assert len(resumed.fit.history) == 2
    resumed.run()
    assert_same(whole, resumed)
    if whole.fit.gates is not None:
        assert whole.fit.gates.equal(resumed.fit.gates)


CHILD = """
import sys
from pathlib import Path
import torch
sys.path[:0] = ["tests", "tests/experiments"]
from test_train_fit import run
torch.set_num_threads(1)
path, resume = Path(sys.argv[1]), sys.argv[2] == "resume"
run(path, resume=resume).run(lambda epoch, share, *_: print(epoch, share, flush=True))
"""


def test_a_process_that_was_killed_goes_on(tmp_path):
    whole = run(tmp_path / "whole.pt")
    whole.run()
    path = tmp_path / "killed.pt"
    command = [sys.executable, "-c", CHILD, str(path), "start"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout:
            if line.startswith("1 "):
                os.kill(child.pid, signal.SIGKILL)
                break
    assert child.returncode == -signal.SIGKILL
    resumed = run(path, resume=True)
    assert 1 <= len(resumed.fit.history) < 3
    resumed.run()
    assert_same(whole, resumed)


def test_a_checkpoint_has_the_names_of_its_tasks_and_loads_without_this_code(tmp_path):
    trained = run(tmp_path / "run.pt")
    found = trained.run()
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    assert state["tasks"] == ("left", "upper", "whole") and state["settings"]["method"] == "ts_sigma_bn"
    assert state["gates"].equal(found.gates) and len(state["gates"]) == len(state["tasks"])


def test_a_finished_run_is_read_and_not_trained(tmp_path):
    done = run(tmp_path / "run.pt")
    done.run()
    again = run(tmp_path / "run.pt", resume=True)
    again.run(kill_at(0, 0.0))
    assert_same(done, again)


def test_without_resume_a_run_starts_anew(tmp_path):
    run(tmp_path / "run.pt").run()
    assert run(tmp_path / "run.pt").fit.history == []


def test_other_settings_are_refused(tmp_path):
    path = tmp_path / "run.pt"
    run(path, replace(SETTINGS, epochs=1)).run()
    other = replace(SETTINGS, epochs=1, lr=0.5, layout=Layout(1, (2, 2, 2, 3, 3, 4, 5)))
    with pytest.raises(ResumeError, match=r"layout .* lr 0\.01 \(now 0\.5\); resume with the same settings"):
        run(path, other, resume=True)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ResumeError, match=r"run\.pt is no whole checkpoint; remove it to train that run again"):
        run(path, resume=True)


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    settings = replace(SETTINGS, method="hard_sharing", epochs=1)
    run(tmp_path / "run.pt", settings).run()
    with pytest.raises(ResumeError, match=r"was trained with layout .*channels.* \(now .*'patch': 4"):
        run(tmp_path / "run.pt", replace(settings, layout=PATCHES), resume=True)


def test_an_interrupted_write_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    run(path, replace(SETTINGS, epochs=1)).run()
    before = path.read_bytes()

    def broken(_state, file):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        run(path, replace(SETTINGS, epochs=1)).run()
    assert path.read_bytes() == before


def test_the_best_epoch_is_chosen_by_validation_and_tested_once(tmp_path, monkeypatch):
    validation = iter([(0.5, 0.1, 0.3), (0.9, 0.8, 0.7), (0.8, 0.8, 0.8)])
    validated, tested = [], []

    def f1(self, images):
        weights = self.network.convolutions[0].weight.clone()
        if images is self.splits.validation:
            validated.append(weights)
            return next(validation)
        tested.append(weights)
        return (0.1, 0.2, 0.3)

    monkeypatch.setattr(TrainRun, "_f1", f1)
    trained = run(tmp_path / "run.pt")
    found = trained.run()
    assert found.best == 1 and len(tested) == 1
    assert tested[0].equal(validated[1]) and not tested[0].equal(validated[2])
    assert trained.network.convolutions[0].weight.equal(validated[2])  # the run could go on
    assert found.test_f1 == (0.1, 0.2, 0.3) and found.mean_f1 == pytest.approx(0.2)
    assert [epoch.mean_f1 for epoch in found.history] == pytest.approx([0.3, 0.8, 0.8])


def test_progress_tells_loss_and_f1(tmp_path):
    told = []
    found = run(tmp_path / "run.pt", replace(SETTINGS, epochs=2)).run(lambda *each: told.append(each))
    assert [(epoch, round(share, 3)) for epoch, share, _, _ in told] == [
        (epoch, share) for epoch in (0, 1) for share in (0.333, 0.667, 1.0)
    ]
    assert [f1 for *_, f1 in told] == [None] * 3 + [found.history[0].mean_f1] * 3
    assert sum(loss for _, _, loss, _ in told[:3]) / 3 == pytest.approx(found.history[0].loss)


def test_training_learns_and_seeds_differ(tmp_path):
    first, second = (run(tmp_path / "run.pt", replace(SETTINGS, seed=seed)).run() for seed in (0, 1))
    assert first.history[-1].loss < first.history[0].loss
    assert first.history != second.history
    assert isinstance(first.history[0], Epoch) and fits.Fit(SETTINGS).best == -1
