"""What a launch did: counts for each instruction and in total, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

_TOTALS = (
    "kernel", "target", "grid", "block", "cluster", "schedule", "seconds",
    "thread_instructions", "conflicts", "divergent_branches", "collisions",
)  # fmt: skip
_DIRECTIONS = [(space, what, what == "written") for space in ("global", "shared") for what in ("read", "written")]


class Row(NamedTuple):
    """The counts of one PTX instruction."""

    line: int
    text: str
    source: str
    opcode: str
    kind: str
    space: str
    warps: int  # times that a warp issued it
    threads: int
    requests: int  # times that a warp went to memory with it, at least one lane taking part
    bytes: int  # that all threads asked for
    sectors: int  # distinct 32-byte sectors of global memory, summed over requests
    conflicts: int  # shared-memory cycles beyond those that conflict-free banks would take
    divergent: int  # times that a branch parted a warp
    collisions: int  # stores to cells of shared memory where it had stored another value, with nothing to order the two

    @property
    def operation(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]


@dataclass(frozen=True)
class Traffic:
    """Accesses to one memory in one direction."""

    requests: int
    bytes: int
    sectors: int
    conflicts: int


@dataclass
class Report:
    """The counts of a launch."""

    kernel: str
    target: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    schedule: str
    seconds: float
    counted: Callable[[], list[Row]] = field(repr=False)  # makes the rows, for which few ask

    @cached_property
    def rows(self) -> list[Row]:
        """One row for each instruction of the kernel."""
        return self.counted()

    @cached_property
    def global_read(self) -> Traffic:
        """All that was read from global memory."""
        return self.traffic("global", False)

    @cached_property
    def global_written(self) -> Traffic:
        """All that was written to global memory."""
        return self.traffic("global", True)

    @property
    def thread_instructions(self) -> int:
        """The instructions that all threads executed."""
        return sum(r.threads for r in self.rows)

    @property
    def conflicts(self) -> int:
        """The cycles of shared memory that were lost to bank conflicts."""
        return sum(r.conflicts for r in self.rows)

    @property
    def divergent_branches(self) -> int:
        """The branches that parted a warp."""
        return sum(r.divergent for r in self.rows)

    @property
    def collisions(self) -> int:
        """The stores of a copy where the same instruction had stored another value."""
        return sum(r.collisions for r in self.rows)

    def traffic(self, space: str, writes: bool) -> Traffic:
        """All reads, or all writes and atomics, of "global" or "shared" memory."""
        writing = ("st", "stmatrix", "atom", "red")
        rows = [r for r in self.rows if r.bytes and r.space == space and (r.operation in writing) == writes]
        return Traffic(*(sum(getattr(r, name) for r in rows) for name in ("requests", "bytes", "sectors", "conflicts")))

    @property
    def barriers(self) -> int:
        """Barriers of blocks and clusters, counted once for each warp."""
        return sum(r.warps for r in self.rows if r.operation in ("bar", "barrier") and r.opcode != "bar.warp.sync")

    @property
    def instructions(self) -> dict[str, int]:
        """Warp instructions issued, by class, the most frequent first."""
        counts = {kind: sum(r.warps for r in self.rows if r.kind == kind) for kind in {r.kind for r in self.rows}}
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def to_json(self) -> str:
        """Totals and instructions as JSON."""
        data: dict[str, Any] = {name: getattr(self, name) for name in _TOTALS}
        data["instructions"] = [row._asdict() for row in self.rows]
        data |= {f"{space}_{what}": asdict(self.traffic(space, writes)) for space, what, writes in _DIRECTIONS}
        return json.dumps(data | {"barriers": self.barriers, "warp_instructions": self.instructions}, indent=1)

    def __str__(self) -> str:
        size = "x".join(map(str, self.grid)) + " blocks of " + "x".join(map(str, self.block)) + " threads"
        head = f"{'':14}{'requests':>10}{'bytes':>12}{'sectors':>10}{'sectors/request':>17}{'bank conflicts':>16}"
        lines = [f"{self.kernel} ({self.target}), {size}, schedule {self.schedule}", head]
        for space, what, writes in _DIRECTIONS:
            t, name = self.traffic(space, writes), f"{space} {what}"
            rest = f"{t.sectors:10}{t.sectors / max(1, t.requests):17.2f}" if space == "global" else f"{t.conflicts:43}"
            lines += [f"{name:14}{t.requests:10}{t.bytes:12}{rest}"] if t.requests else []
        issued = ", ".join(f"{count} {kind}" for kind, count in self.instructions.items() if count)
        lines.append(f"warp instructions: {issued}")
        collided = f", {self.collisions} collisions of copies" if self.collisions else ""
        lines.append(f"{self.barriers} at barriers, {self.divergent_branches} divergent branches{collided}")
        return "\n".join(lines)

    def table(self) -> str:
        """One line for each instruction that touches memory."""
        head = f"{'line':>6}{'requests':>10}{'bytes':>12}{'sectors':>9}{'per req.':>9}{'conflicts':>10}"
        lines = [head + "  instruction, source"]
        for r in (r for r in self.rows if r.bytes):
            counts = f"{r.line:6}{r.requests:10}{r.bytes:12}{r.sectors:9}{r.sectors / r.requests:9.2f}{r.conflicts:10}"
            lines.append(f"{counts}  {r.text}  {r.source}")
        return "\n".join(lines)
