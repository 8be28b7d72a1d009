"""The command of the studies: ``python -m benchmarks study NAME``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress, TimeRemainingColumn

from benchmarks.commands.options import OnDevice, machine_line, parse_device
from benchmarks.network.data import DataError
from benchmarks.report.console import bar_columns, choices, fail, wide_console
from experiments.forty_tasks import studies
from experiments.forty_tasks.studies import Notify, Place
from experiments.forty_tasks.summary import DATASETS, all_settings
from experiments.training.methods import HARD_SHARING, PAPER_MULTIPLIER, TS_SIGMA_BN, TSBN
from experiments.training.run import OnStep, ResumeError, Settings
from tsbn_kernels.analysis import Conflicts, stability

NETWORK = "cnn"
NAMES = [name for name, kind in DATASETS.items() if NETWORK in kind.layouts]
SHARES = (0.0, 0.25, 0.5, 1.0)  # of a task's labels that are drawn at random
SEEDS = {"stability": 7, "pruning": 3, "conflicts": 3, "noise": 3}


def study(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(SEEDS)}.")],
    dataset: Annotated[str, typer.Option(help=f"One of {', '.join(NAMES)}.")] = "digits40",
    data: Annotated[Path | None, typer.Option(help="Folder of CelebA, in either of its layouts.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs. Default: 3, of stability 7.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: 8, CelebA 15; of conflicts 1.")] = None,
    task: Annotated[str | None, typer.Option(help="Whose labels are corrupted. Default: the first.")] = None,
    device: OnDevice = None,
    output: Annotated[Path, typer.Option(help="Folder of checkpoints and pictures.")] = Path("results/study"),
) -> None:
    """What the paper says of gates, tried on forty tasks. What is trained in --output stays."""
    console = wide_console()
    (chosen,) = choices([name], list(SEEDS), "NAME")
    kind = DATASETS[choices([dataset], NAMES, "--dataset")[0]]
    if kind.needs_folder != (data is not None):
        needs = "needs the folder of its files" if kind.needs_folder else "takes no folder"
        raise typer.BadParameter(f"{dataset} {needs}", param_hint="--data")
    where = parse_device(device)
    try:
        splits = kind.load(data or Path())
    except DataError as error:
        fail(str(error))
    corrupted = task or splits.tasks[0]
    if corrupted not in splits.tasks:
        raise typer.BadParameter(f"unknown {corrupted!r}; tasks are {', '.join(splits.tasks)}", param_hint="--task")
    methods = (HARD_SHARING, TSBN, TS_SIGMA_BN) if chosen == "conflicts" else (TS_SIGMA_BN,)
    todo = all_settings(
        splits,
        kind.layouts[NETWORK],
        methods,
        {TS_SIGMA_BN: (PAPER_MULTIPLIER[TS_SIGMA_BN],), TSBN: (1.0,)},
        seeds or SEEDS[chosen],
        epochs or (1 if chosen == "conflicts" else kind.epochs),
        kind.batch,
        kind.lr,
    )
    folder = output / "one_epoch" if chosen == "conflicts" else output
    place = Place(splits, where, folder, 4 if kind.needs_folder else 0)
    console.print(f"{machine_line(where)}\n{splits.source}: {len(splits.tasks)} tasks", highlight=False)
    total = len(todo) * (len(SHARES) if chosen == "noise" else 1)
    try:
        with Progress(*bar_columns(), TimeRemainingColumn(), console=console, transient=True) as progress:
            bar = progress.add_task(chosen, total=total)

            def notify(run: int) -> OnStep:
                def told(epoch: int, share: float, loss: float, f1: float | None) -> None:
                    completed = run + (epoch + share) / todo[0].epochs
                    progress.update(bar, description=f"{chosen}: loss {loss:.3f}", completed=completed)

                return told

            STUDIES[chosen](console, todo, place, notify, output, corrupted)
    except (DataError, ResumeError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail(f"interrupted; the same command goes on from the checkpoints in {output}")


def _mean(values: Sequence[float], digits: int = 3) -> str:
    """The mean of the seeds, and from the lowest to the highest."""
    return f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _print(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


def _stability(console: Console, todo: Sequence[Settings], place: Place, notify: Notify, output: Path, _: str) -> None:
    from tsbn_kernels import plots  # which needs Matplotlib

    runs = studies.trained_gates(todo, place, notify)
    if len(runs) > 1:
        _print(console, f"stability of {len(runs)} seeds: {stability(list(runs.values())):.3f}")
    plots.write_report(dict(runs), output / "report.html")
    _print(console, f"report: {output / 'report.html'}")


def _pruning(console: Console, todo: Sequence[Settings], place: Place, notify: Notify, output: Path, _: str) -> None:
    from tsbn_kernels import plots  # which needs Matplotlib

    drops = [100 * each for each in studies.pruning(todo, place, notify)]
    others = ~torch.eye(len(drops[0]), dtype=torch.bool)
    own, rest = ([float(each[part].mean()) for each in drops] for part in (~others, others))
    largest = [float((each.argmax(1) == torch.arange(len(each))).double().mean()) for each in drops]
    _print(console, f"drop of F1 in points: own {_mean(own, 2)}, others {_mean(rest, 2)}")
    _print(console, f"share of tasks that lose most by their own filters: {_mean(largest, 2)}")
    picture = output / "drops.png"
    plots.drops_map(torch.stack(drops).mean(0), place.splits.tasks, "drop of F1, points").savefig(picture, dpi=80)
    _print(console, f"plot: {picture}")


def _conflicts(console: Console, todo: Sequence[Settings], place: Place, notify: Notify, output: Path, _: str) -> None:
    from tsbn_kernels import plots  # which needs Matplotlib

    found: dict[str, list[Conflicts]] = {}
    means: dict[str, list[float]] = {}
    negative: dict[str, list[float]] = {}
    for settings, steps in zip(todo, studies.conflicts(todo, place, notify), strict=True):
        cosines = torch.stack([step.cosine for step in steps])
        tasks = cosines.shape[1]
        one, other = torch.triu_indices(tasks, tasks, 1)
        pairs = cosines[:, one, other]
        found.setdefault(settings.name, []).extend(steps)
        means.setdefault(settings.name, []).append(float(pairs.mean()))
        negative.setdefault(settings.name, []).append(100 * float((pairs < 0).double().mean()))
    for name in found:
        _print(console, f"{name}: mean cosine {_mean(means[name])}, pairs in conflict {_mean(negative[name], 1)} %")
    picture = output / "conflicts.png"
    plots.conflict_histograms(found).savefig(picture, dpi=80)
    _print(console, f"plot: {picture}")


def _noise(console: Console, todo: Sequence[Settings], place: Place, notify: Notify, _: Path, task: str) -> None:
    found = studies.noise(todo, place, task, SHARES, notify)
    for share in SHARES:
        runs = [one for one in found if one.share == share]
        _print(
            console,
            f"{share:.0%} of {task}'s labels at random: cosine with others {_mean([one.similarity for one in runs])}, "
            f"independent {_mean([one.independent for one in runs])}, that of others "
            f"{_mean([one.others for one in runs])}, their F1 {_mean([100 * one.f1 for one in runs], 2)}",
        )


STUDIES: dict[str, Callable[[Console, Sequence[Settings], Place, Notify, Path, str], None]] = {
    "stability": _stability,
    "pruning": _pruning,
    "conflicts": _conflicts,
    "noise": _noise,
}
