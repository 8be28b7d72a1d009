"""What the commands are given: the samples of a dataset, or the error that says why not."""

from __future__ import annotations

from pathlib import Path

import typer

from benchmarks.network.data import DataError, Splits
from benchmarks.report.console import fail
from experiments.forty_tasks.summary import DATASETS


def load_splits(dataset: str, folder: Path | None, batch: int) -> Splits:
    """Reads a dataset; ends the command where that, or training in batches of that size, is not possible.

    Args:
        dataset: one of ``DATASETS``.
        folder: of its files, if it needs one.
        batch: samples of a step.

    Raises:
        typer.BadParameter: a folder is missing or needless, or a batch is larger than the training samples.
    """
    kind = DATASETS[dataset]
    if kind.needs_folder != (folder is not None):
        needs = "needs the folder of its files" if kind.needs_folder else "takes no folder"
        raise typer.BadParameter(f"{dataset} {needs}", param_hint="--data")
    try:
        splits = kind.load(folder or Path())
    except DataError as error:
        fail(str(error))
    if not (len(splits.validation) and len(splits.test)):
        fail(f"{splits.source} must have samples to validate and to test with")
    if batch > len(splits.train):
        message = f"{splits.source} has {len(splits.train)} training samples, fewer than a batch of {batch}"
        raise typer.BadParameter(message, param_hint="--batch")
    return splits
