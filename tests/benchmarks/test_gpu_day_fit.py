"""What is made of a sweep, on sweeps whose truth is known; and what the archives in the repository say of the rules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.processes import ROOT
from test_gpu_day_sweep import archive
from typer.testing import CliRunner

from benchmarks.commands import app
from benchmarks.gpu_day import fit, sweep
from benchmarks.gpu_day.constants import CONSTANTS, changed
from benchmarks.gpu_day.sweep import SweptPlan
from benchmarks.timing.measure import HostTimer
from tsbn_kernels.backends.plan import DEVICES
from tsbn_kernels.backends.plan import cuda as cuda_rules
from tsbn_kernels.backends.plan import triton as triton_rules
from tsbn_kernels.backends.plan.expect import expected

H100 = DEVICES["H100"]
MEASURED = sorted((ROOT / "benchmarks" / "measured").glob("*.tar.gz"))
Truth = Callable[[SweptPlan], float]


def records(backend: str, truth: Truth) -> list[dict[str, Any]]:
    """A sweep of bfloat16 in which a plan takes so many milliseconds."""
    found = []
    for one in sweep.candidates("cpu", H100):
        if one.backend == backend and one.case.dtype == "bfloat16":
            copy = 2e3 * one.case.tensor_bytes / 3e12
            found.append(json.loads(json.dumps(one.record() | {"copy_ms": copy, "ms": truth(one)})))
    return found


def predicted(one: SweptPlan) -> float:
    """Milliseconds by the CUDA rules' own model; what they do not compare takes three times as long."""
    assert isinstance(one.plan, cuda_rules.CudaPlan)
    compared = one.plan in list(cuda_rules.candidates(one.work, H100))
    return (1e3 if compared else 3e3) * cuda_rules.seconds(one.plan)


def constant(backend: str, name: str) -> Any:
    return next(one for one in CONSTANTS[backend] if one.name == name)


def as_chosen(backend: str, **values: float) -> Truth:
    """What the rules choose with other constants is the fastest."""
    others = {constant(backend, name): value for name, value in values.items()}

    def truth(one: SweptPlan) -> float:
        with changed(others):
            return 1.0 if sweep.rule_of(backend, one.work, H100) == one.plan else 1.5

    return truth


def printed(path: Path) -> tuple[int, str]:
    result = CliRunner().invoke(app.app, ["fit-plans", str(path)])
    return result.exit_code, result.output


def as_archive(folder: Path, of: list[dict[str, Any]]) -> Path:
    return archive(folder / "day.tar.gz", "".join(json.dumps(record) + "\n" for record in of))


def test_rules_that_are_right_stay(tmp_path: Path) -> None:
    (found,) = fit.fits(records("cuda", predicted))
    assert not found.values and not found.wrong
    for choice in found.now:
        assert choice.regret == 1.0 and choice.ms == pytest.approx(choice.predicted_ms)
    status, text = printed(as_archive(tmp_path, records("cuda", predicted)))
    assert status == 0 and "cuda: every choice is within 10 % of the fastest plan" in text


@pytest.mark.parametrize(("name", "value"), [("WAVES", 4), ("WAVES", 2)])
def test_a_constant_is_found_by_the_plans_that_it_leads_to(tmp_path: Path, name: str, value: float) -> None:
    sweep_of = records("triton", as_chosen("triton", **{name: value}))
    (found,) = fit.fits(sweep_of)
    assert any(choice.is_slow for choice in found.now)
    of_rule = {str(changed).rpartition(".")[2] for changed in found.values if changed.module is triton_rules}
    assert of_rule == {name}  # those of the expected time follow the made-up times
    assert not found.wrong and all(choice.regret == 1.0 for choice in found.then)
    status, text = printed(as_archive(tmp_path, sweep_of))
    now, then = constant("triton", name).value, found.values[constant("triton", name)]
    assert status == 0 and f"triton: tsbn_kernels.backends.plan.triton.{name} {now:g} -> {then:g}" in text


def test_a_constant_is_found_by_the_times_that_it_predicts() -> None:
    launch = constant("cuda", "LAUNCH_SECONDS")
    with changed({launch: 4 * launch.value}):
        sweep_of = records("cuda", predicted)
    (found,) = fit.fits(sweep_of)
    assert found.values[launch] == 4 * launch.value


@pytest.mark.parametrize("there", [False, True])
def test_a_sweep_by_a_triton_without_clusters_is_held_to_rules_without_them(
    monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """Whatever the Triton that is here."""
    monkeypatch.setattr(triton_rules, "compiles_clusters", lambda: there)
    sweep_of = records("triton", lambda one: 1e3 * expected(one.plan).seconds)
    assert there == any(record["plan"]["variant"] == "cluster" for record in sweep_of)
    monkeypatch.setattr(triton_rules, "compiles_clusters", lambda: not there)
    (found,) = fit.fits(sweep_of)
    assert all(choice.ms is not None and choice.plan.startswith("cluster") <= there for choice in found.now)
    assert any(choice.plan.startswith("cluster") for choice in found.now) == there


def test_what_each_block_of_a_cluster_costs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_rules, "compiles_clusters", lambda: True)
    rank = constant("triton", "RANK_SECONDS")
    with changed({rank: 4 * rank.value}):
        sweep_of = records("triton", lambda one: 1e3 * expected(one.plan).seconds)
    (found,) = fit.fits(sweep_of)
    assert found.values[rank] == 4 * rank.value


def test_the_rule_is_asked_with_the_clusters_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has room for few of them chooses other plans than one on paper."""

    known = cuda_rules.clusters_on_paper

    def few(plan: cuda_rules.CudaPlan) -> int:
        return known(plan) // (3 if plan.cluster > 1 else 1)

    on_paper = {choice.of.name: choice.plan for choice in fit.fits(records("cuda", predicted))[0].now}
    monkeypatch.setattr(cuda_rules, "clusters_on_paper", few)
    sweep_of = records("cuda", lambda one: 1e3 * cuda_rules.seconds(one.plan, few))
    monkeypatch.undo()
    (found,) = fit.fits(sweep_of)
    by_rule = [sweep.describe(record["plan"]) for record in sweep_of if record["by_rule"]]
    assert [choice.plan for choice in found.now] == by_rule
    assert {choice.of.name: choice.plan for choice in found.now} != on_paper


def test_a_rule_is_wrong_where_no_constant_leads_to_what_is_fast(tmp_path: Path) -> None:
    def truth(one: SweptPlan) -> float:
        return 1.0 if (one.case.layer.name, one.plan.warps) == ("bn1", 32) else 1.2

    sweep_of = records("triton", truth)
    (found,) = fit.fits(sweep_of)
    assert {choice.of.name.split()[0] for choice in found.wrong} == {"bn1"}
    assert all(choice.regret == pytest.approx(1.2) for choice in found.wrong)
    status, text = printed(as_archive(tmp_path, sweep_of))
    assert status == 1 and "the rule is wrong for bn1 bfloat16 contiguous forward" in text


def test_what_was_not_measured_is_no_choice(tmp_path: Path) -> None:
    sweep_of = records("triton", as_chosen("triton", WAVES=4))
    sweep_of = [
        {**record, "failure": "no room"} if record["by_rule"] else record
        for record in sweep_of
        if record["layer"] == "bn8,bn9" or not record["by_rule"]
    ]
    for record in sweep_of:
        if "failure" in record:
            del record["ms"]
    (found,) = fit.fits(sweep_of)
    assert all(choice.ms is None and choice.regret is None for choice in found.now)
    _, text = printed(as_archive(tmp_path, sweep_of))
    assert f"triton: {len(found.now)} choices are not in the sweep: measure again" in text


def test_a_sweep_without_a_gpu_goes_through_all_of_it(tmp_path: Path) -> None:
    sweep_of = [one.run(HostTimer()) for one in sweep.candidates("cpu")[::40]]
    assert not any("failure" in record for record in sweep_of)
    _, text = printed(as_archive(tmp_path, sweep_of))
    assert "stand-ins were timed, not the kernels" in text and "triton: what the rules choose" in text


def test_bad_archives_are_refused(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "missing.tar.gz", "No such file"),
        (archive(tmp_path / "empty.tar.gz", ""), "holds no sweep.jsonl"),
        (archive(tmp_path / "failures.tar.gz", '{"failure": "lost"}\n'), "no plan of the sweep has a time"),
    ):
        status, text = printed(path)
        assert status == 1 and message in text


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.name)
def test_the_rules_follow_what_was_measured(path: Path) -> None:
    for found in fit.fits(sweep.read(path)):
        slow = [f"{choice.of.name}: {choice.plan}, {choice.regret:.2f}" for choice in found.now if choice.is_slow]
        assert not slow, f"{path.name}, {found.backend}: see `python -m benchmarks fit-plans`"
