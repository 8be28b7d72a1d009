"""The training step of the whole 40-task CelebA network: verified, then measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.layers.peers_compiled import warm_up
from benchmarks.network.data import Faces, celeba_faces, lfw_faces
from benchmarks.network.training import FirstStep, compare, first_steps
from benchmarks.network.training import check as check_network
from benchmarks.records.network_run import VARIANTS, NetworkRun
from benchmarks.records.record import TRAINING_STEP, Record
from benchmarks.records.workloads import CELEBA
from benchmarks.timing import environment
from benchmarks.timing.measure import Effort


def load_faces(folder: Path | None, count: int, tasks: int) -> Faces:
    """Faces of a CelebA folder, or those that come with scikit-image.

    Raises:
        DataError: the folder is not a complete CelebA.
    """
    return lfw_faces(count, tasks) if folder is None else celeba_faces(folder, count, tasks)


def verify_network(faces: Faces, device: torch.device, impls: Sequence[str]) -> dict[str, FirstStep]:
    """First steps of the network, in processes of their own, compared; the compiler is warmed up beside them.

    Raises:
        MismatchError: loss or gradients of a variant differ from the loop's.
    """
    steps = first_steps(faces, device, partial(warm_up, impls, device))
    check_network(steps)
    return steps


def run_network(
    faces: Faces, device: torch.device, effort: Effort, steps: Mapping[str, FirstStep]
) -> tuple[NetworkRun, list[Record]]:
    """Times the training step; a record for each variant."""
    comparison = compare(faces, device, effort, steps)
    batch, tasks = faces.labels.shape
    records = [
        Record(
            workload=CELEBA.name,
            layer="network",
            shape=tuple(faces.images.shape),
            dtype="float32",
            memory_format="contiguous",
            pass_=TRAINING_STEP,
            impl=variant,
            median_ms=summary.median * 1e3,
            iqr_ms=summary.iqr * 1e3,
            copy_ms=None,
            useful_bytes=None,
            fraction_of_copy_bandwidth=None,
            speedup_over_loop=comparison.times[VARIANTS[variant].reference].median / summary.median,
            verified=True,
            device=environment.device_name(device),
            versions=environment.versions(device),
            rounds=summary.rounds,
            outliers=summary.outliers,
            visits_ms=tuple(1e3 * visit for visit in summary.visits),
            tasks=tasks,
        )
        for variant, summary in comparison.times.items()
    ]
    return NetworkRun(comparison, tasks, batch, faces.source), records
