"""Runs the steps one after the other within the time, and takes what an earlier call has finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import facts, results
from benchmarks.gpu_check.case import Setting
from benchmarks.gpu_check.results import StepResult
from benchmarks.gpu_check.steps import Step, for_backends
from benchmarks.gpu_check.supervise import Limits, Notify, run_step

CPU_PATIENCE = 4  # how much longer a case may take there before it is said to hang


@dataclass
class Check:
    """What was found so far, by steps; ``facts`` are the environment's, by its cases."""

    setting: Setting
    steps: list[StepResult] = field(default_factory=list)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0


def run(
    setting: Setting, seconds: float, notify: Notify, finished: Callable[[StepResult], None], *,
    steps: Sequence[Step], only: Collection[str] = (), fresh: bool = False,
) -> Check:  # fmt: skip
    """Runs the environment step, and of the others all, or ``only`` those named.

    Args:
        setting: the device and the folder of the results.
        seconds: for all of it.
        notify: is told of every event of a step.
        finished: is told of every step at its end.
        steps: in their order; the first is the environment.
        only: names of steps.
        fresh: forget what earlier calls have finished.
    """
    started = time.monotonic()
    folder = Path(setting.folder)
    check = Check(setting)

    def carry_out(step: Step, later: float, key: str) -> StepResult:
        """``later``: the share of the time that is left to the steps behind it."""
        result = StepResult(step.name, key)
        if not (fresh or step.always):
            result = results.load(folder, step.name, key)
        left = seconds * (1 - later) - (time.monotonic() - started)
        if reason := step.why_not(setting):
            result.left_out, result.reason = True, reason
        elif result.planned and not result.missing:
            pass  # an earlier call has done all of it
        elif left <= 0:
            result.reason = "no time was left"
        else:
            patience = step.case_seconds * (CPU_PATIENCE if setting.device == "cpu" else 1)
            limits = Limits(left, min(left, step.share * seconds), patience)
            where = replace(setting, backend=step.backend)
            run_step(step.cases, where, result, limits, folder, notify)
        check.steps.append(result)
        finished(result)
        check.seconds = time.monotonic() - started
        return result

    first, *others = steps
    environment = carry_out(first, sum(step.least for step in others), "")
    check.facts = {name: case.details for name, case in environment.cases.items() if case.status == "passed"}
    if facts.BACKENDS not in check.facts:
        return check
    backends, device = check.facts[facts.BACKENDS], check.facts.get(facts.DEVICE, {}).get("name")
    key = results.key_of(quick=setting.quick, device=device, versions=check.facts.get(facts.VERSIONS))
    for name, reason in backends["missing"].items():
        missing = StepResult(f"backend {name}", left_out=True, reason=reason)
        check.steps.append(missing)
        finished(missing)
    todo = for_backends([step for step in others if not only or step.name in only], backends["checked"])
    for index, step in enumerate(todo):
        carry_out(step, sum(later.least for later in todo[index + 1 :]), key)
    return check
