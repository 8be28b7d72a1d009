"""Cases, from their verification to their records."""

from __future__ import annotations

import pytest
import torch

from benchmarks.layers import run
from benchmarks.layers.cases import Case
from benchmarks.layers.registry import PEERS
from benchmarks.layers.verify import check
from benchmarks.records.workloads import BATCH_NORM, Layer
from benchmarks.timing.measure import Effort

CPU = torch.device("cpu")
CASES = [Case(Layer((name,), 4, (3, 3)), 2, 3, "float32", "contiguous", CPU) for name in ("a", "b")]
EFFORT = Effort(2, 2, 0.0, 0.0, visits=3)


def test_all_cases_are_visited_in_turns_and_verified_once(monkeypatch):
    stages, verified, shares = [], [], []

    def notify(text: str, share: float) -> None:
        stages.append(text)
        shares.append(share)

    def checked(name, case, *rest):
        verified.append((name, str(case)))
        return check(name, case, *rest)

    monkeypatch.setattr(run, "check", checked)
    records = run.run_cases(CASES, ["fused", "loop"], EFFORT, notify, print)
    assert verified == [(impl, f"{case} float32 contiguous") for case in "ab" for impl in ("fused", "loop")]
    started = [text.split(" float32 contiguous, visit ") for text in stages if text.endswith(": inputs")]
    assert started == [[case, f"{visit} of 3: inputs"] for visit in (1, 2, 3) for case in "ab"]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] < 1
    assert [(record.layer, record.impl, record.pass_) for record in records] == [
        (case, impl, pass_) for case in "ab" for impl in ("fused", "loop") for pass_ in run.PASSES
    ]
    assert all(record.rounds == 6 and len(record.visits_ms or ()) == 3 for record in records)


def test_later_visits_run_what_was_compiled_at_the_first():
    if reason := PEERS[BATCH_NORM]["compiled_reference"].unavailable(CPU):
        pytest.skip(reason)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    run.run_cases(CASES, ["compiled_reference"], EFFORT, lambda *_: None, print)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # both cases have the same shapes
