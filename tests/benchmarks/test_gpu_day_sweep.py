"""The sweep of a GPU day: which plans it times, whether each is run by its own numbers, and what is read of it."""

from __future__ import annotations

import io
import json
import tarfile
from contextlib import nullcontext
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.gpu_day import sweep
from benchmarks.gpu_day.constants import CONSTANTS, changed
from benchmarks.timing.measure import HostTimer
from tsbn_kernels.backends import cuda, triton
from tsbn_kernels.backends.plan import DEVICES
from tsbn_kernels.backends.plan import cuda as cuda_rules
from tsbn_kernels.definition.options import Needs, Options, Saved

H100 = DEVICES["H100"]


def archive(path: Path, text: str, name: str = "gpu_day/sweep.jsonl") -> Path:
    with tarfile.open(path, "w:gz") as file:
        member = tarfile.TarInfo(name)
        member.size = len(text)
        file.addfile(member, io.BytesIO(text.encode()))
    return path


@pytest.fixture(scope="module")
def planned() -> list[sweep.SweptPlan]:
    """Those of an H100 at full size."""
    return sweep.candidates("cpu", H100)


def test_every_pass_begins_with_the_rules_plan(planned: list[sweep.SweptPlan]) -> None:
    assert len(set(planned)) == len(planned)
    groups = groupby(planned, key=lambda one: (one.case, one.direction, one.backend))
    first = {}
    for key, group in groups:
        found = list(group)
        if key not in first:
            first[key] = found[0]
            assert found[0].by_rule
            found = found[1:]
        assert not any(one.by_rule for one in found)
    assert len(first) == 2 * 2 * 2 * (2 * 4 + 1)  # passes, backends, dtypes; formats of four layers, and the 1-d one
    assert planned[0].case.layer.name == "bn4,bn5"


def test_they_vary_what_a_rule_decides(planned: list[sweep.SweptPlan]) -> None:
    for backend, names in (
        ("triton", ("variant", "tile", "warps", "splits", "registers")),
        ("cuda", ("variant", "splits", "warps", "cluster", "shared_bytes", "resident")),
    ):
        of = [one.numbers for one in planned if one.backend == backend and one.case.layer.name == "bn4,bn5"]
        for name in names:
            assert len({str(numbers[name]) for numbers in of}) > 1, (backend, name)


def test_what_a_fit_may_say_was_timed(planned: list[sweep.SweptPlan]) -> None:
    """The plan that a rule has by another value of a constant is among the candidates."""
    for one in (one for one in planned if one.by_rule):
        timed = {other.plan for other in planned if (other.case, other.direction) == (one.case, one.direction)}
        for constant in CONSTANTS[one.backend]:
            with changed({constant: constant.values[-1]}):
                assert sweep.rule_of(one.backend, one.work, H100) in timed


def test_a_record(planned: list[sweep.SweptPlan]) -> None:
    small = sweep.candidates("cpu")
    for one in (small[0], next(one for one in small if one.backend == "cuda" and one.direction == "backward")):
        record: dict[str, Any] = json.loads(json.dumps(one.run(HostTimer())))
        assert record["stand_in"]
        assert record["ms"] > 0 and record["copy_ms"] > 0
        assert record["by_rule"] is True and record["device"]["name"] == "H100"
        assert record["useful_bytes"] == one.work.useful_bytes <= record["planned_bytes"]


def test_a_failure_is_a_record() -> None:
    one = sweep.candidates("cpu")[0]
    with mock.patch.object(sweep, "_milliseconds", side_effect=RuntimeError("out of registers")):
        record = one.run(HostTimer())
    assert record["failure"] == "RuntimeError: out of registers" and "ms" not in record


@pytest.mark.skipif(not triton.available, reason="no Triton")
def test_triton_runs_the_plan_it_is_told(planned: list[sweep.SweptPlan]) -> None:
    from benchmarks.profile.compile_offline import recorded
    from tsbn_kernels.backends.triton import ops

    before = dict(ops.forwards)
    some = [one for one in planned if one.backend == "triton"][::29]
    assert len({one.plan.variant for one in some}) > 2
    for one in some:
        with (
            recorded() as calls,
            mock.patch.object(ops, "device_of", return_value=H100),
            mock.patch.object(ops, "on_device", return_value=nullcontext()),
        ):
            one.on_meta()
        assert len(calls) == one.plan.launches
        for call in calls:
            options, blocks = call.launch.options, one.plan.cluster
            assert (options["num_warps"], options.get("num_ctas", 1)) == (one.plan.warps, blocks)
            assert call.launch.programs * blocks == one.plan.programs
            assert call.launch.options.get("maxnreg", one.plan.registers) == one.plan.registers
    assert ops.forwards == before


def test_plans_of_a_pass_are_told_apart() -> None:
    plans_of: dict[str, list[str]] = {}
    for one in sweep.candidates("cpu", H100):
        plans_of.setdefault(f"{one.backend} {one.case} {one.direction}", []).append(sweep.describe(one.numbers))
    assert all(len(set(plans)) == len(plans) for plans in plans_of.values())


def test_cuda_runs_the_plan_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[int]] = []
    monkeypatch.setattr(torch.ops.tsbn, "_cuda_launch", lambda kernel, *_: told.append(kernel), raising=False)
    monkeypatch.setattr(cuda.launches, "device_of", lambda _: H100)
    some = [one for one in sweep.candidates("cpu", H100) if one.backend == "cuda"][::97]
    assert {one.plan.variant for one in some} == {"resident", "cluster", "split", "streaming", "together"}
    for one in some:
        x, dy, gamma, var = sweep._meta(one.case)
        options = Options(one.case.tasks, 1e-5, "sigmoid", "task_major")
        saved = Saved(x, gamma, None, None, gamma, var)
        with sweep.forced(one.plan):
            if one.direction == "forward":
                cuda.forward_training(x, gamma, None, None, options)
            else:
                cuda.backward(dy, saved, True, Needs(True, True, False, False), options)
        plan = one.plan
        assert isinstance(plan, cuda_rules.CudaPlan)
        assert [kernel[3:] for kernel in told] == [
            [plan.programs, plan.threads, plan.cluster, plan.shared_bytes, int(plan.teams > 0)]
        ] * plan.launches
        told.clear()


def test_the_driver_is_asked_how_many_clusters_run(
    planned: list[sweep.SweptPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that does not answer costs the plans of the other backend nothing."""
    one = next(one for one in planned if one.backend == "cuda")
    on_gpu, on_paper = replace(one.case, device=torch.device("cuda")), cuda_rules.clusters_on_paper(one.plan)
    for available, answer, wanted in ((False, 3, on_paper), (True, 3, 3), (True, RuntimeError("lost"), on_paper)):
        monkeypatch.setattr(cuda, "available", available)
        driver = mock.Mock(side_effect=[answer])
        monkeypatch.setattr(cuda.batch_norm, "clusters", lambda dtype, device, driver=driver: driver)
        assert sweep._clusters(on_gpu)(one.plan) == wanted
    assert sweep._clusters(one.case) is cuda_rules.clusters_on_paper


def test_reading_an_archive(tmp_path: Path) -> None:
    whole = archive(tmp_path / "whole.tar.gz", '{"ms": 1.0}\n{"ms": 2.0}\n{"ms": 3.')
    assert sweep.read(whole) == [{"ms": 1.0}, {"ms": 2.0}]
    with pytest.raises(ValueError, match=r"holds no sweep\.jsonl"):
        sweep.read(archive(tmp_path / "other.tar.gz", "{}\n", "gpu_day/records.jsonl"))
    (tmp_path / "text").write_text("no archive")
    with pytest.raises(ValueError, match="no archive of a GPU day"):
        sweep.read(tmp_path / "text")
