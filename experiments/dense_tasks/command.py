"""The training command of dense tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.commands.options import OnDevice, machine_line, parse_device
from benchmarks.network.data import DataError
from benchmarks.report.console import choices, fail, progress, wide_console
from experiments.dense_tasks.data import DenseData, rooms
from experiments.dense_tasks.methods import MAKERS, NETWORKS, Layout, make_backbone, sizes
from experiments.dense_tasks.summary import DATASETS, ROOM_SIZES, Dataset, summaries, train_all, write_json
from experiments.dense_tasks.tables import scores_table
from experiments.dense_tasks.train_run import AMP, DenseSettings
from experiments.training.methods import PAPER_MULTIPLIER, SINGLE_TASK, TASK_SPECIFIC, TS_SIGMA_BN
from experiments.training.progress import told
from experiments.training.study import multiplied

SHOWN = 2  # pictures of the maps
QUICK_EPOCHS, QUICK_ROOMS = 1, 16


def train_dense(
    dataset: Annotated[str, typer.Option(help=f"One of {', '.join(DATASETS)}.")] = "rooms3",
    data: Annotated[Path | None, typer.Option(help="Folder of NYUv2 or Cityscapes: train/, val/ with .npy.")] = None,
    rooms_drawn: Annotated[
        int, typer.Option("--rooms", min=4, help="rooms3: to train on; a quarter more to validate.")
    ] = 400,
    size: Annotated[str, typer.Option(help=f"rooms3: {', '.join(ROOM_SIZES)}: 96x128, 288x384.")] = "small",
    network: Annotated[str, typer.Option(help=f"One of {', '.join(NETWORKS)}.")] = "segnet",
    width: Annotated[
        int | None, typer.Option(min=1, help="Channels of the first layer. Default: rooms3 8, else 64.")
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help=f"Repeatable: {', '.join(MAKERS)}. Default: all.")] = None,
    multiplier: Annotated[
        list[float] | None, typer.Option(help="Repeatable: of the learning rate of the gates. Default: 100.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method.")] = 3,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: rooms3 12, else 200.")] = None,
    halve: Annotated[
        int | None, typer.Option(min=1, help="Epochs after which the rate is halved. Default: 8, 100.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=2, help="Default: rooms3 8, NYUv2 4, Cityscapes 16.")] = None,
    lr: Annotated[float | None, typer.Option(min=0.0, help="Adam's. Default: rooms3 1e-3, else 1e-4.")] = None,
    crops: Annotated[
        bool | None, typer.Option("--crops/--no-crops", help="Scaled crops, half mirrored. Default: of NYUv2.")
    ] = None,
    amp: Annotated[str, typer.Option(help=f"Type of autocast: {', '.join(AMP)}.")] = "float32",
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the networks.")] = False,
    device: OnDevice = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that read. Default: rooms3 0, else 4.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One seed, one epoch, few rooms.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoints in --output; without it they are replaced.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder of the checkpoints and pictures.")] = Path("results/dense"),
) -> None:
    """Dense tasks of one picture, trained with every method: metrics, delta_m%, parameters and operations."""
    from experiments.dense_tasks.pictures import learning_curves, maps

    console = wide_console()
    kind = DATASETS[choices([dataset], list(DATASETS), "--dataset")[0]]
    (network,) = choices([network], NETWORKS, "--network")
    (amp,) = choices([amp], list(AMP), "--amp")
    methods = choices(method or list(MAKERS), list(MAKERS), "--method")
    if (kind.read is not None) != (data is not None):
        needs = "takes no folder" if kind.read is None else "needs the folder of its files"
        raise typer.BadParameter(f"{dataset} {needs}", param_hint="--data")
    multipliers = {name: multiplier or [PAPER_MULTIPLIER[TS_SIGMA_BN]] for name in PAPER_MULTIPLIER}
    if wrong := [each for found in multipliers.values() for each in found if not each > 0]:
        raise typer.BadParameter(f"a multiplier must be above 0, got {wrong[0]:g}", param_hint="--multiplier")
    layout, where = Layout(network, width or kind.width), parse_device(device)
    samples = _load(console, kind, data, QUICK_ROOMS if quick else rooms_drawn, size)
    batch = batch or kind.batch
    _check(samples, layout, batch)
    todo = [
        DenseSettings(
            samples.source,
            (len(samples.train), len(samples.validation)),
            layout,
            name,
            times,
            seed,
            epochs or (QUICK_EPOCHS if quick else kind.epochs),
            batch,
            kind.lr if lr is None else lr,
            halve or kind.halve,
            kind.crops if crops is None else crops,
            amp,
        )
        for name, times, seed in multiplied(
            methods, {key: [1.0] for key in TASK_SPECIFIC} | multipliers, 1 if quick else seeds
        )
    ]
    console.print(
        f"{machine_line(where)}\n{samples.source}: {', '.join(samples.tasks)}, {len(samples.train)} pictures to train "
        f"on, {len(samples.validation)} to validate; {network} of width {layout.width}; {len(todo)} runs",
        highlight=False,
    )
    reading = (0 if kind.read is None else 4) if workers is None else workers
    with told(console, todo, "starting", _first_metric(samples), output) as notify:
        examples = [samples.validation[index] for index in range(min(SHOWN, len(samples.validation)))]
        shown = torch.stack([image for image, _ in examples])
        fits, predictions = train_all(todo, samples, where, output, resume, reading, compiled, shown, notify)
    measured = sizes([*dict.fromkeys((SINGLE_TASK, *methods))], samples.tasks, layout, samples.size)
    console.print(scores_table(samples.tasks, summaries(samples.tasks, fits), measured))
    learning_curves(output / "learning_curves.png", samples.tasks, fits)
    maps(output / "maps.png", examples, predictions)
    write_json(output / "results.json", samples, fits, measured, where)
    for name in ("learning_curves.png", "maps.png", "results.json"):
        console.print(f"written: {output / name}", highlight=False, soft_wrap=True)


def _load(console: Console, kind: Dataset, folder: Path | None, count: int, size: str) -> DenseData:
    if kind.read is not None:
        try:
            return kind.read(folder or Path())
        except DataError as error:
            fail(str(error))
    height, width = ROOM_SIZES[choices([size], list(ROOM_SIZES), "--size")[0]]
    others = max(1, count // 4)
    with progress(console) as tell:
        return rooms(count, others, height, width, lambda done: tell("rooms are drawn", done / (count + others)))


def _check(samples: DenseData, layout: Layout, batch: int) -> None:
    if batch > len(samples.train):
        message = f"{samples.source} has {len(samples.train)} training pictures, fewer than a batch of {batch}"
        raise typer.BadParameter(message, param_hint="--batch")
    with torch.device("meta"):
        multiple = make_backbone(layout).multiple
    if any(side % multiple for side in samples.size):
        height, width = samples.size
        fail(f"{layout.network} needs heights and widths that are multiples of {multiple}, got {height}x{width}")


def _first_metric(samples: DenseData) -> str:
    return next(iter(samples.tasks.values())).metrics[0].name
