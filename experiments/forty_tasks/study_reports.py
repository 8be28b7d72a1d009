"""What each study says and draws; it needs Matplotlib."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console

from experiments.forty_tasks import studies
from experiments.forty_tasks.comparisons import Outcome, compare, in_turn, with_scaled_losses
from experiments.forty_tasks.penalties import L1, ORTHOGONAL, RECEDING, with_penalties
from experiments.forty_tasks.pictures import gate_histograms, noise_lines, outcome_points, shrink_curves
from experiments.forty_tasks.place import Notify, Place
from experiments.forty_tasks.shrink import Shrunk, shrink
from experiments.forty_tasks.summary import CLOSED, summaries
from experiments.forty_tasks.weighting import with_weightings
from experiments.training.run import Settings
from tsbn_kernels import plots
from tsbn_kernels.analysis import Conflicts, stability

SHARES = (0.0, 0.25, 0.5, 1.0)  # of a task's labels that are drawn at random
OF_GATES = ((L1, 1e-4), (L1, 1e-3), (RECEDING, 1e-4), (RECEDING, 1e-3))  # penalties, and their strengths
OF_GRADIENTS = ((ORTHOGONAL, 0.1),)


@dataclass(frozen=True)
class Request:
    """What is asked of a study.

    Attributes:
        todo: the runs, seed by seed.
        place: where they are trained.
        notify: asked for each run what its steps tell.
        output: the folder of the pictures.
        task: whose labels are corrupted.
        turns: how many tasks have their loss multiplied in turn; None: all.
    """

    console: Console
    todo: Sequence[Settings]
    place: Place
    notify: Notify
    output: Path
    task: str
    turns: int | None

    def say(self, text: str) -> None:
        """Prints a line."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def draw(self, name: str, figure: Figure) -> None:
        """Writes a picture, and says where."""
        self.output.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.output / name, dpi=80)
        self.say(f"plot: {self.output / name}")


def _mean(values: Sequence[float], digits: int = 3) -> str:
    """The mean of the seeds, and from the lowest to the highest."""
    return f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _multipliers(request: Request) -> None:
    fits = studies.multipliers(request.todo, request.place, request.notify)
    for name, scores in summaries(fits).items():
        assert scores.gates is not None
        f1 = _mean([100 * each for each in scores.f1], 2)
        request.say(f"{name}: F1 {f1}, {scores.gates.nearly_binary:.0%} of the gates nearly 0 or 1")
    request.draw("multipliers.png", gate_histograms(fits))


def _stability(request: Request) -> None:
    runs = studies.trained_gates(request.todo, request.place, request.notify)
    if len(runs) > 1:
        request.say(f"stability of {len(runs)} seeds: {stability(list(runs.values())):.3f}")
    plots.write_report(dict(runs), request.output / "report.html")
    request.say(f"report: {request.output / 'report.html'}")


def _pruning(request: Request) -> None:
    drops = [100 * each for each in studies.pruning(request.todo, request.place, request.notify)]
    others = ~torch.eye(len(drops[0]), dtype=torch.bool)
    own, rest = ([float(each[part].mean()) for each in drops] for part in (~others, others))
    largest = [float((each.argmax(1) == torch.arange(len(each))).double().mean()) for each in drops]
    request.say(f"drop of F1 in points: own {_mean(own, 2)}, others {_mean(rest, 2)}")
    request.say(f"share of tasks that lose most by their own filters: {_mean(largest, 2)}")
    tasks = request.place.splits.tasks
    request.draw("drops.png", plots.drops_map(torch.stack(drops).mean(0), tasks, "drop of F1, points"))


def _conflicts(request: Request) -> None:
    _conflicts_in(request, [request.place])


def _conflicts_in(request: Request, places: Sequence[Place]) -> None:
    found: dict[str, list[Conflicts]] = {}
    means: dict[str, list[float]] = {}
    negative: dict[str, list[float]] = {}
    for place in places:
        for settings, steps in zip(request.todo, studies.conflicts(request.todo, place, request.notify), strict=True):
            cosines = torch.stack([step.cosine for step in steps])
            tasks = cosines.shape[1]
            one, other = torch.triu_indices(tasks, tasks, 1)
            pairs = cosines[:, one, other]
            name = _named(settings, place)
            found.setdefault(name, []).extend(steps)
            means.setdefault(name, []).append(float(pairs.mean()))
            negative.setdefault(name, []).append(100 * float((pairs < 0).double().mean()))
    for name in found:
        request.say(f"{name}: mean cosine {_mean(means[name])}, pairs in conflict {_mean(negative[name], 1)} %")
    request.draw("conflicts.png", plots.conflict_histograms(found))


def _noise(request: Request) -> None:
    found = studies.noise(request.todo, request.place, request.task, SHARES, request.notify)
    for share in SHARES:
        runs = [one for one in found if one.share == share]
        request.say(
            f"{share:.0%} of {request.task}'s labels at random: cosine with others "
            f"{_mean([one.similarity for one in runs])}, independent {_mean([one.independent for one in runs])}, "
            f"that of others {_mean([one.others for one in runs])}, its F1 "
            f"{_mean([100 * one.own_f1 for one in runs], 2)}, theirs {_mean([100 * one.f1 for one in runs], 2)}"
        )
    request.draw("noise.png", noise_lines(request.task, found))


def _loss_scales(request: Request) -> None:
    tasks = in_turn(request.place.splits.tasks, request.turns)
    others = with_scaled_losses(request.place, tasks)
    found = compare(request.todo, request.place, others, request.notify)
    for name, outcomes in _by_name(found).items():
        usual = {one.seed: one.delta_m for one in outcomes if not one.otherwise}
        scaled = [one for one in outcomes if one.otherwise]
        moved = statistics.fmean(abs(one.delta_m - usual[one.seed]) for one in scaled)
        request.say(
            f"{name}: delta_m% {_mean(list(usual.values()), 2)}, losses of {len(tasks)} tasks multiplied in turn "
            f"{_mean([one.delta_m for one in scaled], 2)}, standard deviation "
            f"{torch.tensor([one.delta_m for one in scaled]).std(correction=0):.2f}, moved by {moved:.2f} in the mean"
        )
    groups = {"": "as it is"} | {other.otherwise: other.otherwise.rpartition(" ")[2] for other in others}
    labels = {what: f"a loss times {group}" if what else group for what, group in groups.items()}
    request.draw("loss_scales.png", outcome_points(found, labels))


def _weighting(request: Request) -> None:
    others = with_weightings(request.place)
    found = compare(request.todo, request.place, others, request.notify)
    for name, outcomes in _by_name(found).items():
        for otherwise, group in itertools.groupby(
            sorted(outcomes, key=lambda one: one.otherwise), key=lambda one: one.otherwise
        ):
            runs = list(group)
            request.say(
                f"{name}, {otherwise or 'equal weights'}: F1 {_mean([100 * one.mean_f1 for one in runs], 2)}, "
                f"delta_m% {_mean([one.delta_m for one in runs], 2)}"
            )
    labels = {"": "equal weights"} | {other.otherwise: other.otherwise for other in others}
    request.draw("weighting.png", outcome_points(found, labels))


def _orthogonal(request: Request) -> None:
    places = [request.place, *with_penalties(request.place, OF_GRADIENTS)]
    _conflicts_in(request, places)
    for place in places:
        scores: dict[str, list[float]] = {}
        for number, settings in enumerate(request.todo):
            f1 = place.run(settings, request.notify(number, len(request.todo))).fit.mean_f1
            scores.setdefault(_named(settings, place), []).append(100 * f1)
        for name, each in scores.items():
            request.say(f"{name}: F1 {_mean(each, 2)}")


def _named(settings: Settings, place: Place) -> str:
    return f"{settings.name} {place.otherwise}".rstrip()


def _shrink(request: Request) -> None:
    groups: dict[str, list[Shrunk]] = {}
    for run in shrink(request.todo, [request.place, *with_penalties(request.place, OF_GATES)], request.notify):
        groups.setdefault(run.penalty or "no penalty", []).append(run)
    for name, runs in groups.items():
        closed = [100 * float((run.gates < CLOSED).double().mean()) for run in runs]
        unused = [100 * float((run.gates.amax(0) < CLOSED).double().mean()) for run in runs]
        request.say(
            f"{name}: F1 {_mean([100 * run.alone[0][1] for run in runs], 2)}, gates below {CLOSED:g} "
            f"{_mean(closed, 1)} %, filters that no task has above it {_mean(unused, 1)} %"
        )
        for kind, points in (("all", [run.together for run in runs]), ("each", [run.alone for run in runs])):
            means = torch.tensor(points, dtype=torch.float64).mean(0).tolist()
            cells = (f"{gone:.0%} {100 * f1:.1f}" for gone, f1 in means)
            request.say(f"  gone for {kind}, and F1: {', '.join(cells)}")
        request.say(
            f"  exported at {_mean([100 * run.best for run in runs], 0)} %: "
            f"F1 {_mean([100 * run.exported_f1 for run in runs], 2)}, "
            f"parameters {_mean([100 * run.parameters for run in runs], 1)} % of the unpruned ones"
        )
    request.draw("shrink.png", shrink_curves(groups))
    request.draw("penalties.png", plots.gate_histograms({k: [run.gates for run in runs] for k, runs in groups.items()}))


def _by_name(found: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    groups: dict[str, list[Outcome]] = {}
    for one in found:
        groups.setdefault(one.name, []).append(one)
    return groups


REPORTS: dict[str, Callable[[Request], None]] = {
    "multipliers": _multipliers,
    "stability": _stability,
    "pruning": _pruning,
    "conflicts": _conflicts,
    "noise": _noise,
    "loss-scales": _loss_scales,
    "weighting": _weighting,
    "shrink": _shrink,
    "orthogonal": _orthogonal,
}
