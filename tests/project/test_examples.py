"""The examples run as they stand."""

from __future__ import annotations

import copy
import importlib.util
import io
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ranks
from support.libmtl_stand_in import install
from support.processes import ROOT, python_path
from torch import Tensor, nn

from tsbn_kernels import revert_model


def test_quickstart_learns(capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "examples" / "quickstart.py"
    runpy.run_path(str(path))
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert len([line for line in path.read_text().splitlines() if line.strip()]) <= 32


DENSE = ROOT / "examples" / "dense_transformer.py"


def test_dense_tasks_of_a_transformer_learn(capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(DENSE))
    example["train"](["--size", "32", "--width", "24", "--steps", "4"])
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]


def test_dense_transformer_has_the_sizes_of_the_paper() -> None:
    with torch.device("meta"):
        plain = runpy.run_path(str(DENSE))["DenseTransformer"]()
    norms = [module for module in plain.modules() if isinstance(module, nn.LayerNorm)]
    assert [norm.normalized_shape for norm in norms] == [(384,)] * 25
    convolutions = [module for module in plain.fusion if isinstance(module, nn.Conv2d)]
    assert [(conv.out_channels, *conv.kernel_size) for conv in convolutions] == [(512, 1, 1), (512, 3, 3)] * 2
    assert plain.embedding.positions.shape == (1024, 384)


def test_dense_transformer_is_a_loop_over_plain_ones() -> None:
    """Predictions and all gradients, and the patches are cut once for all tasks."""
    torch.manual_seed(0)
    example = runpy.run_path(str(DENSE))
    model = example["build"](32, 12).double()
    layers = {name: module for name, module in model.backbone.named_modules() if hasattr(module, "gates")}
    assert len(layers) == 29
    for layer in layers.values():
        nn.init.normal_(layer.weight)
    images = torch.rand(2, 3, 32, 32).double()
    twins = {task: revert_model(model.backbone, index) for index, task in enumerate(model.heads)}
    seen: list[Tensor] = []
    model.backbone.embedding.patches.register_forward_hook(lambda _module, _inputs, patches: seen.append(patches))
    predictions = model(images)
    assert [len(patches) for patches in seen] == [2]
    upstream = {task: torch.randn_like(prediction) for task, prediction in predictions.items()}
    loops = {task: model.heads[task](twin(images)) for task, twin in twins.items()}
    for task, prediction in predictions.items():
        torch.testing.assert_close(prediction, loops[task])
    for outputs in (predictions, loops):
        torch.stack([(y * upstream[task]).sum() for task, y in outputs.items()]).sum().backward()
    theirs = [dict(twin.named_parameters()) for twin in twins.values()]
    for name, parameter in model.backbone.named_parameters():
        gradients = torch.stack([plain[name].grad for plain in theirs])
        layer = layers.get(name.removesuffix(".weight"))
        expected = gradients.sum(0) if layer is None else gradients * layer.gates * (1 - layer.gates)
        torch.testing.assert_close(parameter.grad, expected, msg=lambda text, name=name: f"{name}: {text}")


DOMAINS = ROOT / "examples" / "domains.py"


def test_domains_learn(capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(DOMAINS))
    example["train"](example["parse"](["--data", "random", "--steps", "50"]))
    printed = capsys.readouterr().out
    first, last = (float(loss) for loss in re.findall(r"loss ([\d.]+)", printed))
    assert last < first / 4
    assert all(float(share) > 0.8 for share in re.findall(r"(?:ink|negative) ([\d.]+)", printed))


class DomainLoop(nn.Module):
    """The network of the example, with a list of plain layers and masks, as one writes it without this package."""

    def __init__(self, model: Any, domains: int) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList()
        for layer in map(copy.deepcopy, model.children()):
            plain = [layer.task(domain) for domain in range(domains)] if hasattr(layer, "gates") else None
            self.layers.append(layer if plain is None else nn.ModuleList(plain))

    def forward(self, x: Tensor, domains: Tensor) -> Tensor:
        for layer in self.layers:
            if isinstance(layer, nn.ModuleList):
                y = torch.zeros_like(x)
                for domain in domains.unique().tolist():
                    mask = domains == domain
                    y[mask] = layer[domain](x[mask])
                x = y
            else:
                x = layer(x)
        return x


def test_domains_are_a_loop_over_masks() -> None:
    """Parameters and statistics after 20 steps, some of which have no picture of a domain."""
    torch.manual_seed(0)
    example = runpy.run_path(str(DOMAINS))
    count = len(example["DOMAINS"])
    model = example["build"]().double()
    loop = DomainLoop(model, count)
    optimizer = example["make_optimizer"](model)
    (base, gates) = optimizer.param_groups
    norms = [layer for layer in loop.modules() if isinstance(layer, nn.BatchNorm2d)]
    of_gates = [norm.weight for norm in norms]
    others = [parameter for parameter in loop.parameters() if all(parameter is not gate for gate in of_gates)]
    theirs = torch.optim.AdamW(
        [
            {"params": params, "lr": group["lr"], "weight_decay": group["weight_decay"]}
            for params, group in ((others, base), (of_gates, gates))
        ]
    )
    pictures, digits = example["load"]("random")
    absent = 0
    for batch in example["batches"](pictures, digits, 24, 20):
        given = batch._replace(pictures=batch.pictures.double())
        absent += len(batch.domains.unique()) < count
        for one in (optimizer, theirs):
            one.zero_grad()
        for logits in (example["predict"](model, given), loop(given.pictures, given.domains)):
            nn.functional.cross_entropy(logits, batch.digits).backward()
        for one in (optimizer, theirs):
            one.step()
    assert 0 < absent < 20
    for ours, layer in zip(model.children(), loop.layers, strict=True):
        expected: Any = layer.state_dict()
        if hasattr(ours, "gates"):
            plain = [one.state_dict() for one in layer]  # each a BatchNorm2d and its ReLU
            expected = {name: torch.stack([state[f"0.{name}"] for state in plain]) for name in ours.state_dict()}
        torch.testing.assert_close(dict(ours.state_dict()), dict(expected), rtol=1e-8, atol=1e-9)


def test_architectures_of_libmtl_train_beside_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them where LibMTL is installed, and those that its stand-in has elsewhere."""
    example = runpy.run_path(str(ROOT / "examples" / "libmtl_rooms3.py"))
    names = list(example["ARCHITECTURES"]) if importlib.util.find_spec("LibMTL") else ["HPS", "TSSigmaBN"]
    install(monkeypatch)
    options = "--rooms", "4", "--width", "1", "--epochs", "1", "--batch", "2", "--architectures", *names
    example["compare"](example["parse"]([*options]))
    _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == names
    assert all(torch.tensor([float(cell) for cell in row.split()[3:]]).isfinite().all() for row in rows)


def torchrun(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": python_path(), "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=240, check=False
    )


DISTRIBUTED = ROOT / "examples" / "train_distributed.py"


def case_train(*arguments: str) -> str:
    example = runpy.run_path(str(DISTRIBUTED))
    printed = io.StringIO()
    with redirect_stdout(printed):
        example["train"](example["parse"](list(arguments)), torch.device("cpu"))
    return printed.getvalue()


def test_distributed_training_resumes_under_any_parallelism(tmp_path: Path) -> None:
    options = "--data", "random", "--checkpoint", str(tmp_path), "--resume"
    printed = ""
    shapes = [("tasks", 2), ("tasks_data", 4), ("fsdp", 2), ("data", 2)]
    for epoch, (parallel, count) in enumerate(shapes, start=1):
        first, *others = ranks.run(case_train, count, "--parallel", parallel, "--epochs", str(epoch), *options)
        printed += re.sub(r"^.*(?=epoch .: loss)", "", first, flags=re.MULTILINE | re.DOTALL)
        assert set(others) <= {""}
    lines = re.findall(r"^epoch (\d): loss ([\d.]+), accuracy ([\d.]+)$", printed, re.MULTILINE)
    assert [int(epoch) for epoch, _, _ in lines] == list(range(1, len(shapes) + 1))
    losses = [float(loss) for _, loss, _ in lines]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 3
    assert float(lines[-1][2]) > 0.95


def test_digits_of_scikit_learn() -> None:
    pytest.importorskip("sklearn")
    images, digits = runpy.run_path(str(DISTRIBUTED))["load"]("digits")
    assert images.shape == (1797, 1, 8, 8)
    assert images.amax() == 1
    assert set(digits.tolist()) == set(range(10))


def test_distributed_training_under_torchrun() -> None:
    done = torchrun(DISTRIBUTED, "--data", "random", "--epochs", "1")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^epoch 1: loss [\d.]+, accuracy 0\.\d+$", done.stdout, re.MULTILINE)


DYING = """
import os, runpy, signal, sys
from torch.optim.optimizer import register_optimizer_step_pre_hook

steps = []

def step(*_):
    steps.append(None)
    if len(steps) == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)

register_optimizer_step_pre_hook(step)
sys.argv = [sys.argv[0], "--data", "random", "--timeout", "20"]
runpy.run_path({example!r}, run_name="__main__")
"""


def test_a_rank_that_is_killed_ends_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(example=str(DISTRIBUTED)))
    done = torchrun(script)
    assert done.returncode != 0
    assert re.search(r"rank +: 1 .*\n +exitcode +: -9", done.stderr), done.stderr
