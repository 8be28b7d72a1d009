"""Layers: every case is verified, then measured, in several visits."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks import environment
from benchmarks.measure import (
    Candidate,
    Plan,
    Rounds,
    Summary,
    copy_candidate,
    measure,
    rotating_buffers,
    summarize,
    timer_for,
    training_candidate,
)
from benchmarks.peers import PEERS, Peer
from benchmarks.records import PASSES, USEFUL_TENSORS, Record, fraction_of_copy_bandwidth
from benchmarks.verify import Expected, check, outcome_of
from benchmarks.workloads import Case, Inputs
from tsbn_kernels import memory

COPY = "copy"

# Says what is being done, and which share (0 to 1) of all is done.
Notify = Callable[[str, float], None]


def runnable(impls: Sequence[str], device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The implementations that can run on the device, and why the others cannot."""
    reasons = {impl: reason for impl in impls if (reason := PEERS[impl].unavailable(device)) is not None}
    return [impl for impl in impls if impl not in reasons], reasons


def run_cases(cases: Sequence[Case], impls: Sequence[str], plan: Plan, notify: Notify) -> list[Record]:
    """Verifies and measures all implementations of all cases; two records for each.

    Each case is visited ``plan.visits`` times, and verified at the first one; between two visits lie all other cases.
    So the visits see the machine at different times and memory in other places, and differ as two runs do.

    Raises:
        MismatchError: an implementation's results are wrong; it was not timed.
    """
    total = plan.visits * sum(map(_work, cases))
    done = 0.0
    visits: dict[Case, list[dict[str, Rounds]]] = {case: [] for case in cases}
    # What was compiled at the first visit serves the later ones: one graph for each case.
    with torch._dynamo.config.patch(recompile_limit=len(cases) + 1):
        for visit in range(plan.visits):
            for case in cases:

                def on_stage(text: str, case: Case = case, done: float = done, number: int = visit) -> None:
                    notify(f"{case}, visit {number + 1} of {plan.visits}: {text}", done / total)

                visits[case].append(_visit(case, impls, plan, on_stage, verified=visit > 0))
                done += _work(case)
    return [record for case, of in visits.items() for record in _records(case, summarize(*of))]


def _work(case: Case) -> float:
    """Share of a case in the progress bar: its bytes, and a constant for compiling."""
    return case.tensor_bytes / 2**20 + 100


def _visit(
    case: Case, impls: Sequence[str], plan: Plan, on_stage: Callable[[str], None], verified: bool
) -> dict[str, Rounds]:
    on_stage("inputs")
    inputs = case.inputs()
    peers: dict[str, Peer] = {}
    if verified:
        peers = {impl: PEERS[impl](case, inputs) for impl in impls}
    else:
        for impl, peer in _verified_peers(case, impls, inputs, on_stage):
            peers[impl] = peer
    buffers = rotating_buffers(2 * case.tensor_bytes, environment.cache_bytes(case.device))
    candidates: dict[str, Candidate] = {COPY: copy_candidate(inputs.x, buffers)}
    for impl, peer in peers.items():
        peer.rotate_over(buffers)
        candidates[impl] = training_candidate(peer.forward, peer.backward, peer.next_buffers)
    on_stage("warming up")
    rounds = measure(candidates, plan, timer_for(case.device), lambda count: on_stage(f"round {count}"))
    del candidates, peers, inputs
    gc.collect()
    memory.empty_cache()
    return rounds


def _verified_peers(
    case: Case, impls: Sequence[str], inputs: Inputs, on_stage: Callable[[str], None]
) -> Iterator[tuple[str, Peer]]:
    on_stage("reference")
    expected = Expected.of(case, inputs)
    for impl in impls:
        on_stage(f"verifying {impl}")
        peer = PEERS[impl](case, inputs)
        check(impl, case, outcome_of(peer), expected)
        yield impl, peer


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
                    outliers=summary.outliers,
                    visits_ms=tuple(1e3 * visit for visit in summary.visits),
                    tasks=case.tasks,
                )
            )
    return records
