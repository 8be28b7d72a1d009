"""Step: a training step of the CelebA network in bfloat16: time and peak memory, by the loop and by our variants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_day import journal, race
from benchmarks.gpu_day.risky import risky
from benchmarks.gpu_day.step_api import Measurement, Setting
from benchmarks.gpu_day.worker import is_usable
from benchmarks.layers.cases import MEMORY_FORMATS
from benchmarks.layers.verify import MismatchError
from benchmarks.network.model import CELEBA, Layout, task_specific_network, train_step
from benchmarks.records.network_run import BEST
from benchmarks.timing import environment
from benchmarks.timing.measure import Effort, measure, step_candidate, summarize, timer_for
from tsbn_kernels import use_backend

LOOP = "loop"
OURS = ("fused, ReLU inside", BEST, "fused", "and recompute")
TASKS, PIXELS, PROBE, SURE = 40, 64, (16, 32), 64
BATCHES = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)  # few, for each has kernels of its own
QUICK_TASKS, QUICK_PIXELS, QUICK_BATCH, NARROW = 2, 8, 8, Layout(3, (8,) * 7)
SHARE = 0.92  # of the free memory, for what a step was seen to take: the allocator's blocks have gaps
LOSS = 0.02  # of the loop's: bfloat16 rounds in every layer
EFFORT = Effort(2, 4, 1.0, 0.0)


class Autocast(nn.Module):
    """A network whose forward pass computes in bfloat16 what can be; its parameters are float32."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.network, self.device = network, device

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            logits: Tensor = self.network(images)
        return logits.float()


def cases(setting: Setting) -> list[Measurement]:
    """The loop at the largest batch that it can train, the main ones of ours at the same; then one at its largest."""
    backends = [entrant.backend for entrant in race.ours(torch.device(setting.device))]
    first, second, rest = [], [], []
    for memory_format in ("channels_last", "contiguous"):

        def case(name: str, run: Callable[..., Any], *arguments: Any, order: str = memory_format) -> Measurement:
            return Measurement(f"{name}, {order}", partial(run, *arguments, order, setting))

        first.append(case(f"{LOOP}, largest batch", largest, LOOP, ""))
        for backend in backends:
            first += [case(f"{variant}, {backend}", at_the_loops, variant, backend) for variant in OURS[:2]]
        for backend in backends[:1]:
            second.append(case(f"{BEST}, {backend}, largest batch", largest, BEST, backend))
            rest += [case(f"{variant}, {backend}", at_the_loops, variant, backend) for variant in OURS[2:]]
    return first + second + rest


def at_the_loops(variant: str, backend: str, memory_format: str, setting: Setting) -> None:
    """Time and memory at the batch of the loop's line, compared with its loss.

    Raises:
        MismatchError: the losses differ.
        AssertionError: the loop has no line.
    """
    lines = [line for line in journal.read(setting.folder, "network") if line["variant"] == LOOP]
    lines = [line for line in lines if line["memory_format"] == memory_format]
    assert lines, "the loop was not measured"
    found = _measured(variant, backend, memory_format, lines[-1]["batch"], setting)
    wrong = abs(found["loss"] - lines[-1]["loss"])
    if not wrong <= LOSS * lines[-1]["loss"]:
        raise MismatchError(
            f"{variant!r} is wrong: its loss is {found['loss']:.4f}, the loop's {lines[-1]['loss']:.4f}"
        )


def largest(variant: str, backend: str, memory_format: str, setting: Setting) -> None:
    """Time and memory at the largest batch that fits, by what two small ones take; on a CPU at a small one.

    Of the loop first at one that is sure to fit: with that ours are compared where a large one ends the process.

    Raises:
        MemoryError: none runs; the message says why.
    """
    device = torch.device(setting.device)
    if setting.quick:
        _measured(variant, backend, memory_format, QUICK_BATCH, setting)
        return
    if variant == LOOP:
        _measured(variant, backend, memory_format, SURE, setting)
    few, more = (_peak_at(batch, variant, backend, memory_format, setting) for batch in PROBE)
    race.free(device)
    of_one = (more - few) / (PROBE[1] - PROBE[0])
    fits = PROBE[0] + (SHARE * environment.available_bytes(device) - few) / of_one
    why = f"there is none for {BATCHES[0]} images"
    for batch in [batch for batch in reversed(BATCHES) if batch <= fits]:
        try:
            _measured(variant, backend, memory_format, batch, setting)
            return
        except RuntimeError as error:  # also of libraries that have no room, or no kernel for so many values
            if not is_usable(setting.device):
                raise
            why = str(error).partition("\n")[0]
            print(f"{variant}: not {batch} images: {why}", flush=True)
    raise MemoryError(f"{variant} has no room: {why}")


def _measured(variant: str, backend: str, memory_format: str, batch: int, setting: Setting) -> dict[str, Any]:
    """A line of one variant at one batch."""
    device = torch.device(setting.device)
    effort = race.QUICK_EFFORT if setting.quick else EFFORT
    with _by(backend, setting):
        step = _prepared(variant, memory_format, batch, setting)
        loss = float(step())
        peak = _peak(step, device)
        (time,) = summarize(measure({"": step_candidate(step)}, effort, timer_for(device)))[""]
        found = {
            "variant": variant,
            "entrant": backend or LOOP,
            "memory_format": memory_format,
            "batch": batch,
            "loss": loss,
            "peak_bytes": peak,
            "ms": 1e3 * time.median,
            "iqr_ms": 1e3 * time.iqr,
        }
    journal.note(setting.folder, "network", **found)
    return found


def _peak_at(batch: int, variant: str, backend: str, memory_format: str, setting: Setting) -> int:
    with _by(backend, setting):
        return _peak(_prepared(variant, memory_format, batch, setting), torch.device(setting.device))


def _prepared(variant: str, memory_format: str, batch: int, setting: Setting) -> Callable[[], Tensor]:
    """A training step of a fresh network on random images."""
    device = torch.device(setting.device)
    race.free(device)
    tasks, pixels, layout = (QUICK_TASKS, QUICK_PIXELS, NARROW) if setting.quick else (TASKS, PIXELS, CELEBA)
    order = MEMORY_FORMATS[memory_format]
    network = Autocast(task_specific_network(variant, tasks, layout=layout), device).to(device).to(memory_format=order)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-4)
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randn((batch, 3, pixels, pixels), generator=generator, device=device).to(memory_format=order)
    labels = torch.randint(0, 2, (batch, tasks), generator=generator, device=device).float()
    return lambda: train_step(network, optimizer, images, labels)


@contextmanager
def _by(backend: str, setting: Setting) -> Iterator[None]:
    """Makes one of our backends run, or none."""
    chosen = use_backend(backend) if backend else nullcontext()
    with chosen, risky(backend or LOOP, setting.folder, torch.device(setting.device)):
        yield


def _peak(step: Callable[[], object], device: torch.device) -> int:
    """The most bytes during a second step, all that lies there included; on a CPU of the process's life."""
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return environment.memory_in_use(device)[1]
