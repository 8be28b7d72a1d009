"""The studies of gates: on a few images and narrow networks."""

from __future__ import annotations

import copy
import importlib.util
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from support.celeba_folder import TORCHVISION, write_celeba
from support.libmtl_stand_in import TaskGradients, install
from torch import nn
from torch.nn import functional
from typer.testing import CliRunner

pytest.importorskip("mlxtend")

from benchmarks.commands import app
from benchmarks.network.data import Splits
from benchmarks.network.exported import chain_of, network_of
from benchmarks.network.model import Layout
from experiments.forty_tasks import shrink, studies, study_command, study_reports, summary
from experiments.forty_tasks.comparisons import ScaledLoss, in_turn
from experiments.forty_tasks.penalties import PENALTIES, PenalisedStep
from experiments.forty_tasks.studies import Corrupted
from experiments.forty_tasks.study_reports import REPORTS
from experiments.forty_tasks.weighting import WeightedNetwork, WeightedStep
from tsbn_kernels import Pruning, export_task

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
def invoke(monkeypatch, tmp_path):
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


def test_gates_are_closed_as_the_exported_networks_lose_filters() -> None:
    pytest.importorskip("torch_pruning")
    network = network_of(3, Layout(1, (3, 4, 5, 4, 5, 6, 6)))
    images = torch.randn(4, 1, 28, 28)
    for amount in (0.3, 0.6, 0.8):
        with torch.no_grad():
            logits = shrink.closed_for_each(network, amount)(images)
        for task in range(3):
            pruning = Pruning(images, amount=amount, min_filters=shrink.LEAST)
            exported = export_task(chain_of(network, task), task, prune=pruning)
            torch.testing.assert_close(exported(images)[:, 0], logits[task])


@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_is_added_to_the_loss_of_a_step(name: str) -> None:
    """A step of plain gradient descent moves by the gradients of both."""
    images, labels = torch.randn(6, 1, 28, 28), torch.randint(2, (6, 3)).float()
    networks = [network_of(3, TINY).train()]
    networks.append(copy.deepcopy(networks[0]))
    losses = functional.binary_cross_entropy_with_logits(networks[0](images), labels.T, reduction="none").mean(1)
    (losses.sum() + PENALTIES[name](networks[0], losses, 0.3)).backward()
    optimizer = torch.optim.SGD(networks[1].parameters(), lr=0.5)
    loss = PenalisedStep(name, 0.3)(networks[1], optimizer, images, labels)
    torch.testing.assert_close(loss, losses.sum().detach())
    for before, after in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(after.detach(), before.detach() - 0.5 * before.grad)


@pytest.mark.parametrize(
    ("name", "says", "file"),
    [
        ("stability", "stability of 2 seeds: ", "report.html"),
        ("pruning", "drop of F1 in points: own ", "drops.png"),
        ("conflicts", "hard_sharing: mean cosine ", "conflicts.png"),
        ("multipliers", "ts_sigma_bn x1000: F1 ", "multipliers.png"),
        ("loss-scales", "losses of 1 tasks multiplied in turn ", "loss_scales.png"),
        ("weighting", "ts_sigma_bn x100, CAGrad: F1 ", "weighting.png"),
        ("orthogonal", "ts_sigma_bn x100 orthogonal 0.1: F1 ", "conflicts.png"),
    ],
)
def test_studies_measure_what_they_train(invoke, monkeypatch, tmp_path, name: str, says: str, file: str) -> None:
    install(monkeypatch)
    result = invoke(name, "--turns", "1", "--seeds", "2" if name == "stability" else "1")
    assert result.exit_code == 0, result.output
    assert says in result.output
    assert (tmp_path / "out" / file).stat().st_size > 1000


def test_shrinking(invoke, monkeypatch, tmp_path) -> None:
    pytest.importorskip("torch_pruning")
    monkeypatch.setattr(shrink, "AMOUNTS", (0.0, 0.5))
    monkeypatch.setattr(study_reports, "OF_GATES", (("L1", 1e-3),))
    whole = few_digits(tmp_path)
    parts = [[(image, labels[10:12]) for image, labels in part] for part in (whole.train, whole.validation, whole.test)]
    tiny = replace(summary.DATASETS["digits40"], load=lambda _: Splits(*parts, whole.tasks[10:12], whole.source))
    monkeypatch.setitem(summary.DATASETS, "digits40", tiny)
    result = invoke("shrink", "--seeds", "1")
    assert result.exit_code == 0, result.output
    for name in ("no penalty", "L1 0.001"):
        assert f"{name}: F1 " in result.output
    assert result.output.count("gone for each, and F1: 0% ") == 2
    for picture in ("shrink.png", "penalties.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 1000


def test_nothing_is_trained_twice(invoke, monkeypatch) -> None:
    result = invoke("noise", "--seeds", "1")
    assert "100% of zero's labels at random: cosine with others " in result.output
    monkeypatch.setattr("experiments.training.run.Run._epoch", None)
    again = invoke("noise", "--seeds", "1")
    assert again.exit_code == 0, again.output
    assert again.output == result.output


def test_celeba_is_studied_from_its_folder(invoke, monkeypatch, tmp_path) -> None:
    load = summary.DATASETS["celeba"].load
    tiny = summary.Dataset(load, True, {"cnn": Layout(3, TINY.channels)}, epochs=1, batch=2, lr=1e-3)
    monkeypatch.setitem(summary.DATASETS, "celeba", tiny)
    write_celeba(tmp_path / "faces", TORCHVISION, ("red", "green", "blue", "white"), (0, 0, 1, 2))
    options = "--dataset", "celeba", "--data", "faces", "--seeds", "1", "--workers", "0"
    for name, says in {
        "pruning": "share of tasks that lose most by their own filters",
        "conflicts": "ts_sigma_bn x100: mean cosine ",
        "noise": "100% of Male's labels at random",
        "loss-scales": "losses of 3 tasks multiplied in turn",
    }.items():
        result = invoke(name, *options, "--task", "Male")
        assert result.exit_code == 0, result.output
        assert "CelebA in faces: 3 tasks" in result.output and says in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["magic"], "unknown 'magic'; known are multipliers, stability"),
        (["noise", "--task", "eleven"], "unknown 'eleven'; tasks are zero"),
        (["noise", "--data", "."], "digits40 takes no folder"),
        (["noise", "--dataset", "celeba"], "celeba needs the folder of its files"),
        (["noise", "--batch", "51"], "has 50 training samples, fewer than a batch of 51"),
    ],
)
def test_bad_options_are_refused(invoke, arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_every_study_is_reported() -> None:
    assert list(REPORTS) == list(study_command.STUDIES)


@pytest.mark.skipif(importlib.util.find_spec("LibMTL") is not None, reason="LibMTL is installed")
def test_without_libmtl_its_study_says_what_it_needs(invoke) -> None:
    result = invoke("weighting", "--seeds", "1")
    assert result.exit_code == 1
    assert "needs LibMTL (No module named 'LibMTL'): pip install git+https://github.com" in result.output


def test_the_loss_of_one_task_is_multiplied() -> None:
    network = nn.Linear(5, 3)
    images, labels = torch.randn(7, 5), torch.randint(2, (7, 3)).float()
    transposed = lambda x: network(x).T  # noqa: E731  # [T, N], as networks give them
    losses = functional.binary_cross_entropy_with_logits(transposed(images).T, labels, reduction="none").mean(0)
    expected = torch.autograd.grad(losses @ torch.tensor([1.0, 1.5, 1.0]), network.weight)[0]
    model = nn.Module()
    model.forward = transposed  # type: ignore[method-assign]
    before = network.weight.detach().clone()
    ScaledLoss(1, 1.5)(model, torch.optim.SGD(network.parameters(), 1.0), images, labels)
    torch.testing.assert_close(before - network.weight, expected)


def test_tasks_are_taken_evenly_in_turn() -> None:
    assert in_turn("abcdefgh", 3) == ["a", "c", "f"]
    assert in_turn("abc", None) == in_turn("abc", 9) == ["a", "b", "c"]


@pytest.mark.parametrize("method", ["hard_sharing", "ts_sigma_bn"])
def test_a_weighted_step_is_the_weighted_sum_of_each_tasks_gradient(monkeypatch, method: str) -> None:
    monkeypatch.delitem(sys.modules, "LibMTL", raising=False)
    install(monkeypatch)
    monkeypatch.setattr(sys.modules["LibMTL.weighting"], "PCGrad", TaskGradients)
    torch.manual_seed(0)
    network = WeightedNetwork("PCGrad", method, 3, TINY)
    images, labels = torch.randn(6, 1, 28, 28), torch.randint(2, (6, 3)).float()
    weights = torch.tensor([1.0, 2.0, 3.0])  # of TaskGradients
    network.train()
    losses = functional.binary_cross_entropy_with_logits(network(images), labels.T, reduction="none").mean(1)
    shared = list(network.model.get_share_params())
    expected = torch.autograd.grad(losses @ weights, shared, retain_graph=True)
    heads = torch.autograd.grad(losses.sum(), list(network.model.decoders.parameters()))
    loss = WeightedStep({})(network, torch.optim.SGD(network.parameters(), 0.0), images, labels)
    torch.testing.assert_close(loss, losses.sum().detach())
    for parameter, gradient in zip([*shared, *network.model.decoders.parameters()], [*expected, *heads], strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
