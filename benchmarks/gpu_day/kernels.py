"""All Triton kernels that a GPU day launches, compiled beforehand in a pool of processes."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from unittest import mock

import torch
from torch import Tensor, nn
from triton.runtime import driver

from benchmarks.gpu_day import network, speed, sweep
from benchmarks.gpu_day.sources import ROOT
from benchmarks.layers.cases import DTYPES, MEMORY_FORMATS, Case, Inputs
from benchmarks.layers.registry import PEERS
from benchmarks.network.model import task_specific_network
from benchmarks.profile.compile_offline import Call, compile_call, recorded, specialize, triton_forced
from tsbn_kernels import FusedTSigmaBN
from tsbn_kernels.backends.plan import Device
from tsbn_kernels.backends.triton import ops
from tsbn_kernels.operator import layer_ops


@dataclass(frozen=True)
class Compilation:
    """What came of it; ``errors`` are a line for each kernel that failed."""

    count: int
    seconds: float
    errors: list[str]


@contextmanager
def on_paper(device: Device) -> Iterator[list[Call]]:
    """Collects what layers launch for tensors on the meta device, taken for the GPU's, by Triton. Nothing runs."""
    with (
        recorded() as calls,
        triton_forced(),
        mock.patch.object(ops, "device_of", return_value=device),
        mock.patch.object(ops, "on_device", return_value=nullcontext()),
        mock.patch.dict(ops.forwards, clear=True),  # passes that are planned for no device that is here
        mock.patch.dict(ops.backwards, clear=True),
    ):
        yield calls


def planned(device: Device) -> list[Call]:
    """One call for each kernel that the steps launch."""
    sys.path += [str(ROOT / "tests")] * (str(ROOT / "tests") not in sys.path)  # whose calls the checks make
    from on_gpu import calls, kinds, rows, steps
    from support.layer_problems import layer_problem
    from support.layer_problems import run as row_call

    by_triton = layer_ops.flat(layer_ops.operators("triton"))
    with on_paper(device) as made:
        for case in speed.planned():
            _layer(case)
        for memory_format, variant in product(MEMORY_FORMATS.values(), network.OURS):
            _network(variant, memory_format)
        for spec in kinds.smallest(lambda spec: kinds.triton_kinds(spec, device)):
            calls.run(calls.moved(spec.call(), lambda tensor: tensor.to("meta")), "triton", spec.sums)
        for _, options in rows.calls():
            with suppress(ValueError):  # rows that are longer than a program holds
                row_call(rows.moved(layer_problem(**options), lambda tensor: tensor.to("meta")), by_triton)
        for name in steps.LAYERS:
            steps.Step.of(name, "meta")()
    return _distinct(made, device)


def swept(device: Device) -> list[Call]:
    """One call for each kernel of the sweep."""
    with on_paper(device) as made:
        for candidate in sweep.candidates("cuda", device):
            if candidate.backend == "triton":
                candidate.on_meta()
    return _distinct(made, device)


def _distinct(calls: Sequence[Call], device: Device) -> list[Call]:
    found: dict[Hashable, Call] = {}
    for call in calls:
        found.setdefault(specialize(call, device.target).key, call)
    return list(found.values())


def _layer(case: Case) -> None:
    """Makes a training step of a layer."""
    x = torch.empty(case.shape, dtype=DTYPES[case.dtype], device="meta")
    if x.dim() == 4:
        x = x.contiguous(memory_format=MEMORY_FORMATS[case.memory_format])
    gamma = torch.empty((case.tasks, case.layer.channels), device="meta")
    peer = PEERS[case.norm]["fused"](replace(case, device=x.device), Inputs(x, x, gamma, case.memory_format))
    peer.backward(peer.forward())


def _network(variant: str, memory_format: torch.memory_format) -> None:
    """Makes training steps of the network, and the passes in evaluation that compute its outputs again."""
    made = task_specific_network(variant, network.TASKS).to("meta").to(memory_format=memory_format)
    made.variant = replace(made.variant, recompute=False)  # which tells tensors apart by where they lie
    for module in made.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.bfloat16()  # as autocast has it, which the meta device does not know
        if isinstance(module, (nn.Conv2d, FusedTSigmaBN)):
            module.register_forward_hook(partial(_as_on_a_gpu, memory_format))
    for head in (made.head_weight, made.head_bias):
        head.data = head.data.bfloat16()
    for batch in (*network.PROBE, *network.BATCHES):
        size = batch, 3, network.PIXELS, network.PIXELS
        images = torch.empty(size, dtype=torch.bfloat16, device="meta").to(memory_format=memory_format)
        logits = made.train()(images)
        torch.autograd.grad(logits, list(made.parameters()), logits.detach())
        made.eval()(images)


def _as_on_a_gpu(
    memory_format: torch.memory_format, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """The output, and later its gradient, in the network's memory format: convolutions on the meta device lose it."""

    def laid_out(tensor: Tensor) -> Tensor:
        if tensor.dim() < 4:
            return tensor
        *outer, channels, height, width = tensor.shape
        flat = tensor.reshape(-1, channels, height, width).contiguous(memory_format=memory_format)
        return torch.unflatten(flat, 0, outer)

    output = laid_out(output)
    if output.requires_grad:
        output.register_hook(laid_out)
    return output


@cache
def _calls(of: Callable[[Device], list[Call]], device: Device) -> list[Call]:
    return of(device)


def _compile(of: Callable[[Device], list[Call]], device: Device, index: int, *, launchers: bool) -> str:
    """Compiles one in a process of the pool; gives what went wrong."""
    call = _calls(of, device)[index]
    try:
        compiled, _ = compile_call(call, device.target)
        if launchers:  # up to Triton 3.7 one for each signature, in C
            driver.active.launcher_cls(compiled.src, compiled.metadata)
    except Exception as error:
        return f"{call.launch.kernel}: {type(error).__name__}: {error}"[:500]
    return ""


def compile_all(
    of: Callable[[Device], list[Call]], device: Device, launchers: bool = False, workers: int | None = None
) -> Compilation:
    """Fills Triton's cache with :func:`planned` or :func:`swept`.

    Args:
        of: which kernels.
        device: the GPU that they are for; it need not be here.
        launchers: also make the host's code that starts the kernels, for which a driver must be here.
        workers: processes; by default as many as there are cores.
    """
    started = time.monotonic()
    count = len(_calls(of, device))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        made = pool.map(partial(_compile, of, device, launchers=launchers), range(count), chunksize=2)
        errors = [error for error in made if error]
    return Compilation(count, time.monotonic() - started, errors)
