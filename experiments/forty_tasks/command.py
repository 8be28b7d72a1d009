"""The training command."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.commands.options import OnDevice, machine_line, parse_device
from benchmarks.report.console import choices, wide_console
from benchmarks.timing.measure import Effort
from experiments.forty_tasks.loading import load_splits
from experiments.forty_tasks.methods import LOOP, METHODS, methods_of, sizes
from experiments.forty_tasks.step_cost import step_costs
from experiments.forty_tasks.summary import DATASETS, all_settings, summaries, train_all, write_json
from experiments.forty_tasks.tables import show
from experiments.training.methods import HARD_SHARING, MULTIPLIERS, PAPER_MULTIPLIER, TASK_SPECIFIC
from experiments.training.progress import told

NETWORKS = tuple(dict.fromkeys(chain.from_iterable(kind.layouts for kind in DATASETS.values())))
COST_EFFORT, QUICK_COST_EFFORT = Effort(5, 15, 15.0), Effort(2, 2, 1.0)
QUICK_EPOCHS = 1


def train(
    dataset: Annotated[str, typer.Option(help=f"One of {', '.join(DATASETS)}.")] = "digits40",
    data: Annotated[Path | None, typer.Option(help="Folder of CelebA, in either of its layouts.")] = None,
    network: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(NETWORKS)}. Default: cnn, words24 transformer.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help=f"Repeatable: {', '.join(METHODS)}. Default: all that the network has.")
    ] = None,
    multiplier: Annotated[
        list[float] | None,
        typer.Option(help="Repeatable: of the learning rate of the gates. Default: 1, 10, 100, 1000."),
    ] = None,
    tsbn_multiplier: Annotated[
        list[float] | None, typer.Option(help="Repeatable: of that of TSBN's and TSLN's weights. Default: 1.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method.")] = 3,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: 8, CelebA 15, words 6.")] = None,
    batch: Annotated[int | None, typer.Option(min=2, help="Samples of a step. Default: 32, CelebA 256.")] = None,
    lr: Annotated[float | None, typer.Option(min=0.0, help="Adam's. Default: 1e-3, CelebA 3e-4, words 3e-3.")] = None,
    device: OnDevice = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that read images. Default: 0, CelebA 4.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One seed, one epoch, few rounds of timing.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoints in --output; without it they are replaced.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder of the checkpoints and pictures.")] = Path("results/train"),
    json_path: Annotated[
        Path | None, typer.Option("--json", help="The results. Default: results.json in --output.")
    ] = None,
) -> None:
    """Forty tasks, trained with every method: F1, delta_m%, parameters, time and memory of a step."""
    from benchmarks.report.plot import save
    from experiments.forty_tasks.pictures import gate_histograms, learning_curves

    console = wide_console()
    (chosen,) = choices([dataset], list(DATASETS), "--dataset")
    kind = DATASETS[chosen]
    (network,) = choices([network or next(iter(kind.layouts))], list(kind.layouts), "--network")
    layout = kind.layouts[network]
    methods = choices(method or methods_of(layout), methods_of(layout), "--method")
    multipliers = {
        name: (multiplier or MULTIPLIERS) if name in PAPER_MULTIPLIER else tsbn_multiplier or (1.0,)
        for name in TASK_SPECIFIC
    }
    if wrong := [each for found in multipliers.values() for each in found if not each > 0]:
        raise typer.BadParameter(f"a multiplier must be above 0, got {wrong[0]:g}", param_hint="--multiplier")
    where = parse_device(device)
    batch = batch or kind.batch
    splits = load_splits(chosen, data, batch)
    todo = all_settings(
        splits,
        layout,
        methods,
        {name: list(dict.fromkeys(found)) for name, found in multipliers.items()},
        1 if quick else seeds,
        epochs or (QUICK_EPOCHS if quick else kind.epochs),
        batch,
        kind.lr if lr is None else lr,
    )
    console.print(
        f"{machine_line(where)}\n{splits.source}: {len(splits.tasks)} tasks, {len(splits.train)} samples to train on, "
        f"{len(splits.validation)} to validate, {len(splits.test)} to test; {len(todo)} runs",
        highlight=False,
    )
    with told(console, todo, "what a step costs", "F1", output) as notify:
        measured = step_costs(methods, splits, layout, batch, where, QUICK_COST_EFFORT if quick else COST_EFFORT)
        reading = (4 if kind.needs_folder else 0) if workers is None else workers
        fits = train_all(todo, splits, where, output, resume, reading, notify)
    sample, _ = splits.train[0]
    counted = sizes([*methods, LOOP], len(splits.tasks), layout, sample)
    single = sizes([HARD_SHARING], 1, layout, sample)[HARD_SHARING]
    show(console, summaries(fits), counted, single, measured)
    pictures = {"learning_curves.png": learning_curves}
    if not PAPER_MULTIPLIER.keys().isdisjoint(methods):
        pictures["gates.png"] = gate_histograms
    for name, draw in pictures.items():
        save(output / name, draw(fits))
        console.print(f"plot: {output / name}", highlight=False, soft_wrap=True)
    json_path = json_path or output / "results.json"
    write_json(json_path, splits, fits, counted, measured, where)
    console.print(f"results: {json_path}", highlight=False, soft_wrap=True)
