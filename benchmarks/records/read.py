"""Reads back what ``--json`` of the measuring commands wrote, and says what is wrong with it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from benchmarks.records.network_run import VARIANTS, Differences, NetworkRun, NetworkSteps
from benchmarks.records.record import PASSES, TRAINING_STEP, Record
from benchmarks.records.summary import Summary
from benchmarks.records.workloads import NORMS


class RecordsError(ValueError):
    """A file does not hold what it should; the message says which file, what came and how to mend it."""


def _is_count(value: Any, least: int = 1) -> bool:
    return type(value) is int and value >= least


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _all(value: Any, check: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(map(check, value))


def _are_versions(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(version, (str, int)) for version in value.values())


_EXPECTED: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("workload layer dtype memory_format impl device", "a text", lambda value: isinstance(value, str) and bool(value)),
    ("norm", " or ".join(NORMS), lambda value: value in NORMS),
    ("pass", " or ".join((*PASSES, TRAINING_STEP)), lambda value: value in (*PASSES, TRAINING_STEP)),
    ("median_ms copy_ms fraction_of_copy_bandwidth speedup_over_loop", "a finite number above 0", _is_time),
    ("iqr_ms", "a finite number, 0 or more", lambda value: value == 0 or _is_time(value)),
    ("useful_bytes rounds tasks", "a count of 1 or more", _is_count),
    ("outliers", "a count of 0 or more", lambda value: _is_count(value, 0)),
    ("shape", "a list of sizes", lambda value: _all(value, _is_count)),
    ("visits_ms", "a list of finite numbers above 0", lambda value: _all(value, _is_time)),
    ("versions", "texts and numbers by name", _are_versions),
    ("verified", "true: what was not verified is not reported", lambda value: value is True),
)
CHECKS = {name: (check, expected) for names, expected, check in _EXPECTED for name in names.split()}
_FIELDS = {field.name.rstrip("_"): field for field in fields(Record)}
_OF_A_LAYER = ("copy_ms", "useful_bytes", "fraction_of_copy_bandwidth")  # null in records of the network's step alone


def read_records(path: Path) -> list[Record]:
    """The records of a file; those of an older version lack the last fields.

    Raises:
        RecordsError: the file is missing, is no JSON, or holds something else than such records.
    """
    rows = _json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        beside = path.name.endswith(".network.json")
        hint = f"; give the records that lie beside it, {path.name.replace('.network', '')}" * beside
        raise RecordsError(f"{path} holds no list of records, which `--json FILE` of a measuring command writes{hint}")
    if not rows:
        raise RecordsError(f"{path} holds no record: the list is empty; measure again")
    for index, row in enumerate(rows):
        if problem := _problem(row):
            raise RecordsError(f"{path}, record {index} {problem}")
        if odd := row.keys() ^ rows[0].keys():
            raise RecordsError(
                f"{path} mixes records of two versions: only some have {', '.join(sorted(odd))}; give two files"
            )
    records = [Record(**{_FIELDS[name].name: _frozen(value) for name, value in row.items()}) for row in rows]
    check_distinct(records, str(path))
    return records


def _problem(row: dict[str, Any]) -> str | None:
    missing = [name for name, field in _FIELDS.items() if field.default is MISSING and name not in row]
    if missing:
        return f"has no {', '.join(missing)}: not what `--json FILE` of a measuring command writes"
    if unknown := row.keys() - _FIELDS.keys():
        return f"has {', '.join(sorted(unknown))}, unknown to these benchmarks: use the version that wrote it"
    for name, value in row.items():
        check, expected = CHECKS[name]
        absent = value is None and "None" in str(_FIELDS[name].type)
        if not (absent or check(value)) or (absent and name in _OF_A_LAYER and row["pass"] in PASSES):
            return f"has {json.dumps(value)} for {name}, expected {expected}"
    return None


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def check_distinct(records: Sequence[Record], source: str) -> None:
    """Every measurement must be there once for each machine and its versions.

    Raises:
        RecordsError: one is there twice.
    """
    seen = set()
    for record in records:
        if (key := (identity(record), tuple(sorted(record.versions.items())), record.device)) in seen:
            named = f"{record.layer} {record.dtype} {record.memory_format} {record.pass_} of {record.impl}"
            raise RecordsError(
                f"{source}: {named} is there twice; to see how two runs differ, `python -m benchmarks compare A B`"
            )
        seen.add(key)


def identity(record: Record) -> tuple[object, ...]:
    """What was measured, wherever it was."""
    of = record
    return of.workload, of.tasks, of.layer, of.shape, of.dtype, of.memory_format, of.pass_, of.impl


def network_file(path: Path) -> Path:
    """Where the training step's memory and differences lie, beside these records."""
    return path.with_suffix(".network.json")


def read_network(path: Path) -> NetworkRun | None:
    """The training step that was measured with the records of ``path``; None where there is no such file.

    Raises:
        RecordsError: there is one, and it holds something else.
    """
    beside = network_file(path)
    if not beside.exists():
        return None
    run = _json(beside)
    try:
        steps = run["comparison"]
        times = {name: Summary(**row | {"visits": tuple(row["visits"])}) for name, row in steps["times"].items()}
        differences = {name: Differences(**row) for name, row in steps["differences"].items()}
        peaks, losses = steps["peak_bytes"], steps["losses"]
        found = NetworkRun(**run | {"comparison": NetworkSteps(times, peaks, losses, differences)})
        if any(part.keys() != times.keys() for part in (peaks, losses, differences)):
            raise ValueError("times, peaks, losses and differences are of different variants")
        references = {variant.reference for variant in VARIANTS.values()}
        if unknown := (times.keys() - VARIANTS.keys()) | (references - times.keys()):
            raise ValueError(f"variants {', '.join(sorted(unknown))}: unknown, or missing")
        for name, time in times.items():
            if not (_is_time(time.median) and _is_time(peaks[name]) and time.iqr >= 0):
                raise ValueError(f"time and peak of {name!r} must be finite, and above 0")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecordsError(
            f"{beside} is not what `celeba40 --json` writes: {error}; remove it, or measure again"
        ) from None
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        written = "give what `--json FILE` of a measuring command wrote"
        raise RecordsError(f"{path} is no JSON ({error}); {written}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecordsError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}") from None
