"""Nsight Compute: the command that measures our kernels, and the reader of the table that it writes."""

from __future__ import annotations

import csv
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SECONDS = "gpu__time_duration.sum"
READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
MEMORY_SHARE = "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed"
OCCUPANCY = "sm__warps_active.avg.pct_of_peak_sustained_active"
REGISTERS = "launch__registers_per_thread"
LOCAL_LOADS = "smsp__inst_executed_op_local_ld.sum"  # of what was spilled: there should be none
LOCAL_STORES = "smsp__inst_executed_op_local_st.sum"
SECTORS = (
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio"  # 16 for whole 16-byte accesses of a warp
)
METRICS = (SECONDS, READ, WRITTEN, MEMORY_SHARE, OCCUPANCY, REGISTERS, LOCAL_LOADS, LOCAL_STORES, SECTORS)

# Of what has a unit; the others are shares and counts.
_SCALES = {
    "byte": 1.0,
    "Kbyte": 1e3,
    "Mbyte": 1e6,
    "Gbyte": 1e9,
    "second": 1.0,
    "msecond": 1e-3,
    "usecond": 1e-6,
    "nsecond": 1e-9,
    "s": 1.0,
    "ms": 1e-3,
    "us": 1e-6,
    "ns": 1e-9,
}


class NcuError(ValueError):
    """A file that is not a table of Nsight Compute with our metrics."""


@dataclass(frozen=True)
class MeasuredLaunch:
    """One launch: seconds, bytes, shares in percent, counts; NaN is what this ncu does not count on this GPU."""

    kernel: str
    values: dict[str, float]

    @property
    def bytes_per_second(self) -> float:
        """Bytes a second from and to memory."""
        return (self.values[READ] + self.values[WRITTEN]) / self.values[SECONDS]


def command(kernels: Sequence[str] | None, csv_path: Path, program: Sequence[str]) -> str:
    """The command line that measures every launch of ``kernels`` while ``program`` runs, into ``csv_path``.

    Without ``kernels`` all that the program launches between the profiler's start and its stop. The clocks are left
    alone, so that the times are those of a run without ncu.
    """
    options = {
        "--page": "raw",
        "--print-units": "base",
        "--log-file": str(csv_path),
        "--clock-control": "none",
        "--kernel-name-base": "mangled",
        "--metrics": ",".join(METRICS),
    }
    if kernels is None:
        options["--profile-from-start"] = "off"
    else:
        options["--kernel-name"] = "regex:^(" + "|".join(re.escape(name) for name in kernels) + ")$"
    return shlex.join(["ncu", "--csv", *(part for option in options.items() for part in option), *program])


def read(path: Path) -> list[MeasuredLaunch]:
    """The launches of a file that :func:`command` wrote.

    Raises:
        NcuError: it has no such table, or a time or bytes in another unit than expected.
    """
    lines = [line for line in path.read_text().splitlines() if line.startswith('"')]  # ncu's own messages start with ==
    header, units, *rows = csv.reader(lines) if len(lines) >= 2 else ([], [])
    missing = [name for name in ("Kernel Name", SECONDS) if name not in header]
    if missing:
        raise NcuError(f"{path} has no column {', '.join(missing)}; write it with the command that profile prints")
    launches = []
    for row in rows:
        cells = dict(zip(header, zip(row, units, strict=True), strict=True))
        values = {name: _value(path, name, *cells.get(name, ("", ""))) for name in METRICS}
        launches.append(MeasuredLaunch(cells["Kernel Name"][0], values))
    return launches


def _value(path: Path, name: str, text: str, unit: str) -> float:
    try:
        number = float(text.replace(",", ""))
    except ValueError:  # "n/a"
        return math.nan
    if name not in (SECONDS, READ, WRITTEN):
        return number
    if unit not in _SCALES:
        raise NcuError(f"{path} has {name} in {unit!r}; known are {', '.join(_SCALES)}")
    return number * _SCALES[unit]
