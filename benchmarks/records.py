"""Records of measurements, and the means over layers that are made of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.peers import OURS
from benchmarks.workloads import NO_FORMAT, layers_named

FORWARD, FORWARD_BACKWARD = "forward", "forward+backward"
PASSES = (FORWARD, FORWARD_BACKWARD)
TRAINING_STEP = "training_step"  # of the whole network
# Tensors of the activation's size that must be read or written: x and y; and again x, dy and dx.
USEFUL_TENSORS = {FORWARD: 2, FORWARD_BACKWARD: 5}


@dataclass(frozen=True)
class Record:
    """One measurement. ``layer`` names all layers of the shape; ``pass_`` is ``pass`` in JSON.

    ``rounds`` and ``tasks`` are None in records of files that were written before they were kept.
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


@dataclass(frozen=True)
class Means:
    """Speed-ups of one implementation, geometric means over all layers of one pass, dtype and memory format.

    A record of two layers counts twice; 1-d layers, which have no memory format, count in both.
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

    @property
    def over_loop(self) -> float | None:
        return self.over.get("loop")

    @property
    def over_separate(self) -> float | None:
        """Over the fused layer with the ReLU behind it."""
        return self.over.get("separate")


def means(records: Iterable[Record], impl: str = "fused") -> list[Means]:
    """The means of ``impl`` against every other implementation that was measured with it."""
    medians: dict[tuple[str, str, str], dict[str, dict[str, Record]]] = {}
    flat = [record for record in records if record.pass_ in PASSES]
    formats = list(dict.fromkeys(r.memory_format for r in flat if r.memory_format != NO_FORMAT)) or [NO_FORMAT]
    for record in flat:
        for memory_format in formats if record.memory_format == NO_FORMAT else (record.memory_format,):
            group = medians.setdefault((record.pass_, record.dtype, memory_format), {})
            group.setdefault(record.layer, {})[record.impl] = record

    def mean(layers: Iterable[dict[str, Record]], value: Callable[[dict[str, Record]], float]) -> float:
        return geometric_mean([(value(layer), layer[impl].layers) for layer in layers])

    def ratio(peer: str) -> Callable[[dict[str, Record]], float]:
        return lambda layer: layer[peer].median_ms / layer[impl].median_ms

    result = []
    for key, group in medians.items():
        layers = list(group.values())
        if not all(impl in layer for layer in layers):
            continue
        others = [name for name in layers[0] if name != impl and all(name in layer for layer in layers)]
        ratios = {name: mean(layers, ratio(name)) for name in others}
        speedups = {name: ratio for name, ratio in ratios.items() if name not in OURS}
        peers = list(speedups)
        single = min(speedups, key=speedups.__getitem__, default=None)
        fastest = (
            mean(
                layers,
                lambda layer: min(layer[name].median_ms for name in layer if name not in OURS) / layer[impl].median_ms,
            )
            if peers
            else None
        )
        result.append(
            Means(
                *key,
                layers=sum(layer[impl].layers for layer in layers),
                over=ratios,
                over_fastest=fastest,
                single_fastest=single,
                over_single_fastest=speedups[single] if single else None,
                bandwidth=mean(layers, lambda layer: layer[impl].fraction_of_copy_bandwidth or math.nan),
            )
        )
    return result
