"""All Triton kernels that a GPU day launches, compiled beforehand in a pool of processes."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import product
from unittest import mock

import torch
from triton.runtime import driver

from benchmarks.gpu_check.results import ROOT
from benchmarks.offline import Call, compile_call, recorded, specialize
from benchmarks.workloads import CELEBA, DTYPES, MEMORY_FORMATS, RESNET50, SEGNET
from tsbn_kernels.backends.triton import ops
from tsbn_kernels.plan import Device


@dataclass(frozen=True)
class Compiled:
    """What came of it; ``errors`` are a line for each kernel that failed."""

    count: int
    seconds: float
    errors: list[str]


@contextmanager
def on_paper(device: Device) -> Iterator[list[Call]]:
    """Collects what the Triton backend launches for tensors on the meta device, taken for the GPU's. Nothing runs."""
    with (
        recorded() as calls,
        mock.patch.object(ops, "_device", return_value=device),
        mock.patch.object(ops, "_on", return_value=nullcontext()),
    ):
        yield calls


def planned(device: Device) -> list[Call]:
    """One call for each kernel."""
    found: dict[Hashable, Call] = {}
    with on_paper(device) as calls:
        _ask(device)
    for call in calls:
        found.setdefault(specialize(call, device.target).key, call)
    return list(found.values())


def _ask(device: Device) -> None:
    """Makes every call of the Triton backend that the steps make."""
    formats = tuple(MEMORY_FORMATS.values())
    for layer, dtype, memory_format in product(CELEBA.layers, ("bfloat16", "float32"), formats):
        _layer(layer.shape(CELEBA.tasks, CELEBA.batch), CELEBA.tasks, DTYPES[dtype], memory_format)
    for workload in (RESNET50[0], SEGNET):
        for layer in workload.layers:
            _layer(layer.shape(workload.tasks, workload.batch), workload.tasks, torch.bfloat16, formats[0])
    first, *others = CELEBA.layers
    for memory_format, stacking in product(formats, ("task_major", "sample_major")):  # the network's
        for layer in others:
            _layer(layer.shape(40, 128), 40, torch.bfloat16, memory_format, stacking, "relu", evaluate=True)
        for tasks, fan_out, gate in ((40, False, "sigmoid"), (40, True, "sigmoid"), (1, False, "identity")):
            shape = first.shape(1 if fan_out else tasks, 128)
            _layer(shape, tasks, torch.bfloat16, memory_format, stacking, "relu", fan_out, gate, evaluate=True)
    sys.path.append(str(ROOT / "tests"))  # whose calls the checks make
    from benchmarks.gpu_check import calls, kinds, layers

    for spec in kinds.smallest(lambda spec: kinds.triton_kinds(spec, device)):
        there = calls.moved(spec.call(), lambda tensor: tensor.to("meta"))
        calls.run(there, "triton", spec.sums)
    for shape, kind, memory_format, options in layers.LAYERS.values():
        activation, fan_out = options.get("activation", "none"), options.get("fan_out", False)
        _layer(
            shape, layers.TASKS, kind, memory_format, activation=activation, fan_out=fan_out, bias="bias" in options
        )  # fmt: skip


def _layer(
    shape: tuple[int, ...], tasks: int, dtype: torch.dtype, memory_format: torch.memory_format,
    stacking: str = "task_major", activation: str = "none", fan_out: bool = False, gate: str = "sigmoid",
    bias: bool = False, evaluate: bool = False,
) -> None:  # fmt: skip
    """A training step of a layer; ``evaluate``: its output is computed again."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    if x.dim() == 4:
        x = x.contiguous(memory_format=memory_format)
    weight = torch.empty((tasks, shape[1]), device="meta")
    given, options = (weight if bias else None), (tasks, 1e-5, gate, stacking)
    epilogue = None, activation, 0.0, fan_out
    y, mean, var = ops.forward_training(x, weight, given, *options, *epilogue)
    if evaluate:
        ops.forward_eval(x, weight, given, mean, var, *options, *epilogue)
    needs = True, True, gate == "sigmoid", bias
    ops.backward(y, x, weight, mean, var, *options, *needs, given, *epilogue)


@cache
def _planned(device: Device) -> list[Call]:
    return planned(device)


def _compile(device: Device, index: int, launchers: bool) -> str:
    """Compiles one in a process of the pool; gives what went wrong."""
    call = _planned(device)[index]
    try:
        compiled, _ = compile_call(call, device.target)
        if launchers:  # up to Triton 3.7 one for each signature, in C
            driver.active.launcher_cls(compiled.src, compiled.metadata)
    except Exception as error:
        return f"{call.launch.kernel}: {type(error).__name__}: {error}"[:500]
    return ""


def compile_all(
    device: Device, workers: int | None = None, launchers: bool = False, notify: Callable[[int], None] = lambda _: None
) -> Compiled:
    """Fills Triton's cache. ``launchers``: also with the host's code that starts kernels; it needs a driver."""
    started = time.monotonic()
    count = len(_planned(device))
    workers = workers or os.cpu_count() or 1
    errors = []
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        made = pool.map(_compile, [device] * count, range(count), [launchers] * count, chunksize=2)
        for done, error in enumerate(made, 1):
            errors += [error] * bool(error)
            notify(done)
    return Compiled(count, time.monotonic() - started, errors)
