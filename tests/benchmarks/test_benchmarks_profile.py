"""Where a step's time goes: what is counted, and for what; the command for Nsight Compute and what it writes."""

from __future__ import annotations

import gzip
import json
import math
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.commands import profile
from benchmarks.commands.app import app
from benchmarks.network.data import Faces
from benchmarks.network.training import prepared_step
from benchmarks.profile import ncu, profiling

CPU = torch.device("cpu")


@pytest.mark.parametrize("variant", ["loop", "and late fan-out"])
def test_nearly_all_of_a_step_is_named(variant: str, tmp_path: Path) -> None:
    faces = Faces(torch.rand(4, 3, 64, 64), torch.randint(0, 2, (4, 2)).float(), "random")
    step, _ = prepared_step(variant, faces, CPU)
    trace = tmp_path / "traces" / "step.json.gz"
    for _ in range(3):  # what another process takes of the processor between two operators has no name
        found = profiling.profile_step(step, CPU, trace, warm_up=1)
        if found.named >= 0.95:
            break
    assert 0.95 <= found.named <= 1.0
    assert not found.kernels
    calls = {each.name: each.calls for each in found.operators if each.kind == profiling.NORMALISATION}
    if variant == "loop":
        assert calls["aten::native_batch_norm"] == calls["aten::native_batch_norm_backward"] == 9 * 2
        assert calls["aten::cat"] == 9 * 2  # forward, and behind the split
    else:
        assert calls["tsbn::forward_tracked"] == calls["tsbn::backward"] == 9
    shares = [found.share_of(kind) for kind in (*profiling.KINDS, profiling.OPTIMIZER, profiling.OTHER)]
    assert sum(shares) == pytest.approx(found.named)
    assert found.share_of("convolution") > 0.3
    assert found.share_of(profiling.OPTIMIZER) > 0
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert {profiling.STEP, *calls} <= {event.get("name") for event in events}


@pytest.mark.parametrize(
    ("name", "callers", "kind"),
    [
        ("tsbn::backward", ["EagerTaskBatchNormBackward"], "normalisation"),
        ("aten::empty", ["aten::native_batch_norm", "aten::batch_norm", profiling.STEP], "normalisation"),
        ("aten::mkldnn_convolution", ["aten::conv2d"], "convolution"),
        ("aten::leaky_relu_", [profiling.STEP], "activation"),
        ("aten::fill_", ["aten::max_pool2d_with_indices_backward"], "pooling and mean"),
        ("aten::addmm", [profiling.STEP], "linear"),
        ("aten::mul_", ["Optimizer.step#Adam.step", profiling.STEP], "optimizer"),
        ("aten::binary_cross_entropy_with_logits", [profiling.STEP], "other"),
    ],
)
def test_kinds(name: str, callers: list[str], kind: str) -> None:
    assert profiling.kind_of(name, callers) == kind


def test_the_command_for_nsight_compute(tmp_path: Path) -> None:
    line = ncu.command(["forward_slab", "backward.1"], tmp_path / "out.csv", ["python", "-m", "x", "--variant", "a b"])
    words = shlex.split(line)
    assert words[0] == "ncu"
    assert words[words.index("--kernel-name") + 1] == r"regex:^(forward_slab|backward\.1)$"
    assert set(words[words.index("--metrics") + 1].split(",")) == set(ncu.METRICS)
    assert words[words.index("--print-units") + 1] == "base"
    assert words[-5:] == ["python", "-m", "x", "--variant", "a b"]


def table(unit: str = "Mbyte", without: tuple[str, ...] = (), **unknown: str) -> str:
    cells = dict.fromkeys(ncu.METRICS, ("", "32")) | {"ID": ("", "0"), "Kernel Name": ("", "forward_slab")}
    cells |= {ncu.SECONDS: ("us", "1,000"), ncu.READ: (unit, "2"), ncu.WRITTEN: ("Kbyte", "1,500.5")}
    cells |= {name: ("", value) for name, value in unknown.items()}
    names = [name for name in cells if name not in without]
    rows = names, *([cells[name][row] for name in names] for row in range(2))
    return "==PROF== Connected\n" + "\n".join(",".join(f'"{cell}"' for cell in row) for row in rows) + "\n"


def test_reading_what_nsight_compute_wrote(tmp_path: Path) -> None:
    path = tmp_path / "ncu.csv"
    path.write_text(table())
    (launch,) = ncu.read(path)
    assert launch.kernel == "forward_slab"
    assert launch.values[ncu.SECONDS] == pytest.approx(1e-3)
    assert launch.bytes_per_second == pytest.approx((2e6 + 1500.5e3) / 1e-3)
    shown = CliRunner().invoke(app, ["profile", "--ncu-csv", str(path)])
    assert shown.exit_code == 0
    assert "forward_slab" in shown.stdout


def test_what_a_gpu_does_not_count_costs_no_other_metric(tmp_path: Path) -> None:
    """Names of metrics differ between architectures: ncu writes n/a, or no column."""
    path = tmp_path / "ncu.csv"
    path.write_text(table(without=(ncu.LOCAL_STORES,), **{ncu.LOCAL_LOADS: "n/a"}))
    (launch,) = ncu.read(path)
    assert launch.values[ncu.SECONDS] == pytest.approx(1e-3)
    assert {name for name, value in launch.values.items() if math.isnan(value)} == {ncu.LOCAL_LOADS, ncu.LOCAL_STORES}


@pytest.mark.parametrize(
    ("text", "message"), [("==ERROR== no kernels\n", "has no column Kernel Name"), (table("parsec"), "in 'parsec'")]
)
def test_another_file_is_an_error(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "ncu.csv"
    path.write_text(text)
    with pytest.raises(ncu.NcuError, match=message):
        ncu.read(path)
    shown = CliRunner().invoke(app, ["profile", "--ncu-csv", str(path)])
    assert shown.exit_code == 1


@pytest.mark.parametrize("kernels", [(), ("forward_slab",)])
def test_the_command(kernels: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operators = (profiling.OperatorTime("tsbn::backward", profiling.NORMALISATION, 0.5, 9),)
    found = profiling.Profile(1.0, operators, kernels)
    monkeypatch.setattr(profile, "profile_step", lambda *_: found)
    options = ["--variant", "fused", "--tasks", "2", "--batch", "2", "--device", "cpu", "--output", str(tmp_path)]
    shown = CliRunner().invoke(app, ["profile", *options])
    assert shown.exit_code == 0, shown.output
    for text in ("tsbn::backward", "step, and how much of it is named", "normalisation is 50 % of a step, fused"):
        assert text in shown.stdout
    assert ("ncu --csv" in shown.stdout) == bool(kernels)


def test_an_unknown_variant() -> None:
    assert CliRunner().invoke(app, ["profile", "--variant", "faster"]).exit_code == 2
