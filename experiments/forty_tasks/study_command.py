"""The command of the studies: ``python -m benchmarks study NAME``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress, TimeRemainingColumn

from benchmarks.commands.options import OnDevice, machine_line, parse_device
from benchmarks.network.data import DataError
from benchmarks.report.console import bar_columns, choices, fail, wide_console
from experiments.forty_tasks.loading import load_splits
from experiments.forty_tasks.place import Place
from experiments.forty_tasks.summary import DATASETS, all_settings
from experiments.training.methods import (
    HARD_SHARING,
    MULTIPLIERS,
    PAPER_MULTIPLIER,
    SINGLE_TASK,
    TS_SIGMA_BN,
    TSBN,
)
from experiments.training.run import OnStep, ResumeError


@dataclass(frozen=True)
class Study:
    """What a study trains, unless told otherwise.

    Attributes:
        methods: the multipliers of each method.
        seeds: how many.
        epochs: of a run; None: those of the dataset.
    """

    methods: Mapping[str, Sequence[float]]
    seeds: int = 3
    epochs: int | None = None


_OURS: dict[str, Sequence[float]] = {TS_SIGMA_BN: (PAPER_MULTIPLIER[TS_SIGMA_BN],)}
STUDIES = {
    "multipliers": Study({TS_SIGMA_BN: MULTIPLIERS}),
    "stability": Study(_OURS, seeds=7),
    "pruning": Study(_OURS),
    "conflicts": Study({HARD_SHARING: (), TSBN: (1.0,), **_OURS}, epochs=1),
    "noise": Study(_OURS),
    "loss-scales": Study({SINGLE_TASK: (), HARD_SHARING: (), TSBN: (1.0,), **_OURS}),
    "weighting": Study({SINGLE_TASK: (), HARD_SHARING: (), **_OURS}),
    "shrink": Study(_OURS),
    "orthogonal": Study({HARD_SHARING: (), **_OURS}),
}
NETWORK = "cnn"
NAMES = [name for name, kind in DATASETS.items() if NETWORK in kind.layouts]


def study(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(STUDIES)}.")],
    dataset: Annotated[str, typer.Option(help=f"One of {', '.join(NAMES)}.")] = "digits40",
    data: Annotated[Path | None, typer.Option(help="Folder of CelebA, in either of its layouts.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs. Default: 3, of stability 7.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: 8, CelebA 15; of conflicts 1.")] = None,
    batch: Annotated[int | None, typer.Option(min=2, help="Samples of a step. Default: 32, CelebA 256.")] = None,
    task: Annotated[str | None, typer.Option(help="Of noise: whose labels are corrupted. Default: the first.")] = None,
    turns: Annotated[
        int | None,
        typer.Option(min=1, help="Of loss-scales: how many tasks are taken in turn, evenly over all. Default: all."),
    ] = None,
    device: OnDevice = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that read images. Default: 0, CelebA 4.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of checkpoints and pictures.")] = Path("results/study"),
) -> None:
    """What the paper says of gates, tried on forty tasks. What is trained in --output stays."""
    console = wide_console()
    (chosen,) = choices([name], list(STUDIES), "NAME")
    what = STUDIES[chosen]
    (source,) = choices([dataset], NAMES, "--dataset")
    kind = DATASETS[source]
    where = parse_device(device)
    batch = batch or kind.batch
    splits = load_splits(source, data, batch)
    corrupted = task or splits.tasks[0]
    if corrupted not in splits.tasks:
        raise typer.BadParameter(f"unknown {corrupted!r}; tasks are {', '.join(splits.tasks)}", param_hint="--task")
    epochs = epochs or what.epochs or kind.epochs
    todo = all_settings(
        splits,
        kind.layouts[NETWORK],
        list(what.methods),
        what.methods,
        seeds or what.seeds,
        epochs,
        batch,
        kind.lr,
    )
    folder = output / "one_epoch" if what.epochs else output
    reading = (4 if kind.needs_folder else 0) if workers is None else workers
    console.print(f"{machine_line(where)}\n{splits.source}: {len(splits.tasks)} tasks", highlight=False)
    try:
        from experiments.forty_tasks.study_reports import REPORTS, Request  # which needs Matplotlib

        with Progress(*bar_columns(), TimeRemainingColumn(), console=console, transient=True) as progress:
            bar = progress.add_task(chosen, total=len(todo))

            def notify(run: int, runs: int) -> OnStep:
                def told(epoch: int, share: float, loss: float, f1: float | None) -> None:
                    completed = run + (epoch + share) / epochs
                    progress.update(bar, description=f"{chosen}: loss {loss:.3f}", completed=completed, total=runs)

                return told

            place = Place(splits, where, folder, reading)
            REPORTS[chosen](Request(console, todo, place, notify, output, corrupted, turns))
    except (DataError, ImportError, ResumeError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail(f"interrupted; the same command goes on from the checkpoints in {output}")
