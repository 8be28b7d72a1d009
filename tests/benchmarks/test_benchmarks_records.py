"""Records and the means that are made of them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from support.synthetic import simulated_run

from benchmarks.records.record import FASTEST, Record, fraction_of_copy_bandwidth, geometric_mean, means, write_json

FIELDS = [
    "workload",
    "layer",
    "shape",
    "dtype",
    "memory_format",
    "pass",
    "impl",
    "median_ms",
    "iqr_ms",
    "copy_ms",
    "useful_bytes",
    "fraction_of_copy_bandwidth",
    "speedup_over_loop",
    "verified",
    "device",
    "versions",
    "rounds",
    "tasks",
    "outliers",
    "visits_ms",
    "norm",
]


def record(layer: str, impl: str, median: float, memory_format: str = "contiguous") -> Record:
    return Record(
        workload="celeba40",
        layer=layer,
        shape=(4, 3),
        dtype="float32",
        memory_format=memory_format,
        pass_="forward",
        impl=impl,
        median_ms=median,
        iqr_ms=0.1,
        copy_ms=2.0,
        useful_bytes=96,
        fraction_of_copy_bandwidth=0.5,
        speedup_over_loop=None,
        verified=True,
        device="cpu",
        versions={"torch": "2"},
    )


def test_json_has_exactly_the_documented_fields(tmp_path):
    path = tmp_path / "new" / "records.json"
    write_json(path, [record("bn1", "fused", 1.0)])
    (row,) = json.loads(path.read_text())
    assert list(row) == FIELDS
    assert row["pass"] == "forward"
    assert row["shape"] == [4, 3]
    assert row["versions"] == {"torch": "2"}


def test_bandwidth_is_measured_in_useful_bytes():
    # Five tensors of 100 bytes in the time of two and a half copies: as fast as the copy.
    assert fraction_of_copy_bandwidth(500, 2.5, 100, 1.0) == pytest.approx(1.0)
    assert fraction_of_copy_bandwidth(200, 4.0, 100, 1.0) == pytest.approx(0.25)


def test_geometric_mean_counts():
    assert geometric_mean([(2.0, 1), (16.0, 2)]) == pytest.approx(8.0)


def test_a_shape_of_two_layers_counts_twice():
    rows = [record("bn1", "fused", 1.0), record("bn1", "loop", 2.0)]
    rows += [record("bn2,bn3", "fused", 1.0), record("bn2,bn3", "loop", 16.0)]
    (mean,) = means(rows)
    assert mean.layers == 3
    assert mean.over_loop == pytest.approx(8.0)  # (2 * 16 * 16)^(1/3)


def test_one_dimensional_layers_count_in_every_memory_format():
    rows = [record("bn1", "fused", 1.0, f) for f in ("contiguous", "channels_last")]
    rows += [record("bn1", "loop", 2.0, "contiguous"), record("bn1", "loop", 32.0, "channels_last")]
    rows += [record("bn8", "fused", 1.0, "none"), record("bn8", "loop", 8.0, "none")]
    found = {mean.memory_format: mean for mean in means(rows)}
    assert set(found) == {"contiguous", "channels_last"}
    assert found["contiguous"].over_loop == pytest.approx(4.0)
    assert found["channels_last"].over_loop == pytest.approx(16.0)
    assert [mean.layers for mean in found.values()] == [2, 2]


def test_only_one_dimensional_layers_have_a_mean_of_their_own():
    (mean,) = means([record("bn8,bn9", "fused", 1.0, "none"), record("bn8,bn9", "loop", 8.0, "none")])
    assert (mean.memory_format, mean.over_loop) == ("none", pytest.approx(8.0))


def test_fastest_peer_of_each_layer_and_over_all_layers():
    times = {"bn1": {"fused": 1, "loop": 9, "folded": 2}, "bn4": {"fused": 1, "loop": 8, "folded": 18}}
    (mean,) = means([record(layer, impl, ms) for layer, row in times.items() for impl, ms in row.items()])
    assert mean.over_fastest == pytest.approx(4.0)  # 2 and 8
    assert mean.single_fastest == "folded"
    assert mean.over_single_fastest == pytest.approx(6.0)  # 2 and 18, against 9 and 8 of the loop
    assert mean.over_loop == pytest.approx(math.sqrt(72))


def test_our_own_layer_with_the_relu_behind_it_is_no_peer():
    (mean,) = means([record("bn1", impl, ms) for impl, ms in (("fused", 1.0), ("separate", 1.5), ("loop", 9.0))])
    assert mean.over_separate == pytest.approx(1.5)
    assert (mean.over_fastest, mean.single_fastest) == (pytest.approx(9.0), "loop")


def test_no_mean_without_the_fused_layer_and_no_ratio_without_peers():
    assert means([record("bn1", "loop", 1.0)]) == []
    (mean,) = means([record("bn1", "fused", 1.0)])
    assert mean.over_loop is mean.over_fastest is mean.single_fastest is mean.over_single_fastest is None


@pytest.mark.parametrize("seed", range(5))
def test_a_mean_lies_within_its_interval(seed):
    """Also where the visits differ much: a median of all rounds need not lie among those of the visits."""
    for row in means(simulated_run(seed, noise=0.5)):
        for name, interval in row.intervals.items():
            assert (row.over_fastest if name == FASTEST else row.over[name]) in interval


RECORDS = {
    "benchmarks.records.agreement",
    "benchmarks.records.compare",
    "benchmarks.records.intervals",
    "benchmarks.records.read",
    "benchmarks.records.network_run",
    "benchmarks.records.record",
    "benchmarks.records.groups",
    "benchmarks.records.summary",
    "benchmarks.records.workloads",
}
SHOWN = {
    "benchmarks.commands.app",
    "benchmarks.commands.report",
    "benchmarks.report.page",
    "benchmarks.report.plot",
    "benchmarks.report.figures",
    "benchmarks.report.tables",
    "benchmarks.report.compare_tables",
    "benchmarks.report.markup",
    "benchmarks.report.console",
}


@pytest.mark.parametrize(("modules", "may_load"), [(RECORDS, RECORDS), (SHOWN, RECORDS | SHOWN)], ids=["read", "show"])
def test_what_reads_and_shows_records_measures_nothing(modules: set[str], may_load: set[str]) -> None:
    """Neither loads PyTorch, the package, or a module that measures."""
    listed = "print(*(name for name, module in sys.modules.items() if not hasattr(module, '__path__')))"
    code = f"import sys, {', '.join(sorted(modules))}; {listed}"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    ours = {name for name in loaded if name.startswith("benchmarks.")}
    assert modules <= ours <= may_load
    assert not {"torch", "tsbn_kernels"} & {name.partition(".")[0] for name in loaded}
