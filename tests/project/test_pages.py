"""The Python blocks of README and of the pages of docs/ run as they stand."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import ranks
from support.libmtl_stand_in import install
from support.processes import ROOT
from torch import Tensor, nn

from benchmarks.layers.cases import Case
from benchmarks.layers.verify import Expected, check, outcome_of
from benchmarks.records.workloads import NO_FORMAT, Layer
from tsbn_kernels import FusedTSigmaBN2d, MultiTaskModel, convert_model

CPU = torch.device("cpu")


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def run(page: str, folder: Path, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Runs the blocks of a page one after the other; a page may speak of ``names`` that it does not define."""
    script = folder / f"{Path(page).stem}.py"
    script.write_text("\n".join(blocks(page)))
    return runpy.run_path(str(script), init_globals=names)


def encoder(features: int = 8) -> nn.Sequential:
    convolution = nn.Conv2d(3, features, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(features), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class ResNet(nn.Module):
    """Stands for torchvision's: features, then ``fc``."""

    def __init__(self, weights: str) -> None:
        super().__init__()
        self.features, self.fc = nn.Sequential(nn.AdaptiveAvgPool2d(2), encoder(2048)), nn.Linear(2048, 1000)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.features(images))  # type: ignore[no-any-return]


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision, models = ModuleType("torchvision"), ModuleType("torchvision.models")
    torchvision.models, models.resnet50 = models, ResNet  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    names = run("README.md", tmp_path)
    assert names["block"][1].weight.grad.shape == (4, 128)
    assert {task: y.shape for task, y in names["model"](torch.randn(2, 3, 8, 8)).items()} == {
        "age": (2, 1),
        "smiling": (2, 1),
    }
    assert [group["name"] for group in names["optimizer"].param_groups] == ["base", "gates"]


def test_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    install(monkeypatch)
    names = run("docs/tutorial.md", tmp_path)
    printed = capsys.readouterr().out
    assert "FusedTSigmaBN2d(3, 16, " in printed
    assert "activation='relu')\nFusedActivation(ReLU())\n" in printed
    assert "[('base', 0.0003, 0.0001), ('gates', 0.03, 0.0)]" in printed
    shapes = {task: prediction.shape for task, prediction in names["predictions"].items()}
    assert shapes == dict.fromkeys(names["tasks"], torch.Size([8, 1]))


def test_layer_options(tmp_path: Path) -> None:
    names = run("docs/layer_options.md", tmp_path)
    assert names["y"].shape == names["x"].shape
    assert names["late"](names["images"]).shape == (4 * 8, 128, 16, 16)


def test_layer_normalisation(tmp_path: Path) -> None:
    names = run("docs/layer_normalisation.md", tmp_path)
    assert torch.equal(names["s"], 2 * names["tokens"])
    assert names["stream"].shape == names["tokens"].shape


def test_mixed_batches(tmp_path: Path) -> None:
    names = run("docs/mixed_batches.md", tmp_path)
    assert names["y"].shape == names["x"].shape
    assert names["layer"].num_batches_tracked.tolist() == [7, 7, 1]
    assert names["model"].tasks == ("noisy", "drawn", "foggy")
    assert names["backbone"][1].num_batches_tracked.tolist() == [0, 1, 0]  # of the second, the third, the second


def test_inference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_pruning")
    monkeypatch.chdir(tmp_path)
    images = torch.randn(4, 3, 8, 8)
    model = MultiTaskModel(convert_model(encoder(20), 2), {"age": nn.Linear(20, 1), "smiling": nn.Linear(20, 1)}).eval()
    block = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), FusedTSigmaBN2d(4, 5)).eval()
    loader = [(images, {"age": torch.randn(4, 1), "smiling": torch.randn(4, 1)})]
    names = {"torch": torch, "images": images, "block": block, "loader": loader, "criterion": nn.functional.mse_loss}
    names = run("docs/inference.md", tmp_path, {**names, "model": model})
    torch.testing.assert_close(names["smiling"](images), model.eval()(images)["smiling"])
    assert Path("smiling.onnx").exists()
    found = [names["smaller"].backbone[0], names["model"].backbone[0], names["small"][0][0]]
    assert [layer.out_channels for layer in found] == [14, 16, 13]  # of 20: less 30 %; thrice 10 %; 20 % less again


def test_analysis(tmp_path: Path) -> None:
    names = run("docs/analysis.md", tmp_path)
    assert names["importance"].filter(3) == ("backbone.1", 3)
    assert names["drops"].shape == names["cosines"].shape == names["conflicts"].cosine.shape == (3, 3)
    assert names["points"].shape == (3, 8, 16)


def test_tools(tmp_path: Path) -> None:
    pytest.importorskip("fvcore")
    names = {"model": convert_model(encoder(), 1), "images": torch.randn(4, 3, 8, 8)}
    assert run("docs/tools.md", tmp_path, names)["analysis"].total() > 0


def case_distributed(folder: Path) -> list[str]:
    """All tasks on one rank of a CPU, which the page's mesh of four GPUs becomes."""
    script = folder / "distributed.py"
    text = "\n".join(blocks("docs/distributed.md")).replace('"cuda", (4,)', '"cpu", (1,)')
    script.write_text(text.replace('"step1000"', repr(str(folder / "step1000"))))
    names = {
        "backbone": convert_model(encoder(), 2),
        "heads": {"age": nn.Linear(8, 1), "smiling": nn.Linear(8, 1)},
        "images": torch.randn(4, 3, 8, 8),
        "labels": {"age": torch.randn(4, 1), "smiling": torch.randn(4, 1)},
        "loss": nn.functional.mse_loss,
    }
    return list(runpy.run_path(str(script), init_globals=names)["predictions"])


def test_distributed(tmp_path: Path) -> None:
    assert ranks.run(case_distributed, 1, tmp_path) == [["age", "smiling"]]
    assert (tmp_path / "step1000").exists()


@pytest.mark.parametrize("size", [(3, 5), None])
def test_the_peer_of_the_page_does_the_same_work(tmp_path: Path, size: tuple[int, int] | None) -> None:
    peer = run("docs/adding_a_peer.md", tmp_path)["Instance"]
    case = Case(Layer.of(8, size or ()), 3, 4, "float32", "channels_last" if size else NO_FORMAT, CPU, "gelu")
    assert peer.unsupported(case) is None
    inputs = case.inputs()
    check(peer.name, case, outcome_of(peer(case, inputs)), Expected.of(case, inputs))


def test_the_workload_of_the_page_has_the_layers_of_a_resnet18(tmp_path: Path) -> None:
    layers = run("docs/adding_a_workload.md", tmp_path)["RESNET18"].layers
    assert sum(layer.times for layer in layers) == 20
    assert sum(2 * layer.times * layer.channels for layer in layers) == 9600  # weights and biases of its norms


def test_every_page_with_blocks_is_run() -> None:
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    pages = {str(path.relative_to(ROOT)) for path in documents}
    run_here = set(re.findall(r'"((?:docs/)?\w+\.md)"', Path(__file__).read_text()))
    assert {page for page in pages if blocks(page)} == run_here & pages - {"CONTRIBUTING.md"}


def docstrings() -> list[tuple[str, str]]:
    found = []
    folders = ("tsbn_kernels", "benchmarks", "experiments", "tools")
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                continue
            kernel = any("triton.jit" in ast.unparse(d) for d in getattr(node, "decorator_list", ()))
            if not kernel and (text := ast.get_docstring(node)):  # a kernel's text is part of what is compiled
                found.append((f"{path.name}:{getattr(node, 'name', '')}", text))
    return found


def test_docstrings_make_sense_on_their_own() -> None:
    """An editor shows them alone, where "Of x" and "The same in float64" mean nothing."""
    found = docstrings()
    assert len(found) > 700
    assert not [(name, text[:40]) for name, text in found if re.match(r"(As|Of|The same|Those)\b", text)]


def test_the_tests_that_prove_a_row_exist() -> None:
    """``tests/test_a.py::test_b``; a name without its file is of the file before it."""
    named = re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", (ROOT / "docs" / "verification.md").read_text())
    named = [pair for pair in named if any(pair)]
    assert len(named) > 40
    file = ""
    for given, name in named:
        file = given or file
        assert re.search(rf"^def {name}\b", (ROOT / file).read_text(), re.MULTILINE) if name else (ROOT / file).exists()
