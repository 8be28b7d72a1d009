"""Layers: every case is verified, then measured."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch

from benchmarks import environment
from benchmarks.measure import Candidate, Plan, Summary, clock_for, copy_candidate, measure, training_candidate
from benchmarks.peers import PEERS, Peer
from benchmarks.records import PASSES, USEFUL_TENSORS, Record, fraction_of_copy_bandwidth
from benchmarks.verify import Expected, check
from benchmarks.workloads import Case
from tsbn_kernels import memory

COPY = "copy"

# Says what is being done, and which share (0 to 1) of the case is done.
Notify = Callable[[str, float], None]


def runnable(impls: Sequence[str], device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The implementations that can run on the device, and why the others cannot."""
    reasons = {impl: reason for impl in impls if (reason := PEERS[impl].unavailable(device)) is not None}
    return [impl for impl in impls if impl not in reasons], reasons


def run_case(case: Case, impls: Sequence[str], plan: Plan, notify: Notify) -> list[Record]:
    """Verifies and measures all implementations of one case; two records for each.

    Raises:
        MismatchError: an implementation's results are wrong; none was timed.
    """
    torch.compiler.reset()  # compiled code of earlier cases, and their count towards the limit of recompilations
    stages = len(impls) + 2
    notify(f"{case}: reference", 0.0)
    inputs = case.inputs()
    expected = Expected.of(case, inputs)
    peers: dict[str, Peer] = {}
    for index, impl in enumerate(impls):
        notify(f"{case}: verifying {impl}", (1 + index) / stages)
        peers[impl] = PEERS[impl](case, inputs)
        check(impl, case, peers[impl].step(), expected)
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
                    workload=case.workload + "+relu" * case.relu,
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
