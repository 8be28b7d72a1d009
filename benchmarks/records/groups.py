"""Records sorted into groups: what was measured together, on one machine, at one size of the workload."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.records.record import PASSES, TRAINING_STEP, Means, Record, means
from benchmarks.records.workloads import LAYER_NORM, NO_FORMAT, SWEEPS


@dataclass(frozen=True)
class RecordGroup:
    """Layers of one workload, machine and batch, or of a sweep; ``records`` are of the layers alone."""

    name: str
    records: tuple[Record, ...]

    @property
    def sweep(self) -> bool:
        """Whether the records are a series: each is of another size, and no means are made of them."""
        return in_sweep(self.records[0])

    @property
    def means(self) -> list[Means]:
        """Means of the fused layer; none of a sweep."""
        return [] if self.sweep else means(self.records)


BY_PLAN = "triton or cuda"  # the name where the plan of each call decides


def backend_of(record: Record) -> tuple[str, str]:
    """Name and detail of the backend: ``("cpu", "native C++, avx512")``."""
    name, _, detail = str(record.versions.get("backend", "unknown")).partition(": ")
    return name, detail


def in_sweep(record: Record) -> bool:
    """Whether it is one of a series over tasks or sizes."""
    return record.workload.partition("+")[0] in SWEEPS


def machine(record: Record) -> str:
    """Processor, threads and whether memory was fresh; or the accelerator."""
    if record.device != "cpu":
        return record.device
    fresh = ", fresh memory" * (record.versions.get("freed_memory") == "returned")
    return f"{record.versions.get('cpu', 'cpu')}, {record.versions.get('threads', '?')} threads{fresh}"


def batch(record: Record) -> str:
    """Tasks and samples of each, or what is known of them. The network's shape is that of its images."""
    if record.pass_ == TRAINING_STEP:
        samples = record.shape[0]
    elif record.tasks is None:
        return f"{record.shape[0]} samples of all tasks"
    else:
        samples = record.shape[0] // record.tasks
    return f"{_count(record.tasks)}batch {samples}"


def _count(tasks: int | None) -> str:
    return "" if tasks is None else f"{tasks} task{'s' * (tasks > 1)}, "


def kind_name(dtype: str, memory_format: str) -> str:
    """Names a dtype and a memory format, if there is one."""
    return dtype if memory_format == NO_FORMAT else f"{dtype}, {memory_format}"


def groups(records: Sequence[Record]) -> list[RecordGroup]:
    """The groups in the order of their first records. Two with the same name differ in their versions."""
    found: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        if record.pass_ in PASSES:
            versions = tuple(sorted(record.versions.items()))
            size = () if in_sweep(record) else (record.tasks, record.shape[0])
            found.setdefault((record.workload, record.device, versions, *size), []).append(record)
    names = [_name(group[0]) for group in found.values()]
    backends = [
        f"{name}, {group[0].versions.get('backend', '')}" for name, group in zip(names, found.values(), strict=True)
    ]
    return [
        RecordGroup(backend if names.count(name) > 1 else name, tuple(group))
        for name, backend, group in zip(names, backends, found.values(), strict=True)
    ]


def _name(record: Record) -> str:
    size = () if in_sweep(record) else (batch(record),)
    return ", ".join((record.workload, *size, machine(record)))


def positions(record: Record) -> int:
    """Positions of the slab of one task and channel; the record must name its tasks."""
    assert record.tasks is not None
    samples, _, *size = record.shape
    return samples // record.tasks * math.prod(size)


def series_of_tasks(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records that differ in the number of tasks alone, by what they have in common; two numbers at least."""
    return _series(
        records,
        lambda record: (record.layer, *record.shape[1:]),
        lambda record: record.tasks or 0,
        2,
        lambda record: f"{record.layer}, batch {record.shape[0] // (record.tasks or 1)}",
    )


def series_of_slabs(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records that differ in the size of the activation alone, by what they have in common; three sizes at least."""
    return _series(
        [record for record in records if record.norm != LAYER_NORM],
        lambda record: (record.tasks, record.shape[1]),
        positions,
        3,
        lambda record: f"{record.shape[1]} channels, {batch(record)}",
    )


def series_of_widths(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records of layer normalisation that differ in the length of a row alone, in activations of one size; three."""
    return _series(
        [record for record in records if record.norm == LAYER_NORM],
        lambda record: (record.tasks, math.prod(record.shape)),
        lambda record: record.shape[-1],
        3,
        lambda record: f"{math.prod(record.shape):,} values, {batch(record)}",
    )


def _series(
    records: Sequence[Record],
    common: Callable[[Record], tuple[object, ...]],
    place: Callable[[Record], int],
    least: int,
    name: Callable[[Record], str],
) -> dict[str, list[Record]]:
    """Records of which this, the samples, and everything but the sizes is common, if they have this many places."""
    found: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        if record.pass_ in PASSES and record.tasks is not None:
            samples, versions = record.shape[0] // record.tasks, tuple(sorted(record.versions.items()))
            kind = record.workload, record.dtype, record.memory_format, record.device, versions
            found.setdefault((*kind, samples, *common(record)), []).append(record)
    several = [group for group in found.values() if len({place(record) for record in group}) >= least]
    names = [f"{name(group[0])}\n{kind_name(group[0].dtype, group[0].memory_format)}" for group in several]
    return {
        text if names.count(text) == 1 else f"{text}\n{group[0].workload}, {machine(group[0])}": group
        for text, group in zip(names, several, strict=True)
    }
