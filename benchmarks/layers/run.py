"""Layers: every case is verified, then measured, in several visits."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch

from benchmarks.layers.cases import Case, Inputs
from benchmarks.layers.peer import Peer
from benchmarks.layers.registry import PEERS, why_not
from benchmarks.layers.verify import Expected, check, outcome_of
from benchmarks.records.record import OURS, PASSES, USEFUL_TENSORS, Record, fraction_of_copy_bandwidth
from benchmarks.records.summary import Summary
from benchmarks.timing import environment, host_memory
from benchmarks.timing.measure import (
    Candidate,
    Effort,
    Rounds,
    copy_candidate,
    measure,
    rotating_buffers,
    summarize,
    timer_for,
    training_candidate,
)
from tsbn_kernels import memory

COPY = "copy"
FULL_EFFORT, QUICK_EFFORT = Effort(), Effort(max_rounds=3, visits=3)

Notify = Callable[[str, float], None]  # says what is being done, and which share (0 to 1) is done
Tell = Callable[[str], object]  # says what is left out


def run_cases(cases: Sequence[Case], impls: Sequence[str], effort: Effort, notify: Notify, tell: Tell) -> list[Record]:
    """Verifies and measures the implementations that have a part in each case; two records for each.

    Each case is visited ``effort.visits`` times, and verified at the first one; between two visits lie all other cases.
    So the visits see the machine at different times and memory in other places, and differ as two runs do. A peer that
    fails, ours excepted, is left out of the case, and ``tell`` is told.

    Raises:
        MismatchError: an implementation's results are wrong; it was not timed.
    """
    total = effort.visits * work(cases)
    done = 0.0
    taking_part = {case: [impl for impl in impls if why_not(impl, case) is None] for case in cases}
    visits: dict[Case, list[dict[str, Rounds]]] = {case: [] for case in cases}
    # What was compiled at the first visit serves the later ones, but for what holds a module of its own.
    with torch._dynamo.config.patch(recompile_limit=effort.visits * len(cases) + 1):
        for number in range(effort.visits):
            for case in cases:

                def on_stage(text: str, case: Case = case, done: float = done, number: int = number) -> None:
                    notify(f"{case}, visit {number + 1} of {effort.visits}: {text}", done / total)

                on_stage("inputs")
                inputs = case.inputs()
                if number == 0:
                    peers = _verified(case, taking_part[case], inputs, on_stage, tell)
                    taking_part[case] = list(peers)
                else:
                    peers = {impl: PEERS[case.norm][impl](case, inputs) for impl in taking_part[case]}
                visits[case].append(_visit(case, inputs, peers, effort, on_stage))
                del inputs, peers
                gc.collect()
                memory.empty_cache()
                host_memory.release()
                done += work([case])
    return [record for case, of in visits.items() for record in records_of(case, summarize(*of))]


def work(cases: Sequence[Case]) -> float:
    """How long cases take, in no unit, for a progress bar: their bytes, and a constant for compiling."""
    return sum(case.tensor_bytes / 2**20 + 100 for case in cases)


def part_of(notify: Notify, start: float, end: float) -> Notify:
    """Tells of a part of the whole, from one share of it to another."""
    return lambda text, share: notify(text, start + share * (end - start))


def _verified(
    case: Case, impls: Sequence[str], inputs: Inputs, on_stage: Callable[[str], None], tell: Tell
) -> dict[str, Peer]:
    on_stage("reference")
    expected = Expected.of(case, inputs)
    peers = {}
    for impl in impls:
        on_stage(f"verifying {impl}")
        try:
            peer = PEERS[case.norm][impl](case, inputs)
            outcome = outcome_of(peer)
        except Exception as error:
            if impl in OURS:
                raise
            tell(f"{impl} is left out of {case}: {type(error).__name__}: {error}")
            continue
        check(impl, case, outcome, expected)
        peers[impl] = peer
        del outcome
    return peers


def _visit(
    case: Case, inputs: Inputs, peers: dict[str, Peer], effort: Effort, on_stage: Callable[[str], None]
) -> dict[str, Rounds]:
    buffers = rotating_buffers(2 * case.tensor_bytes, environment.cache_bytes(case.device))
    candidates: dict[str, Candidate] = {COPY: copy_candidate(inputs.x, buffers)}
    for impl, peer in peers.items():
        peer.rotate_over(buffers)
        candidates[impl] = training_candidate(peer.forward, peer.backward, peer.next_buffers)
    on_stage("warming up")
    return measure(candidates, effort, timer_for(case.device), lambda count: on_stage(f"round {count}"))


def records_of(case: Case, summaries: dict[str, list[Summary]]) -> list[Record]:
    """Two records for each implementation; the summaries of a copy's time are among them."""
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
                    outliers=summary.outliers,
                    visits_ms=tuple(1e3 * visit for visit in summary.visits),
                    norm=case.norm,
                )
            )
    return records
