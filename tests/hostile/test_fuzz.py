"""A short fuzz run, and proof that the judge sees what it is for. ``make fuzz`` is the long run."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from fuzz.__main__ import calls
from fuzz.calls import Call, judge
from fuzz.judge import check
from support.processes import python_path

from tsbn_kernels.definition.activations import TABLE
from tsbn_kernels.functional import task_batch_norm


def test_a_few_hundred_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", python_path())
    outcomes = list(calls(seed=0, count=300))
    failures = [(index, text, outcome) for index, text, outcome in outcomes if outcome.failed]
    assert not failures
    assert [index for index, _, _ in outcomes] == list(range(300))
    counts = Counter(outcome.kind for _, _, outcome in outcomes)
    assert counts["equal"] > 100
    assert counts["refused: TypeError"] > 20
    assert counts["refused: ValueError"] > 20


def test_some_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", python_path())
    outcomes = list(calls(seed=0, count=30, kind="programs"))
    assert [(index, text, outcome) for index, text, outcome in outcomes if outcome.kind != "equal"] == []
    texts = " ".join(text for _, text, _ in outcomes)
    seen = ("checkpoint model", "checkpoint layer", "compiled=None", "compiled=model", "hooks=True", "twice", "relu")
    assert [words for words in seen if words not in texts] == []


def _raise(error: Exception) -> Any:
    raise error


@pytest.mark.parametrize(
    ("run", "kind"),
    [
        (lambda: None, "equal"),
        (lambda: "0.5 instead of 0.25", "wrong"),
        (lambda: _raise(KeyError("gate")), "undocumented"),
        (lambda: _raise(ValueError("of somebody else")), "undocumented"),
        (lambda: task_batch_norm(torch.ones(2, 2), torch.ones(3, 3), num_tasks=1), "refused: ValueError"),
    ],
)
def test_the_judge(run: Callable[[], str | None], kind: str) -> None:
    assert judge(Call("", run, valid=False)).kind == kind


def test_the_judge_sees_changed_inputs_and_refusals() -> None:
    x = torch.zeros(4)
    assert (
        judge(Call("", lambda: x[1:2].add_(1) and None, True, [x[2:]])).kind == "changed"
    )  # in what the view leaves out
    refused = Call("", lambda: str(task_batch_norm(x, x, num_tasks=1)), valid=True)
    assert judge(refused).kind == "refused though valid"


@pytest.mark.parametrize("activation", [name for name, row in TABLE.items() if len(row.kinks) > 1])
@pytest.mark.parametrize("positions", [1, 17, 64])
def test_one_slope_is_judged_at_nan(activation: str, positions: int) -> None:
    weight = torch.full((1, 1), torch.nan, dtype=torch.float64)
    x, residual = torch.randn(2, 2, 1, positions, dtype=torch.float64)
    residual.requires_grad_()
    arguments = {"x": x, "weight": weight, "residual": residual, "num_tasks": 1, "activation": activation}

    def call(**leaves: torch.Tensor) -> torch.Tensor:
        return task_batch_norm(**{**arguments, **leaves})

    assert check(arguments, call, {}, Random(0)) is None


def test_crashes_are_outcomes_and_the_run_goes_on() -> None:
    worker = """
import json, os, sys
for index in range(int(sys.argv[2]), int(sys.argv[3])):
    print(json.dumps({"begin": index, "text": f"call {index}"}), flush=True)
    if index % 2:
        os.abort()
    print(json.dumps({"end": index, "kind": "equal", "detail": ""}), flush=True)
"""
    outcomes = list(calls(0, 4, (sys.executable, "-c", worker)))
    assert [(index, text, outcome.kind) for index, text, outcome in outcomes] == [
        (0, "call 0", "equal"),
        (1, "call 1", "crashed"),
        (2, "call 2", "equal"),
        (3, "call 3", "crashed"),
    ]
    assert outcomes[1][2].detail == "SIGABRT"
