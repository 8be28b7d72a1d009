"""Reads back what ``--json`` of the measuring commands wrote, and says what is wrong with it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from benchmarks.network_run import VARIANTS, Differences, NetworkRun, NetworkSteps
from benchmarks.records import PASSES, TRAINING_STEP, Record
from benchmarks.summaries import Summary


class RecordsError(ValueError):
    """A file does not hold what it should; the message says which file, what came and how to mend it."""


Check = tuple[Callable[[object], bool], str]  # whether a value will do, and what was expected


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check[0](value), f"{check[1]}, or null"


def _texts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(of, (str, int)) for of in value.values())


_TEXT: Check = lambda value: isinstance(value, str) and bool(value), "a text"
_COUNT: Check = (
    lambda value: isinstance(value, int) and not isinstance(value, bool) and value > 0,
    "a count of 1 or more",
)
_NUMBER_OF: Check = (
    lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
    "a count of 0 or more",
)
_POSITIVE: Check = lambda value: _number(value) and value > 0, "a finite number above 0"  # type: ignore[operator]
_TIMES: Check = (
    lambda value: isinstance(value, list) and bool(value) and all(map(_POSITIVE[0], value)),
    "a list of finite numbers above 0",
)
_SPREAD: Check = lambda value: _number(value) and value >= 0, "a finite number, 0 or more"  # type: ignore[operator]
_SHAPE: Check = lambda value: isinstance(value, list) and bool(value) and all(map(_COUNT[0], value)), "a list of sizes"
_PASS: Check = lambda value: value in (*PASSES, TRAINING_STEP), " or ".join((*PASSES, TRAINING_STEP))
CHECKS: dict[str, Check] = {
    "workload": _TEXT,
    "layer": _TEXT,
    "shape": _SHAPE,
    "dtype": _TEXT,
    "memory_format": _TEXT,
    "pass": _PASS,
    "impl": _TEXT,
    "median_ms": _POSITIVE,
    "iqr_ms": _SPREAD,
    "copy_ms": _or_none(_POSITIVE),
    "useful_bytes": _or_none(_COUNT),
    "fraction_of_copy_bandwidth": _or_none(_POSITIVE),
    "speedup_over_loop": _or_none(_POSITIVE),
    "verified": (lambda value: value is True, "true: what was not verified is not reported"),
    "device": _TEXT,
    "versions": (_texts, "texts and numbers by name"),
    "rounds": _or_none(_COUNT),
    "tasks": _or_none(_COUNT),
    "outliers": _or_none(_NUMBER_OF),
    "visits_ms": _or_none(_TIMES),
}
_REQUIRED = [field.name.rstrip("_") for field in fields(Record) if field.default is MISSING]
_OF_A_LAYER = ("copy_ms", "useful_bytes", "fraction_of_copy_bandwidth")


def read_records(path: Path) -> list[Record]:
    """The records of a file; those of an older version lack the last fields.

    Raises:
        RecordsError: the file is missing, is no JSON, or holds something else than such records.
    """
    rows = _json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        hint = f"; give the records that lie beside it, {path.name.replace('.network', '')}" * _is_beside(path)
        raise RecordsError(f"{path} holds no list of records, which `--json FILE` of a measuring command writes{hint}")
    if not rows:
        raise RecordsError(f"{path} holds no record: the list is empty; measure again")
    for index, row in enumerate(rows):
        where = f"{path}, record {index}"
        if missing := [name for name in _REQUIRED if name not in row]:
            raise RecordsError(
                f"{where} has no {', '.join(missing)}: not what `--json FILE` of a measuring command writes"
            )
        if unknown := [name for name in row if name not in CHECKS]:
            raise RecordsError(
                f"{where} has {', '.join(unknown)}, unknown to these benchmarks: use the version that wrote it"
            )
        if row.keys() != rows[0].keys():
            odd = ", ".join(sorted(row.keys() ^ rows[0].keys()))
            raise RecordsError(f"{path} mixes records of two versions: only some have {odd}; give two files")
        needed = _OF_A_LAYER if row["pass"] in PASSES else ()
        for name, value in row.items():
            fits, expected = CHECKS[name]
            if not fits(value) or (value is None and name in needed):
                raise RecordsError(f"{where}: {name} is {json.dumps(value)}, expected {expected}")
    records = [_record(row) for row in rows]
    check_distinct(records, str(path))
    return records


def check_distinct(records: list[Record], source: str) -> None:
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
    try:
        run = _json(beside)
        parts = run["comparison"]
        found = NetworkRun(
            NetworkSteps(
                {name: _summary(of) for name, of in parts["times"].items()},
                parts["peak_bytes"],
                parts["losses"],
                {name: Differences(**difference) for name, difference in parts["differences"].items()},
            ),
            run["tasks"],
            run["batch"],
            run["source"],
        )
        result = found.comparison
        names = set(result.times)
        if any(set(part) != names for part in (result.peak_bytes, result.losses, result.differences)):
            raise ValueError("times, peaks, losses and differences are of different variants")
        references = {variant.reference for variant in VARIANTS.values()}
        if unknown := (names - set(VARIANTS)) | (references - names):
            raise ValueError(f"variants {', '.join(sorted(unknown))}: unknown, or missing")
        for name, summary in result.times.items():
            if not all(map(_POSITIVE[0], (summary.median, result.peak_bytes[name]))) or not _SPREAD[0](summary.iqr):
                raise ValueError(f"time and peak of {name!r} must be finite, and above 0")
    except RecordsError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecordsError(
            f"{beside} is not what `celeba40 --json` writes: {error}; remove it, or measure again"
        ) from None
    return found


def _summary(values: dict[str, Any]) -> Summary:
    return Summary(**(values | {"visits": tuple(values["visits"])}))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise RecordsError(f"{path} cannot be read: {reason}") from None
    except json.JSONDecodeError as error:
        raise RecordsError(
            f"{path} is no JSON ({error}); give what `--json FILE` of a measuring command wrote"
        ) from None


def _is_beside(path: Path) -> bool:
    return path.name.endswith(".network.json")


def _record(row: dict[str, Any]) -> Record:
    values: dict[str, Any] = {
        "pass_" if name == "pass" else name: tuple(value) if isinstance(value, list) else value
        for name, value in row.items()
    }
    return Record(**values)
