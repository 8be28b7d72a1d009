"""Records as a run would write them, of simulated times."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from itertools import product
from pathlib import Path

import numpy as np
import torch

from benchmarks.layers.cases import Case
from benchmarks.records.network_run import VARIANTS, Differences, NetworkRun, NetworkSteps
from benchmarks.records.read import network_file
from benchmarks.records.record import PASSES, TRAINING_STEP, USEFUL_TENSORS, Record, write_json
from benchmarks.records.summary import Summary
from benchmarks.records.workloads import (
    NO_FORMAT,
    SLAB_LAYERS,
    SWEEP_SLAB,
    SWEEP_TASKS,
    SWEEP_WIDTH,
    TASK_COUNTS,
    TASKS_LAYER,
    WIDTH_LAYERS,
)

KIND = "float32", "contiguous", torch.device("cpu")
VERSIONS = {"torch": "2.14", "tsbn_kernels": "0.1", "cpu": "A", "threads": 2, "backend": "cpu: native C++, avx512"}
VISITS = 3
SIZES = {"bn1": (64, 64, 64), "bn2,bn3": (128, 32, 32), "bn6,bn7": (512, 8, 8), "bn8,bn9": (512,)}
TIMES = {"fused": 1.1, "loop": 8.0, "folded": 4.0}  # in copies


def simulated_run(
    seed: int = 0,
    *,
    tasks: int = 4,
    rounds: int = 15,
    noise: float = 0.02,
    machine: float = 1.0,
    slower: float = 1.0,
    impl: str = "fused",
    device: str = "cpu",
    **versions: str | int,
) -> list[Record]:
    """One run: every round's time is off by normal noise, ``machine`` makes all of them longer, ``slower`` one impl."""
    random = np.random.default_rng(seed)

    def summary(milliseconds: float) -> Summary:
        times = milliseconds * machine * np.exp(noise * random.standard_normal(rounds))
        return Summary.of([list(map(float, visit)) for visit in np.array_split(times, VISITS)])

    records = []
    for layer, size in SIZES.items():
        for dtype, item in {"float32": 4, "bfloat16": 2}.items():
            for memory_format in ("contiguous", "channels_last") if len(size) > 1 else ("none",):
                tensor = tasks * 2 * math.prod(size) * item
                copy = summary(tensor / 1e6)
                for name, copies in TIMES.items():
                    for pass_ in PASSES:
                        useful = USEFUL_TENSORS[pass_] * tensor
                        took = summary(tensor / 1e6 * copies * useful / tensor / 2 * (slower if name == impl else 1))
                        fraction = useful / took.median / (2 * tensor / copy.median)
                        records.append(
                            Record(
                                "celeba40",
                                layer,
                                (tasks * 2, *size),
                                dtype,
                                memory_format,
                                pass_,
                                name,
                                took.median,
                                took.iqr,
                                copy.median,
                                useful,
                                fraction,
                                None,
                                True,
                                device,
                                VERSIONS | versions,
                                rounds,
                                tasks,
                                took.outliers,
                                took.visits,
                            )
                        )
    return records


def simulated_sweep(series: str) -> list[Record]:
    """A series as `sweep` writes it: ours at the bandwidth of the copy, two peers that take twice as long."""
    cases = {
        "tasks": [Case(TASKS_LAYER, tasks, 4, *KIND, workload=SWEEP_TASKS) for tasks in TASK_COUNTS],
        "slab": [Case(layer, 8, 8, *KIND, workload=SWEEP_SLAB) for layer in SLAB_LAYERS],
        "width": [Case(layer, 8, 8, KIND[0], NO_FORMAT, KIND[2], workload=SWEEP_WIDTH) for layer in WIDTH_LAYERS],
    }[series]
    records = []
    for case, pass_, (impl, copies) in product(cases, PASSES, {"fused": 1, "vmap": 2, "compiled_vmap": 2.2}.items()):
        useful = USEFUL_TENSORS[pass_] * case.tensor_bytes
        copy = 2 * case.tensor_bytes / 1e7
        records.append(
            Record(
                case.record_name,
                case.layer.name,
                case.shape,
                case.dtype,
                case.memory_format,
                pass_,
                impl,
                useful / 1e7 * copies,
                0.1 * copy,
                copy,
                useful,
                1 / copies,
                None,
                True,
                "cpu",
                VERSIONS,
                15,
                case.tasks,
                norm=case.norm,
            )
        )
    return records


def network_run() -> tuple[NetworkRun, list[Record]]:
    """A training step, and its records."""
    times = {name: Summary.of([[0.5 if variant.fused else 1.0] * 5]) for name, variant in VARIANTS.items()}
    comparison = NetworkSteps(
        times, dict.fromkeys(times, 1 << 30), dict.fromkeys(times, 2.5), dict.fromkeys(times, Differences(0, 0, 0))
    )
    records = [
        Record(
            "celeba40", "network", (8, 3, 64, 64), "float32", "contiguous", TRAINING_STEP, name, 1e3 * of.median,
            1e3 * of.iqr, None, None, None, 1.0, True, "cpu", VERSIONS, of.rounds, 4, of.outliers,
            tuple(1e3 * visit for visit in of.visits),
        )
        for name, of in times.items()
    ]  # fmt: skip
    return NetworkRun(comparison, 4, 8, "nowhere"), records


def write_run(path: Path, records: list[Record], network: NetworkRun | None = None) -> Path:
    """The files of a run."""
    write_json(path, records)
    if network is not None:
        network_file(path).write_text(json.dumps(asdict(network)))
    return path
