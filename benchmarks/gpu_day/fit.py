"""What a sweep says of the plans' rules: how far a choice is from the fastest plan, and which constants do better."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any
from unittest import mock

from benchmarks.gpu_day.constants import CONSTANTS, Constant, changed
from benchmarks.gpu_day.sweep import BACKENDS, describe, numbers_of, rule_of
from benchmarks.profile.predict import work_of
from tsbn_kernels.backends.plan import Device, Work
from tsbn_kernels.backends.plan import cuda as cuda_rules
from tsbn_kernels.backends.plan import triton as triton_rules
from tsbn_kernels.backends.plan.expect import expected

ALLOWED = 1.1  # times the fastest plan's: so slow may a rule's choice be
UNMEASURED = math.log(10)  # what a choice costs of which no time is known: no fit may lead there
Values = Mapping[Constant, float]


@dataclass(frozen=True)
class MeasuredPass:
    """A pass of a layer by a backend.

    Attributes:
        times: the milliseconds that its plans took, by their description.
        clustered: whether the Triton that was measured has clusters.
        clusters: how many of a CUDA C++ plan ran at a time.
    """

    name: str
    backend: str
    work: Work
    device: Device
    copy_ms: float
    times: dict[str, float]
    clustered: bool
    clusters: cuda_rules.Clusters

    @property
    def fastest(self) -> str:
        """The plan that took the least time."""
        return min(self.times, key=lambda plan: self.times[plan])

    @property
    def best_ms(self) -> float:
        """Its time."""
        return self.times[self.fastest]


@dataclass(frozen=True)
class Choice:
    """What a rule says for a pass, and what that should take and took: None where nobody measured it."""

    of: MeasuredPass
    plan: str
    predicted_ms: float
    ms: float | None

    @property
    def regret(self) -> float | None:
        """Its time over that of the fastest plan."""
        return None if self.ms is None else self.ms / self.of.best_ms

    @property
    def of_copy(self) -> float | None:
        """Rate at which useful bytes were moved, over a copy's."""
        work = self.of.work
        return None if self.ms is None else work.useful_bytes / self.ms / (2 * work.activation_bytes / self.of.copy_ms)

    @property
    def is_slow(self) -> bool:
        """Whether another plan is faster by more than is allowed."""
        return self.regret is not None and self.regret > ALLOWED


@dataclass(frozen=True)
class RulesFit:
    """The rules of a backend as they are, and with constants that were chosen for these passes.

    Attributes:
        now, then: a choice for each pass.
        values: the constants that change.
    """

    backend: str
    now: list[Choice]
    then: list[Choice]
    values: dict[Constant, float]

    @property
    def wrong(self) -> list[Choice]:
        """Choices that no constant mends: there the rule itself is wrong."""
        return [choice for choice in self.then if choice.is_slow]


def passes(records: Iterable[Mapping[str, Any]]) -> list[MeasuredPass]:
    """The passes of which a time is known."""
    planned = [record for record in records if "plan" in record]
    clustered = any((one["backend"], one["plan"]["variant"]) == ("triton", "cluster") for one in planned)
    found: dict[tuple[Any, ...], MeasuredPass] = {}
    known: defaultdict[tuple[Any, ...], dict[str, int]] = defaultdict(dict)
    for record in planned:
        plan, names = describe(record["plan"]), [str(record[name]) for name in ("layer", "dtype", "format", "pass")]
        key = *names, record["backend"], tuple(record["shape"]), record["device"]["name"]
        if "at_a_time" in record:
            known[key][plan] = record["at_a_time"]
        if "ms" not in record:
            continue
        if key not in found:
            work = work_of(record["shape"], record["tasks"], *names[1:])  # type: ignore[arg-type]
            device, clusters = Device(**record["device"]), partial(_at_a_time, known[key])
            own = record["backend"], work, device, record["copy_ms"]
            found[key] = MeasuredPass(" ".join(names), *own, {}, clustered, clusters)
        found[key].times[plan] = record["ms"]
    return list(found.values())


def _at_a_time(known: Mapping[str, int], plan: cuda_rules.CudaPlan) -> int:
    """How many clusters of a plan run at a time, by the driver of the sweep where it was asked."""
    on_paper = cuda_rules.clusters_on_paper(plan)
    return known.get(describe(numbers_of(plan)), on_paper) if known else on_paper


def choices(of: Iterable[MeasuredPass], values: Values) -> list[Choice]:
    """What the rules say with these constants."""
    with changed(values):
        return [_choice(one) for one in of]


def _choice(one: MeasuredPass) -> Choice:
    with mock.patch.object(triton_rules, "compiles_clusters", return_value=one.clustered):
        plan = rule_of(one.backend, one.work, one.device, one.clusters)
    if isinstance(plan, cuda_rules.CudaPlan):
        seconds = cuda_rules.seconds(plan, one.clusters)
    else:
        seconds = expected(plan).seconds
    name = describe(numbers_of(plan))
    return Choice(one, name, 1e3 * seconds, one.times.get(name))


def cost(found: list[Choice]) -> tuple[float, float]:
    """Mean logarithms: of the regret, and beside it of what the prediction is off by."""
    regrets = [UNMEASURED if choice.regret is None else math.log(choice.regret) for choice in found]
    errors = [abs(math.log(choice.ms / choice.predicted_ms)) for choice in found if choice.ms is not None]
    return round(fmean(regrets), 4), round(fmean(errors or [0.0]), 2)


def fit(backend: str, of: list[MeasuredPass]) -> RulesFit:
    """The constants that cost least: one is changed at a time, while that helps."""
    values: dict[Constant, float] = {}
    now = then = choices(of, values)
    while True:
        tried = [
            values | {constant: value}
            for constant in CONSTANTS[backend]
            for value in constant.values
            if value != values.get(constant, constant.value)
        ]
        outcomes = [choices(of, each) for each in tried]
        best = min(range(len(tried)), key=lambda index: cost(outcomes[index]))
        if cost(outcomes[best]) >= cost(then):
            return RulesFit(backend, now, then, {c: value for c, value in values.items() if value != c.value})
        values, then = tried[best], outcomes[best]


def fits(records: Iterable[Mapping[str, Any]]) -> list[RulesFit]:
    """One for each backend of which times are known."""
    found = passes(records)
    by_backend = {name: [one for one in found if one.backend == name] for name in BACKENDS}
    return [fit(name, of) for name, of in by_backend.items() if of]
