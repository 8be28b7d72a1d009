"""The tables of the training command."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from experiments.forty_tasks.methods import LOOP
from experiments.forty_tasks.summary import CLOSED, OPEN, MethodScores, verdict
from experiments.training.methods import PAPER_MULTIPLIER
from experiments.training.sizes import Size
from experiments.training.step_cost import StepCost


def scores_table(
    found: Mapping[str, MethodScores], sizes: Mapping[str, Size], single: Size, costs: Mapping[str, StepCost]
) -> Table:
    """A line for each method and multiplier, and one for the loop of plain layers.

    Args:
        found: the scores.
        sizes, costs: of the methods' networks.
        single: the size of one single-task network.
    """
    table = Table(title="F1 in percent, mean over the tasks, on the test samples after the best epoch by validation")
    table.add_column("method")
    for name in (
        "F1\nmean of seeds",
        "standard\ndeviation",
        "worst to\nbest seed",
        "delta_m%",
        "best\nepochs",
        "#P",
        "#F",
        "parameters",
        "step\nms",
        "peak memory\nof the step",
    ):
        table.add_column(name, justify="right")
    for name, summary in found.items():
        deviation = f"{100 * statistics.stdev(summary.f1):.2f}" if len(summary.f1) > 1 else "-"
        table.add_row(
            name,
            f"{100 * summary.mean:.2f}",
            deviation,
            f"{100 * min(summary.f1):.2f} to {100 * max(summary.f1):.2f}",
            "-" if summary.delta_m is None else f"{summary.delta_m:+.2f}",
            " ".join(map(str, summary.best_epochs)),
            *sizes[summary.method].relative(single),
            *costs[summary.method].cells(),
        )
    table.add_row("gates by a loop of plain layers", *["-"] * 5, *sizes[LOOP].relative(single), *costs[LOOP].cells())
    return table


def gates_table(found: Mapping[str, MethodScores]) -> Table:
    """Where the gates are after the best epoch."""
    table = Table(title="Gates of all tasks, layers and seeds")
    table.add_column("multiplier")
    for name in ("mean", "standard\ndeviation", "quartiles", f"below {CLOSED}\nor above {OPEN}"):
        table.add_column(name, justify="right")
    for scores in found.values():
        if (gates := scores.gates) is not None:
            quartiles = " ".join(f"{value:.2f}" for value in gates.quartiles)
            cells = f"{gates.mean:.2f}", f"{gates.std:.2f}", quartiles, f"{gates.nearly_binary:.0%}"
            table.add_row(f"{scores.multiplier:g}", *cells)
    return table


def show(
    console: Console,
    found: Mapping[str, MethodScores],
    sizes: Mapping[str, Size],
    single: Size,
    costs: Mapping[str, StepCost],
) -> None:
    """Prints everything that was found; arguments as of :func:`scores_table`."""
    console.print(scores_table(found, sizes, single, costs))
    if any(summary.gates for summary in found.values()):
        console.print(gates_table(found))
    for method in PAPER_MULTIPLIER:
        if method in costs:
            ratio = costs[LOOP].step.median / costs[method].step.median
            console.print(f"a step of {method} is {ratio:.2f}x as fast as by a loop of plain layers", highlight=False)
    if (outcome := verdict(found)) is not None:
        more = "more" if outcome.holds else "no more"
        console.print(
            f"the mean F1 of {outcome.name} is {100 * outcome.difference:+.2f} points from hard sharing's, {more} than "
            f"the {100 * outcome.spread:.2f} points that seeds differ by",
            highlight=False,
        )
