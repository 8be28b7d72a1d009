"""The commands that measure layers of networks, of given shapes and in series; what the report makes of a series."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from support.synthetic import simulated_sweep, write_run
from test_benchmarks_page import Reader
from typer.testing import CliRunner

from benchmarks.commands import app
from benchmarks.commands import layers as cli_layers
from benchmarks.commands.layers import SERIES
from benchmarks.layers.cases import Case, batch_that_fits, cases, choose_batch
from benchmarks.layers.peers import Fused
from benchmarks.layers.registry import PEERS
from benchmarks.records.groups import groups, positions, series_of_slabs, series_of_tasks, series_of_widths
from benchmarks.records.record import FORWARD, Record, means
from benchmarks.records.workloads import (
    BALANCED,
    BATCH_NORM,
    LAYER_NORM,
    MIXES,
    ONE_SIDED,
    SLAB_LAYERS,
    SORTED,
    TASK_COUNTS,
    WIDTH_LAYERS,
    WORKLOADS,
    ZIPF,
    Layer,
    activation_named,
    layers_named,
    parse_shape,
    samples_of,
)
from benchmarks.report import figures, page
from benchmarks.report.what_ran import plans
from benchmarks.timing import environment
from benchmarks.timing.measure import Effort

CPU = torch.device("cpu")
HUGE = (Layer.of(4, (4, 5)), Layer.of_rows(16, 2**24))  # what --quick skips, and what fits nowhere
EAGER = ["--device", "cpu", "--impl", "fused", "--impl", "loop"]


@pytest.fixture
def invoke(monkeypatch, tmp_path):
    """Runs a command with few and short rounds in an empty folder; gives its output in one line, and its records."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "cache_bytes", lambda _: 1)  # else small inputs are copied ten thousand times
    for name in ("FULL_EFFORT", "QUICK_EFFORT"):
        monkeypatch.setattr(cli_layers, name, Effort(1, 1, 0.0, 0.0, visits=1))

    def run(*arguments: str, status: int = 0) -> tuple[str, list[dict]]:
        result = CliRunner().invoke(app.app, [*arguments, *EAGER, "--json", "run.json"])
        assert result.exit_code == status, result.output
        path = tmp_path / "run.json"
        rows = json.loads(path.read_text()) if path.exists() else []
        return " ".join(result.output.replace("│", " ").split()), rows

    return run


def test_networks_of_the_paper():
    counts = {name: sum(layers_named(layer.name) for layer in one.layers) for name, one in WORKLOADS.items()}
    resnets = {f"resnet50_{size}": 53 for size in ("256x256", "288x384", "128x256")}
    transformers = {"vit_s16_512": 25, "bert_base": 25}
    mixed = {f"mixed_{tasks}": 8 for tasks in (2, 8, 40)}
    assert counts == {"celeba40": 9, "segnet": 26, **resnets, "vit_fusion": 1, **transformers, **mixed}
    shapes = {name: {layer.shape(one.tasks, one.batch) for layer in one.layers} for name, one in WORKLOADS.items()}
    assert {(12, 64, 288, 384), (12, 512, 36, 48), (12, 256, 36, 48), (12, 512, 18, 24)} <= shapes["segnet"]
    assert {(32, 64, 64, 128), (32, 128, 32, 64), (32, 2048, 16, 32)} <= shapes["resnet50_128x256"]
    assert (12, 1024, 36, 48) in shapes["resnet50_288x384"]
    assert shapes["vit_fusion"] == {(40, 512, 32, 32)}
    assert [one.activation for one in WORKLOADS.values()] == [*["relu"] * 5, "gelu", *["none"] * 2, *["relu"] * 3]


def test_transformers_normalise_the_width_of_every_token():
    shapes = {name: {layer.shape(2, 3) for layer in WORKLOADS[name].layers} for name in ("vit_s16_512", "bert_base")}
    assert shapes == {"vit_s16_512": {(6, (512 // 16) ** 2, 384)}, "bert_base": {(6, 512, 768)}}
    assert {layer.norm for name in shapes for layer in WORKLOADS[name].layers} == {LAYER_NORM}
    (case,) = cases(
        WORKLOADS["bert_base"].layers,
        tasks=2,
        batch=3,
        dtypes=["float32"],
        memory_formats=["contiguous", "channels_last"],
        device=CPU,
    )
    assert str(case) == "768@512 x25 float32"
    inputs = case.inputs()
    assert inputs.x.shape == inputs.dy.shape == (6, 512, 768)
    assert inputs.gamma.shape == (2, 768)


def test_mixes_have_the_samples_that_they_say():
    assert samples_of(SORTED, 3, 12) == samples_of(BALANCED, 3, 12) == [4, 4, 4]
    assert samples_of(ZIPF, 4, 64) == [29, 15, 11, 9]
    assert samples_of(ONE_SIDED, 8, 128) == [116, 4, 4, 4, 0, 0, 0, 0]
    assert samples_of(ONE_SIDED, 40, 640) == [576, *[4] * 16, *[0] * 23]
    for mix in MIXES:
        for tasks, samples in ((1, 2), (2, 4), (40, 80), (40, 640)):
            found = samples_of(mix, tasks, samples)
            assert len(found) == tasks
            assert sum(found) == samples
            assert not {1, -1} & set(found)
            assert max(found) == found[0]
    layers = WORKLOADS["mixed_8"].layers
    assert [layer.mix for layer in layers] == [*MIXES, *MIXES]
    (case,) = cases([layers[-1]], tasks=3, batch=4, dtypes=["float32"], memory_formats=["contiguous"], device=CPU)
    assert str(case) == "64@16x16 one_sided float32 contiguous"
    index = case.inputs().task_of_sample
    assert index.bincount(minlength=3).tolist() == samples_of(ONE_SIDED, 3, 12) == [8, 4, 0]
    assert not bool((index.diff() >= 0).all())


def test_a_layer_of_several_counts_as_them():
    layer = Layer.of(512, (36, 48), 3)
    assert layer.name == "512@36x48 x3"
    assert [layers_named(name) for name in (layer.name, "bn2,bn3", "64", "64@8x8")] == [3, 2, 1, 1]
    run = [record for times in (1, 3) for record in records_of(Layer.of(8 * times, (2, 2), times))]
    (found,) = means(run)
    assert found.layers == 4
    assert found.over_loop == pytest.approx((2.0 * 4.0**3) ** (1 / 4))


def records_of(layer: Layer) -> list[Record]:
    """The loop takes as long as ours, times the layers and one."""
    case = Case(layer, 2, 4, "float32", "contiguous", CPU)
    rest = None, True, "cpu", {"torch": "2"}, 3, case.tasks
    median = {"fused": 1.0, "loop": 1.0 + layer.times}
    return [
        Record(
            case.record_name,
            layer.name,
            case.shape,
            case.dtype,
            case.memory_format,
            "forward",
            impl,
            time,
            0.0,
            1.0,
            2 * case.tensor_bytes,
            1 / time,
            *rest,
        )
        for impl, time in median.items()
    ]


def test_shapes_are_parsed():
    assert parse_shape("40x16,64,32,48") == (40, 16, Layer(("64@32x48",), 64, (32, 48)))
    assert parse_shape("3x2,8") == (3, 2, Layer(("8",), 8, None))
    assert parse_shape("5x1,1024,384") == (5, 1, Layer(("384@1024",), 384, (1024,), norm=LAYER_NORM))
    for text in ("40,16,64", "40x16,64,", "40x16,64,32,0", "40x16,64,0", "0x2,8", "2x2,8,1,1,1", "x2,8", ""):
        with pytest.raises(
            ValueError,
            match=r"is no shape; expected TASKSxSAMPLES,CHANNELS\[,HEIGHT,WIDTH\], .* or for layer",
        ):
            parse_shape(text)
    with pytest.raises(ValueError, match="a single value for each task"):
        parse_shape("2x1,8,1,1")
    assert parse_shape("2x1,8,1,2")[2].elements == 16
    with pytest.raises(ValueError, match="has rows of 15; of random rows below 16 values"):
        parse_shape("2x2,8,15")


def test_activations_are_part_of_the_name():
    for activation in ("none", "gelu"):
        case = Case(Layer.of(8, ()), 2, 4, "float32", "none", CPU, activation, "segnet")
        assert activation_named(case.record_name) == activation
    assert case.record_name == "segnet+gelu"


def test_the_batch_is_at_most_that_of_the_network():
    layers, sample = WORKLOADS["segnet"].layers, 4 * 3 * 64 * 288 * 384
    assert choose_batch(layers, 3, ["float32"], CPU, 10**15, 4) == (4, "the default on cpu")
    assert batch_that_fits(layers, 3, ["bfloat16"], 90 * sample) == (3, 30 * sample)  # the reference is in float32
    assert choose_batch(layers, 3, ["float32"], CPU, 90 * sample, 4)[0] == 2


def test_a_network_is_measured_with_its_activation(invoke, tmp_path):
    names = "64@64x128,256@16x32,128@16x32,1024@16x32"
    output, rows = invoke(
        "layers", "resnet50_128x256", "--quick", "--batch", "2", "--dtype", "float32", "--layers", names
    )
    assert {(row["layer"], tuple(row["shape"])) for row in rows} == {
        ("128@16x32 x7", (4, 128, 16, 32)),
        ("256@16x32 x12", (4, 256, 16, 32)),
    }
    assert {row["workload"] for row in rows} == {"resnet50_128x256+relu"}
    assert len(rows) == 2 * 2 * 2 * 2
    assert "resnet50_128x256: 2 tasks, batch 2 (given)" in output
    assert (tmp_path / "results" / "resnet50_128x256.png").exists()


def test_shapes_of_the_user(invoke):
    output, rows = invoke(
        "layers", "--shape", "3x4,5,2,3", "--shape", "2x4,5,2,3", "--shape", "2x4,6", "--activation", "gelu", "--quick"
    )
    assert {(row["layer"], tuple(row["shape"]), row["tasks"]) for row in rows} == {
        ("5@2x3", (12, 5, 2, 3), 3),
        ("5@2x3", (8, 5, 2, 3), 2),
        ("6", (8, 6), 2),
    }
    assert {row["workload"] for row in rows} == {"shape+gelu"}
    assert {row["memory_format"] for row in rows} == {"contiguous", "channels_last", "none"}
    assert output.count("geometric means") == 2  # of each number of tasks


def test_shapes_of_both_norms_in_one_call(invoke):
    output, rows = invoke("layers", "--shape", "3x4,5,2,3", "--shape", "3x4,5,17", "--dtype", "float32")
    assert {(row["norm"], row["layer"], tuple(row["shape"]), row["memory_format"]) for row in rows} == {
        ("batch_norm", "5@2x3", (12, 5, 2, 3), "contiguous"),
        ("batch_norm", "5@2x3", (12, 5, 2, 3), "channels_last"),
        ("layer_norm", "17@5", (12, 5, 17), "none"),
    }
    assert {row["impl"] for row in rows} == {"fused", "loop"}
    assert "left out" not in output


def test_a_transformer_is_measured(invoke, tmp_path):
    output, rows = invoke("layers", "vit_s16_512", "--batch", "2", "--tasks", "2", "--quick", "--dtype", "bfloat16")
    assert {(row["workload"], row["layer"], tuple(row["shape"])) for row in rows} == {
        ("vit_s16_512", "384@1024 x25", (4, 1024, 384))
    }
    assert {row["useful_bytes"] for row in rows} == {tensors * 4 * 1024 * 384 * 2 for tensors in (2, 5)}
    assert "geometric means" in output
    assert (tmp_path / "results" / "vit_s16_512.png").exists()


@pytest.mark.parametrize(("series", "points"), [("tasks", 3), ("slab", 2), ("width", 2)])
def test_a_series(invoke, monkeypatch, series, points):
    monkeypatch.setattr(cli_layers, "TASKS_LAYER", Layer.of(4, (2, 2)))
    monkeypatch.setattr(
        cli_layers,
        "SLAB_LAYERS",
        (
            Layer.of(4, (2, 2)),
            Layer.of(4, (3, 3)),
            Layer.of(4, (4, 4)),
            Layer.of(4, (4, 5)),
            Layer.of(4, (2**12, 2**12)),
        ),
    )
    monkeypatch.setattr(
        cli_layers, "WIDTH_LAYERS", (*(Layer.of_rows(4**power, 4 ** (3 - power)) for power in (1, 1, 3)), *HUGE)
    )
    monkeypatch.setattr(cli_layers.environment, "available_bytes", lambda _: 2**30)
    output, rows = invoke("sweep", series, "--quick", "--batch", "2")
    assert {row["workload"] for row in rows} == {f"sweep_{series}"}
    kind = "float32", "none" if series == "width" else "contiguous"
    assert {(row["dtype"], row["memory_format"]) for row in rows} == {kind}
    assert len({(row["tasks"], tuple(row["shape"])) for row in rows}) == points
    assert "geometric means" not in output
    assert "python -m benchmarks report run.json" in output
    if series == "tasks":
        assert {row["tasks"] for row in rows} == {1, 4, 16}
        assert {row["shape"][0] for row in rows} == {2, 8, 32}
    elif series == "width":
        assert "16@16777216 left out: too large for 1.0 GiB of memory" in output
        assert {tuple(row["shape"]) for row in rows} == {(16, 16, 4), (16, 1, 64)}
    else:
        assert "4@4096x4096 left out: too large for 1.0 GiB of memory" in output
        assert {tuple(row["shape"]) for row in rows} == {(16, 4, 2, 2), (16, 4, 4, 4)}


def test_a_series_for_which_nothing_fits(invoke, monkeypatch):
    monkeypatch.setattr(cli_layers.environment, "available_bytes", lambda _: 1000)
    assert "128 tasks need" in invoke("sweep", "tasks", status=1)[0]
    assert "no size fits in memory" in invoke("sweep", "slab", status=1)[0]


def test_the_series_as_they_are():
    assert TASK_COUNTS == (1, 2, 4, 8, 16, 32, 64, 128)
    assert [math.prod(layer.size) for layer in SLAB_LAYERS] == [4**power for power in range(1, 9)]
    assert [layer.channels for layer in WIDTH_LAYERS] == [4**power for power in range(2, 8)]
    assert {layer.elements for layer in WIDTH_LAYERS} == {2**17}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layers"], "give either a workload or a --shape"),
        (["layers", "segnet", "--shape", "2x2,8"], "give either a workload or a --shape"),
        (["layers", "vgg"], "unknown 'vgg'; known are celeba40, segnet"),
        (["layers", "segnet", "--layers", "bn1"], "unknown layer 'bn1'; known are 64@288x384"),
        (["layers", "segnet", "--activation", "tanh"], "unknown 'tanh'; known are none, relu"),
        (["layers", "--shape", "2x8"], "'2x8' is no shape; expected TASKSxSAMPLES"),
        (["layers", "--shape", "2x2,8", "--tasks", "3"], "--layers, --tasks and --batch go with a workload"),
        (["layers", "bert_base", "--activation", "gelu"], "layer normalisation has no activation"),
        (["layers", "--shape", "2x2,8,16", "--activation", "relu"], "layer normalisation has no activation"),
        (["sweep", "channels"], "unknown 'channels'; known are tasks, slab, width"),
    ],
)
def test_bad_options_are_refused(invoke, arguments, message):
    assert message in invoke(*arguments, status=2)[0]


def test_a_wrong_layer_ends_the_command_with_status_1(invoke, monkeypatch):
    class Wrong(Fused):
        def forward(self):
            return super().forward() * 1.002

    monkeypatch.setitem(PEERS[BATCH_NORM], "fused", Wrong)
    output, rows = invoke("layers", "--shape", "2x4,8", status=1)
    assert "fused is wrong: y of 8 float32" in output
    assert not rows


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    files = [write_run(folder / f"{series}.json", simulated_sweep(series)) for series in SERIES]
    result = CliRunner().invoke(app.app, ["report", *map(str, files), "--out", str(folder / "report.html")])
    assert result.exit_code == 0, result.output
    assert result.stdout == ""  # no means
    return Reader((folder / "report.html").read_text())


def test_the_report_draws_series(reader):
    assert "time a task" in reader.of("tasks")
    assert "over the copy's" in reader.of("slabs") and "over the copy's" in reader.of("widths")
    for name in ("summary", "layers", "bandwidth", "sizes"):
        assert reader.of(name).endswith("The records are of series alone, whose scaling is shown below."), name
    for name in ("plan", "measurements"):
        assert "sweep_slab" in reader.of(name), name


def test_figures_of_series():
    tasks, slab = series_of_tasks(simulated_sweep("tasks")), series_of_slabs(simulated_sweep("slab"))
    width = series_of_widths(simulated_sweep("width"))
    for figure, axis, ticks, title in (
        (figures.by_tasks(tasks, FORWARD), "ms a task (log)", ["1", "128"], "128@16x16, batch 4"),
        (figures.by_slab(slab, FORWARD), "of the copy's bandwidth (log)", ["32", "131 k"], "64 channels, 8 tasks"),
        (
            figures.by_width(width, FORWARD),
            "of the copy's bandwidth (log)",
            ["16", "16 k"],
            "8,388,608 values, 8 ",
        ),
    ):
        (axes,) = figure.axes
        figure.draw_without_rendering()  # makes the ticks
        assert axes.get_title().startswith(title) and axes.get_ylabel() == axis
        assert set(ticks) <= {tick.get_text() for tick in axes.get_xticklabels()}
        (legend,) = figure.legends
        assert {"fused", "vmap", "compiled_vmap"} <= {text.get_text() for text in legend.get_texts()}


def test_series_are_told_apart():
    tasks, slab, width = map(simulated_sweep, SERIES)
    assert [len(group) for group in series_of_tasks(tasks + slab + width).values()] == [len(tasks)]
    assert [len(group) for group in series_of_slabs(tasks + slab + width).values()] == [len(slab)]
    assert [len(group) for group in series_of_widths(tasks + slab + width).values()] == [len(width)]
    assert {positions(record) for record in slab} == {8 * 4**power for power in range(1, 9)}
    assert not series_of_slabs([record for record in slab if positions(record) < 200])  # two sizes are no series
    other = [Record(**vars(record) | {"device": "cuda: B"}) for record in slab]
    both = series_of_slabs(slab + other)
    assert sorted(name.split("\n")[-1] for name in both) == ["sweep_slab, A, 2 threads", "sweep_slab, cuda: B"]
    assert [one.name for one in groups(tasks + slab)] == ["sweep_tasks, A, 2 threads", "sweep_slab, A, 2 threads"]


def test_sections_without_series_say_so():
    reader = Reader(page.render([page.Source("a.json", records_of(Layer.of(8, (2, 2))), None)]))
    assert "sweep tasks" in reader.of("tasks")
    assert "sweep slab" in reader.of("slabs")
    assert "sweep width" in reader.of("widths")


def test_layer_normalisation_has_no_plan_of_batch_normalisation():
    gpu = {"device": "cuda: NVIDIA H100 80GB HBM3", "versions": {"backend": "triton: Triton 3.5"}}
    for series, planned in (("width", False), ("slab", True)):
        assert bool(plans([replace(record, **gpu) for record in simulated_sweep(series)])) is planned
