"""Step: what this device can do at best, and what a layer costs the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_day import journal, race
from benchmarks.gpu_day.facts import FACTS
from benchmarks.gpu_day.risky import risky
from benchmarks.gpu_day.step_api import Measurement, Setting
from benchmarks.timing.measure import measure, step_candidate, summarize, timer_for
from tsbn_kernels import FusedTSigmaBN2d, use_backend

BYTES, QUICK_BYTES = 4 << 30, 8 << 20


def cases(setting: Setting) -> list[Measurement]:
    """The machine; its ceilings; what a layer costs the host by each backend."""
    found = [Measurement(name, partial(fact, setting.device)) for name, fact in FACTS.items()]
    found += [
        Measurement("memory", partial(memory, setting)),
        Measurement("empty kernel", partial(empty_kernel, setting)),
    ]
    backends = [entrant.backend for entrant in race.ours(torch.device(setting.device))]
    return found + [Measurement(f"host, {backend}", partial(host, backend, setting)) for backend in backends]


def memory(setting: Setting) -> dict[str, Any]:
    """Bytes a second of a copy, of reading alone and of writing alone."""
    device = torch.device(setting.device)
    size = QUICK_BYTES if setting.quick else BYTES
    x = torch.randn(size // 4, device=device)
    y = torch.empty_like(x)
    ways: dict[str, tuple[Callable[[], object], int]] = {
        "copy": (lambda: y.copy_(x), 2 * size),
        "read": (x.sum, size),
        "write": (lambda: y.fill_(1.5), size),
    }
    effort = race.QUICK_EFFORT if setting.quick else race.EFFORT
    times = summarize(measure({way: step_candidate(run) for way, (run, _) in ways.items()}, effort, timer_for(device)))
    rates = {way: ways[way][1] / summary.median for way, (summary,) in times.items()}
    journal.note(setting.folder, "ceiling", **rates)
    return rates


def empty_kernel(setting: Setting) -> dict[str, Any]:
    """Seconds of a kernel that does next to nothing: called by the host, and in a graph."""
    device = torch.device(setting.device)
    one = torch.zeros(1, device=device)

    def add() -> None:
        one.add_(1)

    found = {"kernel_called": seconds_called(add, device, setting.quick)}
    if race.can_capture(device):
        found["kernel_in_graph"] = race.replayed(add, race.EFFORT, 1, 2e-6, device).median
    journal.note(setting.folder, "ceiling", **found)
    return found


def host(backend: str, setting: Setting) -> dict[str, Any]:
    """Seconds that the host takes for a layer on a tiny tensor: what no kernel can make faster."""
    device = torch.device(setting.device)
    layer = FusedTSigmaBN2d(3, 8).to(device)
    x = torch.randn(12, 8, 4, 4, device=device, requires_grad=True)
    dy = torch.randn_like(x)
    with use_backend(backend), risky(backend, setting.folder, device):
        found = {
            "forward": seconds_called(lambda: layer(x), device, setting.quick),
            "forward+backward": seconds_called(
                lambda: torch.autograd.grad(layer(x), (x, layer.weight), dy), device, setting.quick
            ),
        }
    journal.note(setting.folder, "host", entrant=backend, **found)
    return found


def seconds_called(run: Callable[[], object], device: torch.device, quick: bool) -> float:
    """Mean seconds of one of many calls, up to the end of the last one's kernels."""
    count = 3 if quick else 300
    for _ in range(3):
        run()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        run()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return (time.perf_counter() - started) / count
