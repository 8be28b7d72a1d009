"""What a launch did: counts for each instruction and in total, as a table and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """The counts of one PTX instruction."""

    line: int
    text: str
    source: str
    opcode: str
    kind: str
    space: str
    warps: int
    """Times that a warp issued it."""
    threads: int
    requests: int
    """Times that a warp went to memory with it, at least one lane taking part."""
    bytes: int
    """Asked for by all threads."""
    sectors: int
    """Distinct 32-byte sectors of global memory, summed over warps."""
    conflicts: int
    """Shared-memory cycles beyond those that conflict-free banks would take."""
    divergent: int
    """Times that a branch parted a warp."""
    collisions: int
    """Cells of shared memory for which lanes of one store had different values."""

    @property
    def operation(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def writes(self) -> bool:
        """Whether it is a store; an atomic counts as a write."""
        return self.operation in ("st", "stmatrix", "atom", "red")

    @property
    def sectors_per_request(self) -> float:
        """32-byte sectors per warp-wide access."""
        return self.sectors / self.requests if self.requests else 0.0


@dataclass(frozen=True)
class Traffic:
    """Accesses to one memory in one direction."""

    requests: int = 0
    bytes: int = 0
    sectors: int = 0
    conflicts: int = 0

    @staticmethod
    def of(rows: Iterable[Row]) -> Traffic:
        """The sum over instructions."""
        chosen = list(rows)
        return Traffic(*(sum(getattr(r, name) for r in chosen) for name in ("requests", "bytes", "sectors", "conflicts")))


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
    rows: list[Row] = field(repr=False)

    def traffic(self, space: str, writes: bool) -> Traffic:
        """All reads or writes of "global" or "shared" memory."""
        return Traffic.of(r for r in self.rows if r.kind == "memory" and r.space == space and r.writes == writes)

    @property
    def global_read(self) -> Traffic:
        """Reads of global memory."""
        return self.traffic("global", False)

    @property
    def global_written(self) -> Traffic:
        """Writes to global memory."""
        return self.traffic("global", True)

    @property
    def conflicts(self) -> int:
        """Shared-memory cycles lost to bank conflicts."""
        return sum(r.conflicts for r in self.rows)

    @property
    def barriers(self) -> int:
        """Barriers of blocks and clusters, counted once for each warp."""
        return sum(r.warps for r in self.rows if r.operation in ("bar", "barrier") and r.opcode != "bar.warp.sync")

    @property
    def divergent_branches(self) -> int:
        """Branches that parted a warp."""
        return sum(r.divergent for r in self.rows)

    @property
    def instructions(self) -> dict[str, int]:
        """Warp instructions issued, by class."""
        counts: Counter[str] = Counter()
        for row in self.rows:
            counts[row.kind] += row.warps
        return dict(counts)

    @property
    def thread_instructions(self) -> int:
        """Instructions that threads executed."""
        return sum(r.threads for r in self.rows)

    def summary(self) -> dict[str, Any]:
        """The totals."""
        return {
            "kernel": self.kernel, "target": self.target, "grid": self.grid, "block": self.block, "cluster": self.cluster,
            "schedule": self.schedule, "seconds": round(self.seconds, 6),
            "global_read": asdict(self.global_read), "global_written": asdict(self.global_written),
            "shared_read": asdict(self.traffic("shared", False)), "shared_written": asdict(self.traffic("shared", True)),
            "warp_instructions": self.instructions, "thread_instructions": self.thread_instructions,
            "barriers": self.barriers, "divergent_branches": self.divergent_branches,
        }  # fmt: skip

    def to_json(self) -> str:
        """Totals and instructions as JSON."""
        return json.dumps(self.summary() | {"instructions": [asdict(r) for r in self.rows]}, indent=1)

    def __str__(self) -> str:
        size = "x".join(map(str, self.grid)) + " blocks of " + "x".join(map(str, self.block)) + " threads"
        lines = [f"{self.kernel} ({self.target}), {size}, schedule {self.schedule}",
                 f"{'':18}{'requests':>10}{'bytes':>12}{'sectors':>10}{'sectors/request':>17}{'bank conflicts':>16}"]
        for space in ("global", "shared"):
            for name, writes in (("read", False), ("written", True)):
                t = self.traffic(space, writes)
                if t.requests:
                    per = f"{t.sectors / t.requests:17.2f}" if space == "global" else f"{'':17}"
                    conflicts = f"{t.conflicts:16}" if space == "shared" else ""
                    lines.append(f"{space + ' ' + name:18}{t.requests:10}{t.bytes:12}{t.sectors or '':>10}{per}{conflicts}".rstrip())
        issued = ", ".join(f"{count} {kind}" for kind, count in sorted(self.instructions.items(), key=lambda kv: -kv[1]) if count)
        lines.append(f"warp instructions: {issued}; {self.barriers} at barriers, {self.divergent_branches} divergent branches")
        return "\n".join(lines)

    def table(self) -> str:
        """One line for each instruction that touches memory."""
        lines = [f"{'line':>6}{'requests':>10}{'bytes':>12}{'sectors':>9}{'per req.':>9}{'conflicts':>10}  instruction, source"]
        for r in self.rows:
            if r.bytes:
                lines.append(f"{r.line:6}{r.requests:10}{r.bytes:12}{r.sectors:9}{r.sectors_per_request:9.2f}{r.conflicts:10}  {r.text}  {r.source}")
        return "\n".join(lines)

