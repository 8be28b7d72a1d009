"""Layers: every case is verified, then measured."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence

import torch

from benchmarks import environment
from benchmarks.measure import Candidate, Plan, Summary, clock_for, copy_candidate, measure, training_candidate
from benchmarks.peers import OURS, Peer
from benchmarks.records import PASSES, USEFUL_TENSORS, Record, fraction_of_copy_bandwidth
from benchmarks.registry import PEERS
from benchmarks.verify import Expected, check
from benchmarks.workloads import Case
from tsbn_kernels import memory

COPY = "copy"
FULL_PLAN, QUICK_PLAN = Plan(), Plan(min_rounds=3, max_rounds=3)

# Says what is being done, and which share (0 to 1) is done.
Notify = Callable[[str, float], None]


def run_cases(
    todo: Sequence[Case], impls: Sequence[str], plan: Plan, notify: Notify, tell: Callable[[str], object]
) -> list[Record]:
    """All cases, one after the other."""
    records = []
    for index, case in enumerate(todo):
        start, end = (work(todo[:number]) / work(todo) for number in (index, index + 1))
        records += run_case(case, impls, plan, part_of(notify, start, end), tell)
    return records


def work(todo: Sequence[Case]) -> float:
    """How long cases take, in no unit, for a progress bar: their bytes, and a constant for compiling."""
    return sum(case.tensor_bytes / 2**20 + 100 for case in todo)


def part_of(notify: Notify, start: float, end: float) -> Notify:
    """For a part of the whole, from one share of it to another."""
    return lambda text, share: notify(text, start + share * (end - start))


def run_case(
    case: Case,
    impls: Sequence[str],
    plan: Plan,
    notify: Notify,
    tell: Callable[[str], object] = warnings.warn,
) -> list[Record]:
    """Verifies and measures the implementations that have a part in the case; two records for each.

    A peer that fails, ours excepted, is left out, and ``tell`` is told.

    Raises:
        MismatchError: an implementation's results are wrong; none was timed.
    """
    impls = [impl for impl in impls if PEERS[impl].unsupported(case) is None]
    torch.compiler.reset()  # compiled code of earlier cases, and their count towards the limit of recompilations
    stages = len(impls) + 2
    notify(f"{case}: reference", 0.0)
    inputs = case.inputs()
    expected = Expected.of(case, inputs)
    peers: dict[str, Peer] = {}
    for index, impl in enumerate(impls):
        notify(f"{case}: verifying {impl}", (1 + index) / stages)
        try:
            peer = PEERS[impl](case, inputs)
            outcome = peer.step()
        except Exception as error:
            if impl in OURS:
                raise
            tell(f"{impl} is left out of {case}: {type(error).__name__}: {error}")
            continue
        check(impl, case, outcome, expected)
        peers[impl] = peer
        del outcome
    del expected
    candidates: dict[str, Candidate] = {COPY: copy_candidate(inputs.x, torch.empty_like(inputs.x))}
    candidates |= {name: training_candidate(peer.forward, peer.backward) for name, peer in peers.items()}
    notify(f"{case}: warming up", (stages - 1) / stages)

    def on_round(rounds: int) -> None:
        notify(f"{case}: timing, round {rounds}", (stages - 1 + rounds / plan.max_rounds) / stages)

    summaries = measure(candidates, plan, clock_for(case.device), on_round)
    del candidates, peers, inputs
    gc.collect()
    memory.empty_cache()
    return _records(case, summaries)


def _records(case: Case, summaries: dict[str, list[Summary]]) -> list[Record]:
    (copy,) = summaries.pop(COPY)
    loop = summaries.get("loop")
    device, versions = environment.device_name(case.device), environment.versions(case.device)
    records = []
    for impl, passes in summaries.items():
        for index, (pass_, summary) in enumerate(zip(PASSES, passes, strict=True)):
            useful = USEFUL_TENSORS[pass_] * case.tensor_bytes
            records.append(
                Record(
                    workload=case.record_name,
                    layer=case.layer.name,
                    shape=case.shape,
                    dtype=case.dtype,
                    memory_format=case.memory_format,
                    pass_=pass_,
                    impl=impl,
                    median_ms=summary.median * 1e3,
                    iqr_ms=summary.iqr * 1e3,
                    copy_ms=copy.median * 1e3,
                    useful_bytes=useful,
                    fraction_of_copy_bandwidth=fraction_of_copy_bandwidth(
                        useful, summary.median, case.tensor_bytes, copy.median
                    ),
                    speedup_over_loop=loop[index].median / summary.median if loop else None,
                    verified=True,
                    device=device,
                    versions=versions,
                    rounds=summary.rounds,
                    tasks=case.tasks,
                )
            )
    return records
