"""``python -m fuzz``: makes the calls in a process of their own, and counts how they end."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fuzz.calls import Outcome

PATIENCE = 180.0  # seconds that one call may take, also on a machine that is busy with more
console = Console()


@dataclass
class Report:
    """How the calls ended, and those that failed: index, text, outcome."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str, Outcome]] = field(default_factory=list)

    def add(self, index: int, text: str, outcome: Outcome) -> None:
        """One more call."""
        self.counts[outcome.kind] += 1
        if outcome.failed:
            self.failures.append((index, text, outcome))


def _lines(worker: subprocess.Popen[bytes]) -> Iterator[bytes | None]:
    """What the worker says; None where it has said nothing for too long."""
    assert worker.stdout is not None
    pipe, rest = worker.stdout.fileno(), b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while selector.select(PATIENCE):
            if not (read := os.read(pipe, 1 << 16)):
                return
            *lines, rest = (rest + read).split(b"\n")
            yield from lines
    yield None


def calls(
    seed: int,
    count: int,
    worker_command: Sequence[str] = (sys.executable, "-m", "fuzz.worker"),
    kind: str = "calls",
) -> Iterator[tuple[int, str, Outcome]]:
    """Makes calls 0 to ``count - 1``; one that ends the process, or hangs, is an outcome like others."""
    first = 0
    while first < count:
        command = [*worker_command, str(seed), str(first), str(count), kind]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE)
        text, hung = "", False
        try:
            for line in _lines(worker):
                if line is None:
                    hung = True
                    break
                message = json.loads(line)
                if "begin" in message:
                    first, text = message["begin"], message["text"]
                else:
                    first = message["end"] + 1
                    yield message["end"], text, Outcome(message["kind"], message["detail"])
        finally:
            worker.kill()
            worker.wait()
        if first < count:
            status = worker.returncode
            name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            yield first, text, Outcome("hung", f"longer than {PATIENCE} s") if hung else Outcome("crashed", name)
            first += 1


def main(
    count: int = typer.Option(10000, "--calls"),
    seed: int = 0,
    seconds: float = 300.0,
    only: int = -1,
    kind: str = "calls",
) -> None:
    """Makes random calls until their number or their time is used up; fails where one of them does.

    Args:
        count: how many.
        kind: ``calls`` of the public interface, or ``programs`` that drive a multi-task model.
        seed: of the calls: the same calls for the same seed and version.
        seconds: how long at most.
        only: index of the one call to make, in this process.
    """
    if only >= 0:
        from fuzz.worker import one_call

        _, outcome = one_call(seed, only, kind)
        console.print(escape(f"{outcome.kind}: {outcome.detail}"))
        raise typer.Exit(outcome.failed)
    report, start = Report(), time.monotonic()
    columns = TextColumn("calls"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("calls", total=count)
        for index, text, outcome in calls(seed, count, kind=kind):
            report.add(index, text, outcome)
            progress.advance(task)
            if outcome.failed:
                console.print(escape(f"{index}: {outcome.kind}: {outcome.detail}\n  {text}"))
                console.print(f"  again: PYTHONPATH=tests python -m fuzz --kind {kind} --seed {seed} --only {index}")
            if time.monotonic() - start > seconds:
                console.print(f"{seconds:.0f} seconds are over")
                break
    table = Table("outcome", "calls", title=f"seed {seed}, {report.counts.total()} {kind}")
    for outcome_kind, number in report.counts.most_common():
        table.add_row(outcome_kind, str(number))
    table.add_row("failures", str(len(report.failures)))
    console.print(table)
    raise typer.Exit(bool(report.failures))


if __name__ == "__main__":
    typer.run(main)
