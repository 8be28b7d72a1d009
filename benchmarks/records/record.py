"""Records of measurements, and the means over layers that are made of them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.records.intervals import Interval, interval
from benchmarks.records.workloads import NO_FORMAT, layers_named

FORWARD, FORWARD_BACKWARD = "forward", "forward+backward"
PASSES = (FORWARD, FORWARD_BACKWARD)
TRAINING_STEP = "training_step"  # of the whole network
# Tensors of the activation's size that must be read or written: x and y; and again x, dy and dx.
USEFUL_TENSORS = {FORWARD: 2, FORWARD_BACKWARD: 5}
OURS = ("fused", "separate", "equal")  # implementations that are the fused layer; all others are its peers


@dataclass(frozen=True)
class Record:
    """One measurement. ``layer`` names all layers of the shape; ``pass_`` is ``pass`` in JSON.

    The last fields are None in records of files that were written before they were kept. ``visits_ms`` are the medians
    of the visits, which lie minutes apart and tell how far two runs may differ. Without a
    ``norm`` it was batch normalisation.
    """

    workload: str
    layer: str
    shape: tuple[int, ...]
    dtype: str
    memory_format: str
    pass_: str
    impl: str
    median_ms: float
    iqr_ms: float
    copy_ms: float | None
    useful_bytes: int | None
    fraction_of_copy_bandwidth: float | None
    speedup_over_loop: float | None
    verified: bool
    device: str
    versions: Mapping[str, str | int]
    rounds: int | None = None
    tasks: int | None = None
    outliers: int | None = None
    visits_ms: tuple[float, ...] | None = None
    norm: str | None = None

    @property
    def layers(self) -> int:
        """How many layers of the network the record stands for."""
        return layers_named(self.layer)

    @property
    def copies(self) -> float:
        """The median in copies of the activation."""
        return self.median_ms / self.copy_ms if self.copy_ms else math.nan

    def as_json(self) -> dict[str, object]:
        return {key.rstrip("_"): value for key, value in asdict(self).items()}


def fraction_of_copy_bandwidth(useful_bytes: int, median: float, tensor_bytes: int, copy: float) -> float:
    """Useful bytes per time, over the bytes per time of a copy, which reads and writes the tensor once."""
    return (useful_bytes / median) / (2 * tensor_bytes / copy)


def write_json(path: Path, records: Iterable[Record]) -> None:
    """Writes a list of records; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([record.as_json() for record in records], indent=1) + "\n")


def geometric_mean(values: Sequence[tuple[float, int]]) -> float:
    """Geometric mean of (value, how often it counts)."""
    return math.exp(sum(count * math.log(value) for value, count in values) / sum(count for _, count in values))


FASTEST = "fastest peer of each layer"


@dataclass(frozen=True)
class Means:
    """Speed-ups of one implementation, geometric means over all layers of one pass, dtype and memory format.

    A record of two layers counts twice; 1-d layers, which have no memory format, count in both. Each visit gives a mean
    over the layers; a speed-up is the geometric mean of these. The intervals are of ``over`` by the implementation, and
    of ``over_fastest`` under :data:`FASTEST`; records of one visit have none, and their medians stand for it.
    """

    pass_: str
    dtype: str
    memory_format: str
    layers: int
    over: Mapping[str, float]  # over each implementation that was measured at every layer
    over_fastest: float | None  # over the peer that is fastest at each layer
    single_fastest: str | None  # the peer that is fastest over all layers
    over_single_fastest: float | None
    bandwidth: float  # fraction of the bandwidth of a copy
    intervals: Mapping[str, Interval]

    @property
    def over_loop(self) -> float | None:
        return self.over.get("loop")

    @property
    def over_separate(self) -> float | None:
        """Over the fused layer with the ReLU behind it."""
        return self.over.get("separate")


Time = Callable[[Record], float]  # milliseconds of a record: of all its visits, or of one
Value = Callable[[Mapping[str, Record], Time], float]  # of the records of one layer, by implementation


def _median(record: Record) -> float:
    return record.median_ms


def _visit(number: int) -> Time:
    return lambda record: (record.visits_ms or ())[number]


def _mean(layers: Sequence[Mapping[str, Record]], value: Value, time: Time) -> float:
    return geometric_mean([(value(layer, time), next(iter(layer.values())).layers) for layer in layers])


def _of_visits(layers: Sequence[Mapping[str, Record]], value: Value) -> list[float]:
    """The mean over the layers by each visit, or by the medians where there was but one."""
    visits = min(len(record.visits_ms or ()) for layer in layers for record in layer.values())
    times = [_visit(number) for number in range(visits)] if visits > 1 else [_median]
    return [_mean(layers, value, time) for time in times]


def means(records: Iterable[Record], impl: str = "fused") -> list[Means]:
    """The means of ``impl`` against every other implementation that was measured with it."""
    groups: dict[tuple[str, str, str], dict[str, dict[str, Record]]] = {}
    flat = [record for record in records if record.pass_ in PASSES]
    formats = list(dict.fromkeys(r.memory_format for r in flat if r.memory_format != NO_FORMAT)) or [NO_FORMAT]
    for record in flat:
        for memory_format in formats if record.memory_format == NO_FORMAT else (record.memory_format,):
            group = groups.setdefault((record.pass_, record.dtype, memory_format), {})
            group.setdefault(record.layer, {})[record.impl] = record
    complete = {key: list(group.values()) for key, group in groups.items()}
    return [_means(key, layers, impl) for key, layers in complete.items() if all(impl in layer for layer in layers)]


def _means(key: tuple[str, str, str], layers: Sequence[Mapping[str, Record]], impl: str) -> Means:
    def over(peer: str) -> Value:
        return lambda layer, time: time(layer[peer]) / time(layer[impl])

    def over_fastest(layer: Mapping[str, Record], time: Time) -> float:
        return time(min((layer[name] for name in layer if name not in OURS), key=_median)) / time(layer[impl])

    values = {name: over(name) for name in layers[0] if name != impl and all(name in layer for layer in layers)}
    if any(name not in OURS for name in values):
        values[FASTEST] = over_fastest
    of_visits = {name: _of_visits(layers, value) for name, value in values.items()}
    ratios = {name: statistics.geometric_mean(found) for name, found in of_visits.items()}
    fastest = ratios.pop(FASTEST, None)
    speedups = {name: ratio for name, ratio in ratios.items() if name not in OURS}
    single = min(speedups, key=speedups.__getitem__, default=None)
    intervals = {name: interval(found) for name, found in of_visits.items()}
    return Means(
        *key,
        layers=sum(layer[impl].layers for layer in layers),
        over=ratios,
        over_fastest=fastest,
        single_fastest=single,
        over_single_fastest=None if single is None else speedups[single],
        bandwidth=_mean(layers, lambda layer, _: layer[impl].fraction_of_copy_bandwidth or math.nan, _median),
        intervals={name: found for name, found in intervals.items() if found is not None},
    )
