"""What the commands share: the console, the columns of a progress bar, options with a choice, and how they end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn


def wide_console() -> Console:
    """Wide enough for the tables where there is no terminal."""
    found = Console()
    return found if found.is_terminal else Console(width=170)


def bar_columns() -> tuple[ProgressColumn, ...]:
    """The columns of a progress bar."""
    return TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn()


@contextmanager
def progress(where: Console) -> Iterator[Callable[[str, float], None]]:
    """A bar that is told what is being done, and which share (0 to 1) is done."""
    with Progress(*bar_columns(), console=where, transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda text, share: bar.update(task, description=text, completed=share, refresh=True)


def choices(values: Sequence[str], known: Sequence[str], option: str) -> list[str]:
    """The values, each once.

    Raises:
        typer.BadParameter: one is not known.
    """
    for value in values:
        if value not in known:
            raise typer.BadParameter(f"unknown {value!r}; known are {', '.join(known)}", param_hint=option)
    return list(dict.fromkeys(values))


def fail(message: str) -> NoReturn:
    """Ends the command with status 1."""
    typer.secho(message, fg="red", err=True)
    raise typer.Exit(1)
