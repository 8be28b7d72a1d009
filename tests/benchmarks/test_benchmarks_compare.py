"""Two runs compared: what is a regression, what is noise, and what cannot be compared."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
from support.synthetic import network_run, simulated_run, write_run
from typer.testing import CliRunner

from benchmarks.commands import app
from benchmarks.records.agreement import agreements
from benchmarks.records.compare import Machine, compare
from benchmarks.records.read import RecordsError
from benchmarks.records.record import FORWARD

RUNS = 12


def found(comparison, impl="fused"):
    return [change for change in comparison.changes if change.pairs[0][0].impl == impl]


def test_two_runs_of_one_distribution_do_not_cry_wolf():
    alarms = [
        any(change.slower or change.faster for change in (*result.changes, *result.means))
        for seed in range(RUNS)
        for rounds in (5, 15)
        if (result := compare(simulated_run(seed, rounds=rounds), simulated_run(seed + 500, rounds=rounds)))
    ]
    assert sum(alarms) <= 1  # of 24, at about 95 %


def test_five_percent_are_found():
    for seed in range(RUNS):
        result = compare(simulated_run(seed, rounds=9), simulated_run(seed + 500, rounds=9, slower=1.05))
        fused, peers = ([mean for mean in result.means if mean.ours is ours] for ours in (True, False))
        assert all(mean.regression for mean in fused), seed
        assert not any(mean.slower for mean in peers), seed
        for mean in fused:
            assert mean.ratio == pytest.approx(1.05, abs=0.015)
            assert mean.interval[0] < 1.05 < mean.interval[1]
    # With less noise every record tells, not only the mean.
    result = compare(simulated_run(1, noise=0.005), simulated_run(2, noise=0.005, slower=1.05))
    assert all(change.regression for change in found(result))
    assert len(result.regressions) == len(found(result)) + 2


def test_one_slow_layer_is_named():
    before, after = simulated_run(1), simulated_run(2)
    index = next(i for i, r in enumerate(after) if (r.impl, r.layer, r.pass_) == ("fused", "bn6,bn7", FORWARD))
    after[index] = replace(after[index], median_ms=1.3 * after[index].median_ms)
    (change,) = [change for change in compare(before, after).changes if change.regression]
    assert change.pairs == ((before[index], after[index]),)


def test_the_machines_speed_is_no_regression_and_hides_none():
    result = compare(simulated_run(1), simulated_run(2, machine=1.5))
    assert math.exp(result.machine.log_ratio) == pytest.approx(1.5, abs=0.02)
    assert not result.regressions
    result = compare(simulated_run(1), simulated_run(2, machine=0.7, slower=1.1))
    assert any(change.regression for change in found(result))


def test_a_slower_peer_is_seen_and_is_no_regression():
    result = compare(simulated_run(1), simulated_run(2, slower=1.5, impl="folded"))
    assert any(change.slower for change in found(result, "folded"))
    assert not result.regressions


def test_noise_is_what_the_records_state():
    quiet, loud = (simulated_run(1, noise=noise) for noise in (0.005, 0.1))
    a, b = (compare(run, run) for run in (quiet, loud))
    assert max(change.interval[1] for change in a.changes) < 1.04
    assert min(change.interval[1] for change in b.changes) > 1.1
    fewer = [replace(record, rounds=5) for record in quiet]
    assert compare(fewer, fewer).changes[0].interval[1] > a.changes[0].interval[1]
    unknown = [replace(record, rounds=None) for record in quiet]
    assert compare(unknown, unknown).changes[0].interval[1] > compare(fewer, fewer).changes[0].interval[1]


def test_copies_that_disagree_widen_the_intervals():
    calm = Machine.of([0.10, 0.11, 0.09, 0.10], 0.001)
    assert calm.log_ratio == pytest.approx(0.10)
    assert calm.spread == pytest.approx(1.483 * 0.005)
    assert Machine.of([0.10, 0.40, -0.3, 0.1], 0.001).spread > 10 * calm.spread
    assert Machine.of([0.2], 0.03) == Machine(1, 0.2, 1.25 * 0.03, 0.03)
    assert Machine.of([], 0.03) == Machine(0)


def test_networks_are_compared_and_their_loop_is_a_peer():
    _, before = network_run()
    result = compare(before, [replace(record, median_ms=2 * record.median_ms) for record in before])
    assert {change.pairs[0][0].impl for change in result.regressions} == {
        record.impl for record in before if not record.impl.startswith("loop")
    }


def invoke(*arguments):
    result = CliRunner().invoke(app.app, ["compare", *map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


def test_the_command_marks_regressions_and_exits_with_1(tmp_path):
    a = write_run(tmp_path / "a.json", simulated_run(1))
    b = write_run(tmp_path / "b.json", simulated_run(2, slower=1.2))
    code, output = invoke(a, b)
    assert code == 1
    assert output.count("SLOWER") == 28 + 2
    assert output.endswith("30 of ours slower beyond the noise")
    code, output = invoke(b, a)
    assert code == 0
    assert "SLOWER" not in output and output.count("faster") == 30
    assert output.endswith("nothing of ours is slower beyond the noise, in 84 records")
    assert "warning" not in output and "only in" not in output


def test_two_runs_agree_where_their_intervals_meet(tmp_path):
    one, other, changed = simulated_run(1), simulated_run(2), simulated_run(3, slower=1.5)
    found = agreements(one, other)
    # 2 passes x 2 dtypes x 2 formats x (2 peers and the fastest of them); a 95 % interval each
    assert len(found) == 24 and sum(row.holds for row in found) >= 22
    apart = agreements(one, changed)
    assert not any(row.holds for row in apart)
    assert all(row.intervals[0].middle / row.intervals[1].middle == pytest.approx(1.5, rel=0.05) for row in apart)
    assert not agreements(one, [replace(record, visits_ms=None) for record in other])
    assert not agreements(one, [record for record in other if record.layer != "bn1"])
    sweeps = [[replace(record, workload="sweep_slab") for record in run] for run in (one, other)]
    assert not agreements(*sweeps)  # no means are made of a series
    a, b = (write_run(tmp_path / f"{n}.json", run) for n, run in (("a", one), ("b", changed)))
    assert "0 of 24 mean speed-ups agree within their intervals" in invoke(a, b)[1]
    assert "24 of 24 mean speed-ups agree" in invoke(a, a)[1]


def test_what_one_file_has_alone_is_listed(tmp_path):
    run = simulated_run(1)
    a = write_run(tmp_path / "a.json", [record for record in run if record.layer != "bn1"])
    b = write_run(tmp_path / "b.json", [record for record in run if record.impl != "loop" or record.pass_ != FORWARD])
    code, output = invoke(a, b)
    assert code == 0
    assert "only in A, 10 records: celeba40 bn2,bn3, 4 tasks, batch 2, float32 contiguous, forward: loop" in output
    assert "bn1, 4 tasks, batch 2, bfloat16 channels_last, forward and forward+backward: fused, folded" in output
    assert re.search(r"only in B, 20 records", output)


def test_a_network_alone_is_listed_with_its_images(tmp_path):
    run, (_, steps) = simulated_run(1), network_run()
    old = [replace(record, tasks=None) for record in steps]
    a, b = (write_run(tmp_path / f"{n}.json", run + more) for n, more in (("a", steps), ("b", [])))
    assert "celeba40 network, 4 tasks, batch 8, float32 contiguous, training_step: loop, fused" in invoke(a, b)[1]
    assert "celeba40 network, batch 8, float32" in invoke(b, write_run(tmp_path / "c.json", run + old))[1]


def test_other_machines_give_a_warning(tmp_path):
    a = write_run(tmp_path / "a.json", simulated_run(1))
    b = write_run(tmp_path / "b.json", simulated_run(2, threads=8, cpu="B", tsbn_kernels="0.2"))
    code, output = invoke(a, b)
    assert code == 0
    assert "warning: the runs differ in more than this package: cpu: A in A, B in B threads: 2 in A, 8 in B" in output
    assert "tsbn_kernels" not in output


def test_files_that_cannot_be_compared_are_refused(tmp_path):
    run = simulated_run(1)
    a = write_run(tmp_path / "a.json", run)
    b = write_run(tmp_path / "b.json", simulated_run(1, tasks=8))
    code, output = invoke(a, b)
    assert code == 1 and output.startswith("the files have no measurement in common")
    code, output = invoke(a, tmp_path / "none.json")
    assert code == 1 and "none.json cannot be read: No such file" in output
    few = write_run(tmp_path / "few.json", [replace(record, rounds=2) for record in run])
    code, output = invoke(a, few)
    assert code == 1 and "bn1 forward of fused has 2 rounds: its noise is not known; measure 3 or more" in output
    with pytest.raises(RecordsError, match="is there twice"):
        compare(run, [*run, replace(run[0], device="cuda: X")])


def test_files_from_before_rounds_and_tasks_were_kept(tmp_path):
    run = simulated_run(1)
    a = write_run(tmp_path / "a.json", run)
    rows = [{k: v for k, v in row.items() if k not in ("rounds", "tasks")} for row in json.loads(a.read_text())]
    (tmp_path / "old.json").write_text(json.dumps(rows))
    code, output = invoke(tmp_path / "old.json", a)
    assert code == 0, output
    assert "only in" not in output
