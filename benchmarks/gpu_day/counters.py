"""Step: what Nsight Compute counts while our kernels run.

``python -m benchmarks.gpu_day.counters BACKEND LAYER FORMAT`` is the program that it runs.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu_day import journal, race
from benchmarks.gpu_day.step_api import Measurement, Setting, SkippedError
from benchmarks.layers.cases import cases as layer_cases
from benchmarks.layers.registry import PEERS
from benchmarks.profile import ncu
from benchmarks.records.workloads import CELEBA
from tsbn_kernels import use_backend

COUNTED = (("bn4", "contiguous"), ("bn2", "channels_last"), ("bn1", "contiguous"))


def cases(setting: Setting) -> list[Measurement]:
    """A forward and a backward pass of three layers, of each backend.

    Raises:
        SkippedError: the tool is not there.
    """
    if shutil.which("ncu") is None:
        raise SkippedError("ncu is not on the PATH; it comes with the CUDA toolkit")
    backends = [entrant.backend for entrant in race.ours(torch.device(setting.device))]
    return [
        Measurement(f"{backend}, {layer} {order}", partial(count, backend, layer, order, setting))
        for layer, order in COUNTED
        for backend in backends
    ]


def count(backend: str, layer: str, order: str, setting: Setting) -> None:
    """A line for each launch."""
    path = Path(setting.folder) / f"ncu-{backend}-{layer}-{order}.csv"
    program = [sys.executable, "-m", "benchmarks.gpu_day.counters", backend, layer, order]
    subprocess.run(shlex.split(ncu.command(None, path, program)), check=True)
    for launch in ncu.read(path):
        journal.note(
            setting.folder,
            "counters",
            entrant=backend,
            layer=layer,
            memory_format=order,
            kernel=launch.kernel,
            **launch.values,
        )


def main(backend: str, layer: str, order: str) -> None:
    """The third step of a layer, between the marks that ncu heeds."""
    chosen = [one for one in CELEBA.layers if layer in one.names]
    (case,) = layer_cases(
        chosen,
        tasks=CELEBA.tasks,
        batch=CELEBA.batch,
        dtypes=["bfloat16"],
        memory_formats=[order],
        device=torch.device("cuda"),
    )
    with use_backend(backend):
        peer = PEERS[case.norm]["fused"](case, case.inputs())
        for step in range(3):
            if step == 2:
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
            peer.backward(peer.forward())
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
