"""What the training commands share: how they tell of progress, and how they end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TimeRemainingColumn

from benchmarks.network.data import DataError
from benchmarks.report.console import bar_columns, fail
from experiments.training.run import OnStep, ResumeError, Settings

Notify = Callable[[int], OnStep]  # of a run's number


@contextmanager
def told(console: Console, todo: Sequence[Settings], first: str, score_name: str, output: Path) -> Iterator[Notify]:
    """A bar for all runs; ends the command, with what to do, where the data or a checkpoint is bad, or by Ctrl-C.

    Args:
        console: where it is drawn.
        todo: the runs.
        first: what is done before the first step.
        score_name: of what the runs tell as their score.
        output: the folder of the checkpoints.
    """
    try:
        with Progress(*bar_columns(), TimeRemainingColumn(), console=console, transient=True) as progress:
            bar = progress.add_task(first, total=len(todo))

            def notify(run: int) -> OnStep:
                settings = todo[run]

                def step(epoch: int, share: float, loss: float, value: float | None) -> None:
                    score = "" if value is None else f", {score_name} {value:.3f}"
                    text = f"{settings.name}, seed {settings.seed}, epoch {epoch + 1}: loss {loss:.3f}{score}"
                    progress.update(bar, description=text, completed=run + (epoch + share) / settings.epochs)

                return step

            yield notify
    except (DataError, ResumeError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail(f"interrupted; the same command with --resume goes on from the checkpoints in {output}")
