"""What the steps of the check look for: that they cover what they say, and find what is wrong."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import assert_same_bits
from torch import Tensor
from typer.testing import CliRunner

from benchmarks import cli
from benchmarks.gpu_check import (
    concurrency,
    correctness,
    families,
    graphs,
    kinds,
    large,
    measure,
    repeats,
    results,
    sanitizer,
)
from benchmarks.gpu_check.calls import PLACES, placed, run
from benchmarks.gpu_check.case import Setting, SkippedError
from benchmarks.gpu_check.layers import LAYERS, Step
from benchmarks.gpu_check.results import CaseResult, StepResult
from benchmarks.gpu_check.steps import BENCHMARK
from tsbn_kernels import ops
from tsbn_kernels.backends import cuda, triton
from tsbn_kernels.plan import DEVICES
from tsbn_kernels.plan import cuda as cuda_rules

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Setting("cpu", False, "", "cpu")


@pytest.fixture
def change(monkeypatch) -> Callable[[str, int, Callable[[Tensor], Tensor]], None]:
    """Makes the backend "cpu" give another tensor for an output of one of its operators."""
    real = ops.operators("cpu")

    def apply(name: str, index: int, wrong: Callable[[Tensor], Tensor]) -> None:
        def call(*arguments: Any) -> Any:
            results = list(getattr(real, name)(*arguments))
            results[index] = wrong(results[index])
            return tuple(results)

        monkeypatch.setattr(ops, "_dispatched", real._replace(**{name: call}))

    return apply


def spec(**options: Any) -> kinds.Spec:
    usual: dict[str, Any] = {"dtype": torch.float32, "columns": False, "fan_out": False, "activation": "none"}
    return kinds.Spec(4, 2, 3, 49, **usual | {"residual": False, "training": True} | options)


# ---- correctness -----------------------------------------------------------------------------------------------------


def test_the_first_combinations_hold_every_pair():
    rows = correctness.combinations(correctness.FACTORS, correctness.MOST)
    count = correctness.covering_length(correctness.FACTORS, rows)
    assert count < 80
    assert len({correctness.name_of(row) for row in rows}) == len(rows) == correctness.MOST
    for one, other in itertools.combinations(correctness.FACTORS, 2):
        held = {(row[one], row[other]) for row in rows[:count]}
        assert len(held) == len(correctness.FACTORS[one]) * len(correctness.FACTORS[other]), (one, other)
    assert rows == correctness.combinations(correctness.FACTORS, correctness.MOST)


def test_combinations_are_right_on_the_cpu():
    planned = correctness.cases(CPU)
    for case in planned.cases[: planned.enough : 3]:  # a full check runs the others
        case.run()


@pytest.mark.parametrize(
    ("name", "index", "wrong"),
    [
        ("forward_training", 0, lambda y: y * (1 + 4e-5)),
        ("forward_training", 2, lambda var: var * (1 + 2e-5)),
        ("backward", 0, lambda dx: dx + 2e-4),
        ("backward", 0, lambda dx: dx.flatten().index_fill(0, torch.tensor([5]), float("nan")).view_as(dx)),
        ("backward", 1, lambda dweight: dweight.flip(0)),
        ("backward", 3, lambda dresidual: dresidual.double()),
    ],
)
def test_what_is_wrong_is_found(change, name, index, wrong):
    options = {key: values[0] for key, values in correctness.FACTORS.items()} | {"activation": "silu", "residual": True}
    options["training"] = True
    correctness.compare(options, CPU)
    change(name, index, wrong)
    with pytest.raises(AssertionError):
        correctness.compare(options, CPU)


@pytest.mark.parametrize(("name", "index"), [("moments", 1), ("input_gradient", 0)])
def test_wrong_statistics_apart_are_found(change, name, index):
    correctness.apart(torch.float32, "contiguous", CPU)
    change(name, index, lambda result: result * (1 + 1e-4))
    with pytest.raises(AssertionError):
        correctness.apart(torch.float32, "contiguous", CPU)


def test_fresh_memory_holds_nan_while_a_backend_runs(change):
    seen = []
    change("backward", 0, lambda dx: seen.append(torch.empty(1000)) or dx)
    torch.use_deterministic_algorithms(False)
    try:
        run(spec().call(), "cpu")
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(True)  # as for all tests
    assert seen[0].isnan().all()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("columns", [False, True])
def test_places_in_memory(columns, place):
    call = spec(columns=columns, activation="silu", residual=True).call()
    elsewhere = placed(call, place)
    for one, other in ((call.p.x, elsewhere.p.x), (call.p.dy, elsewhere.p.dy), (call.residual, elsewhere.residual)):
        assert_same_bits(one, other)
        assert (other.data_ptr() % 16 != 0) == (place != "dense")
        assert (other.stride() != one.stride()) == (place == "window")


# ---- families --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["H100", "RTX4090", "MI300X"])
def test_the_calls_reach_every_kind_of_the_triton_rules(device):
    found = kinds.smallest(lambda each: kinds.triton_kinds(each, DEVICES[device]))
    variants = ("resident", "streaming", "split", "elementwise")
    both = list(itertools.product(("rows", "columns"), ("forward", "backward")))
    every = {f"{family} {direction} {variant}" for (family, direction), variant in itertools.product(both, variants)}
    shared = {
        f"{family} {direction} {variant}, fan-out" for (family, direction), variant in itertools.product(both, variants)
    }
    never = {kind for kind in shared if "streaming" in kind}  # a fan-out has no such plan
    assert set().union(*found.values()) == every | shared - never
    assert max(each.elements for each in found) <= kinds.MOST_ELEMENTS


@pytest.mark.parametrize("device", ["A100", "H100"])
def test_the_calls_reach_every_kind_of_the_cuda_rules(device):
    found = kinds.smallest(lambda each: kinds.cuda_kinds(each, DEVICES[device]))
    reached = {tuple(kind.split()) for kind in set().union(*found.values())}
    accesses = {(access, passes) for access, passes, _ in reached}
    assert accesses == set(itertools.product(("rows", "columns", "scalar"), cuda_rules.PASSES))
    for access, passes in accesses:
        variants = {variant for *which, variant in reached if tuple(which) == (access, passes)}
        on_chip = set() if passes == "backward_fan_out" else {"resident"}
        clusters = {"cluster"} if DEVICES[device].clusters and on_chip else set()
        assert variants >= {"evaluation", "split"} | on_chip | clusters, (access, passes)


@pytest.fixture
def without_launches(monkeypatch) -> None:
    """Both GPU backends plan for an H100, launch nothing, and give the CPU's results."""
    h100 = DEVICES["H100"]
    native = ops.operators("cpu")
    monkeypatch.setattr(cuda, "_device", lambda _: h100)
    for name, does in (("_cuda_launch", lambda *_: None), ("_cuda_active_clusters", lambda *_: 8)):
        monkeypatch.setattr(torch.ops.tsbn, name, does, raising=False)

    def planned(by: Any) -> ops.Operators:
        def both(name: str) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                getattr(by, name)(*arguments)
                return getattr(native, name)(*arguments)

            return call

        return ops.Operators(*map(both, ops.Operators._fields))

    monkeypatch.setattr(ops, "_cuda", planned(cuda))
    if triton.available:
        from tsbn_kernels.backends.triton import launch
        from tsbn_kernels.backends.triton import ops as triton_ops

        monkeypatch.setattr(triton_ops, "_device", lambda _: h100)
        monkeypatch.setattr(launch.Launch, "__call__", lambda self, *_: None)
        monkeypatch.setattr(ops, "_triton", lambda: planned(triton_ops))
        monkeypatch.setattr(triton_ops, "_forwards", {})
        monkeypatch.setattr(triton_ops, "_backwards", {})


@pytest.mark.usefixtures("without_launches")
@pytest.mark.parametrize("backend", ["cuda", *["triton"] * triton.available])
def test_the_backends_choose_what_the_calls_are_planned_for(backend):
    """Of tensors they make the same work as the specs say."""
    setting = Setting("cpu", False, "", backend)
    planned = families.planned(setting)
    small = {each: wanted for each, wanted in planned.items() if each.elements <= 2**14}
    assert len(small) >= 12
    for each, wanted in [*small.items(), *list(small.items())[:1]]:  # the first again: by then it is prepared
        families.reach(each, wanted, setting)


@pytest.mark.usefixtures("without_launches")
@pytest.mark.parametrize("backend", ["cuda", *["triton"] * triton.available])
def test_a_kind_that_is_not_reached_is_found(backend):
    setting = Setting("cpu", False, "", backend)
    with pytest.raises(AssertionError, match=r"not reached: rows forward telepathy; reached: .*rows"):
        families.reach(spec(), {"rows forward telepathy"}, setting)


# ---- repetition, graphs, streams -------------------------------------------------------------------------------------


def test_other_bits_are_found(change):
    repeats.repeat(spec(), 3, CPU)
    calls = itertools.count()
    change("backward", 0, lambda dx: dx.nextafter(dx + 1) if next(calls) == 2 else dx)
    with pytest.raises(AssertionError, match="repetition 3: dx differs in 1176 of 1176 values"):
        repeats.repeat(spec(), 5, CPU)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("misses", ["", "y", "running_mean"])
def test_a_replay_is_compared_with_the_eager_step(monkeypatch, name, misses):
    """By a graph that runs the step again, does nothing, or leaves the running statistics as they are."""

    class Graph:
        def __init__(self, step: Step) -> None:
            self.step, self.results = step, step()

        def replay(self) -> None:
            if misses != "y":
                step = self.step.twin() if misses else self.step
                for result, now in zip(self.results, step(), strict=True):
                    result.copy_(now)

    def captured(step: Step) -> tuple[Graph, Any]:
        graph = Graph(step)
        return graph, graph.results

    monkeypatch.setattr(graphs, "captured", captured)
    if misses:
        with pytest.raises(AssertionError, match=f"{misses} differs"):
            graphs.replay(name, CPU)
    else:
        graphs.replay(name, CPU)


@pytest.mark.parametrize("way", [concurrency.on_streams, concurrency.in_threads])
def test_steps_at_once_are_compared_with_steps_in_turn(way):
    pair = "rows, relu", "columns"
    concurrency.compare(pair, way, 3, CPU)

    def disturbed(steps: list[Step], device: torch.device, count: int) -> concurrency.Results:
        results = way(steps, device, count)
        results[1][-1][1][0, 0, 0, 0] += 1
        return results

    with pytest.raises(AssertionError, match="dx differs in 1 of"):
        concurrency.compare(pair, disturbed, 3, CPU)


# ---- benchmark ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [*(measure.OVERVIEW | measure.FULL).values(), measure.QUICK])
def test_the_benchmark_takes_the_options(options):
    result = CliRunner().invoke(cli.app, ["celeba40", *options, "--tasks", "2", "--predict", "H100"])
    assert result.exit_code == 0, result.output


def test_all_that_was_measured_is_reported(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(measure, "_benchmarks", lambda *arguments: commands.append(arguments))
    step = StepResult(BENCHMARK, planned=["a", "b", "c"], enough=3)
    step.cases = {
        "a": CaseResult("passed", details={"file": "a.json"}), "b": CaseResult("failed"),
        "c": CaseResult("passed", details={"file": "c.json"}),
    }  # fmt: skip
    results.save(tmp_path, step)
    measure.report(Setting("cpu", False, str(tmp_path))).cases[0].run()
    assert commands[0][:3] == ("report", str(tmp_path / "a.json"), str(tmp_path / "c.json"))


# ---- large, sanitizer ------------------------------------------------------------------------------------------------


def test_the_large_size_is_beyond_32_bits():
    assert torch.Size(large.SIZE).numel() > 2**31


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_the_slabs_of_a_large_call_are_compared(change, memory_format, shared):
    size = 3, 5, 6, 33, 17
    large.compare(memory_format, shared, CPU, size)
    for index, last in ((0, (-1, -1, -1, -1)), (1, (-1, -1))):  # dx, dweight

        def spoil(result: Tensor, last: tuple[int, ...] = last) -> Tensor:
            result[last] += 9
            return result

        change("backward", index, spoil)
        with pytest.raises(AssertionError):
            large.compare(memory_format, shared, CPU, size)


def test_a_large_call_needs_memory(monkeypatch):
    monkeypatch.setattr("benchmarks.environment.available_bytes", lambda _: 2**33)
    with pytest.raises(SkippedError, match="needs 19 GiB of memory, 8 GiB are free"):
        large.compare("contiguous", False, CPU, large.SIZE)


@pytest.mark.parametrize(
    ("status", "says", "message"),
    [
        (0, sanitizer.DONE, None),
        (0, "no program was run", "has not run the program"),
        (sanitizer.FOUND, sanitizer.DONE, "racecheck found something"),
        (1, sanitizer.DONE, "ended with status 1"),
    ],
)
def test_what_a_sanitizer_says(tmp_path, monkeypatch, status, says, message):
    tool = tmp_path / sanitizer.TOOL
    told = f'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" > {tmp_path}/arguments'
    tool.write_text(f"#!/bin/sh\n{told}\necho {says}\nexit {status}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    memory, race, _ = sanitizer.cases(CPU).cases
    if message is None:
        memory.run()
        arguments = (tmp_path / "arguments").read_text()
        assert arguments.startswith("1 --tool memcheck --error-exitcode 86 ")
        assert arguments.endswith(f"{sys.executable} -m benchmarks.gpu_check.sanitizer cpu cpu\n")
    else:
        with pytest.raises(AssertionError, match=message):
            race.run()


def test_no_sanitizer_is_no_failure(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SkippedError, match="compute-sanitizer is not on the PATH"):
        sanitizer.cases(CPU)


def test_what_runs_under_a_sanitizer(monkeypatch, capsys):
    chosen = {spec(): {""}, spec(columns=True, training=False, sums=False): {""}}
    monkeypatch.setattr(families, "planned", lambda _: chosen)
    sanitizer.main("cpu", "cpu")
    assert capsys.readouterr().out.splitlines() == [*(each.name for each in chosen), sanitizer.DONE]
