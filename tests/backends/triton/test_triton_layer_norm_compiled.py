"""The kernels of layer normalisation as compiled for NVIDIA's GPUs, on the PTX machine: results and traffic.

It finds addresses outside of tensors, races, reads of what was never written, and values written twice or never.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.layer_problems import LayerProblem, assert_matches_definition, layer_problem, run
from support.problems import DTYPES, GATES, STACKINGS

pytest.importorskip("triton")
from support import compiled
from test_triton_compiled import SCHEDULES, TARGETS, assert_traffic
from test_triton_layer_norm import FORMS, triton

from tools.ptxvm.launch import Violation
from tsbn_kernels.backends.plan import DEVICES, Device


def toy(target: str, multiprocessors: int = 1) -> Device:
    """A GPU that runs so few programs at a time that each has several tiles."""
    return replace(DEVICES[TARGETS[target]], multiprocessors=multiprocessors, threads=256)


# T, N, tokens and D: parts of ViT-S and BERT, a tile of many rows, rows of one value, of no alignment, of many threads.
SIZES: dict[str, tuple[int, int, tuple[int, ...], tuple[int, ...]]] = {
    "vit": (5, 2, (12,), (384,)),
    "bert": (8, 1, (16,), (768,)),
    "narrow": (2, 8, (64,), (16,)),
    "single": (2, 3, (7,), (1,)),
    "odd": (3, 5, (7,), (67,)),
    "wide": (2, 1, (18,), (3000,)),
}
ALIGNED = ("vit", "bert", "narrow")  # every access fills its sectors


def cases() -> Iterator[Any]:
    rounds = zip(cycle(TARGETS), cycle(DTYPES), cycle(SCHEDULES), cycle(STACKINGS), cycle(GATES), strict=False)
    forms = cycle([{**form, "residual": residual} for residual in (False, True) for form in FORMS])
    for _ in range(3):
        for size in SIZES:
            target, dtype, schedule, stacking, gate = next(rounds)
            options = {"dtype": dtype, "stacking": stacking, "gate": gate, **next(forms)}
            name = f"{size}-{target}-{str(dtype)[6:]}-{schedule}-{stacking}"
            yield pytest.param(size, target, schedule, options, id=name)
        next(rounds)


@pytest.mark.parametrize(("size", "target", "schedule", "options"), list(cases()))
def test_compiled(size: str, target: str, schedule: str | int, options: dict[str, Any]) -> None:
    p = layer_problem(*SIZES[size], **options)
    with compiled.machine(toy(target), schedule) as done:
        assert_matches_definition(p, run(p, triton))
    assert_traffic(done, aligned=size in ALIGNED)


@pytest.mark.parametrize(
    ("size", "target", "options"),
    [
        ("vit", "sm_90", {"dtype": torch.bfloat16, "residual": True}),
        ("odd", "sm_80", {"dtype": torch.float32, "stacking": "sample_major"}),
        ("narrow", "sm_100", {"dtype": torch.float16, "rms": True, "stacking": "task_axis"}),
    ],
)
def test_one_input_for_all_tasks(size: str, target: str, options: dict[str, Any]) -> None:
    p = layer_problem(*SIZES[size], fan_out=True, **options)
    with compiled.machine(toy(target), "reversed") as done:
        assert_matches_definition(p, run(p, triton))
    assert_traffic(done, aligned=False)
    forward, dx, parameters = done.plans
    x, y = p.x.nbytes, p.dy.nbytes
    assert forward.activation_bytes_read == x * (1 + (p.residual is not None))
    assert dx.activation_bytes_read == y + x * (1 + (p.residual is not None))
    assert parameters.activation_bytes_read == 2 * y


@pytest.mark.parametrize(("dtype", "target"), [(torch.float32, "sm_80"), (torch.bfloat16, "sm_90")])
def test_the_longest_rows(dtype: torch.dtype, target: str) -> None:
    """The bias is loaded for each tile; the parameters' gradients have a launch of their own."""
    p = layer_problem(2, 1, (3,), (16384,), dtype=dtype, residual=True)
    with compiled.machine(toy(target)) as done:
        assert_matches_definition(p, run(p, triton))
    assert_traffic(done, aligned=True)
    assert [(plan.crowded, plan.tiles) for plan in done.plans] == [(True, 3), (True, 3), (False, 1)]


def test_traffic_of_an_addition_and_a_norm() -> None:
    """Forward two reads and two writes, backward three and one."""
    p = layer_problem(*SIZES["bert"], residual=True, dtype=torch.bfloat16)
    with compiled.machine(toy("sm_90")) as done:
        assert_matches_definition(p, run(p, triton))
    assert_traffic(done, aligned=True)
    moved = [(plan.activation_bytes_read, plan.activation_bytes_written) for plan in done.plans]
    assert moved == [(2 * p.x.nbytes, 2 * p.x.nbytes), (3 * p.x.nbytes, p.x.nbytes)]


@pytest.mark.parametrize("fan_out", [False, True])
def test_an_input_that_begins_anywhere(fan_out: bool) -> None:
    def moved(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    p = layer_problem(*SIZES["odd"], dtype=torch.bfloat16, residual=True, fan_out=fan_out)
    p = LayerProblem(*(moved(t) if isinstance(t, torch.Tensor) else t for t in p))
    assert p.x.data_ptr() % 16
    with compiled.machine(toy("sm_90")) as done:
        assert_matches_definition(p, run(p, triton))
    assert_traffic(done, aligned=False)


# ---- broken on purpose -------------------------------------------------------------------------------------------

MUTANTS = {
    "reads statistics past the end": (
        "ONE), mask=place.real > 0.0, other=0.0)",
        "ONE), mask=place.real >= 0.0, other=0.0)",
        "out of|unwritten",
    ),
    "walks one tile too far": (
        "    last = tl.minimum(first + share, tiles_of(slab, tile))\n    for k in range(first, last):\n"
        "        place = tile_at(k, slab, tile)\n        xhat = ",
        "    last = tl.minimum(first + share + 1, tiles_of(slab, tile))\n    for k in range(first, last):\n"
        "        place = tile_at(k, slab, tile)\n        xhat = ",
        "race|write count",
    ),
    "every split leaves its sums in one place": ("offset = split *", "offset = 0 * split *", "race|write count"),
    "the last part is not added": ("mask=(i < splits)", "mask=(i < splits - 1)", "out of"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, broken, message = MUTANTS[name]
    compiled.break_kernel("layer_norm", text, broken, tmp_path, monkeypatch)
    p = layer_problem(*SIZES["odd"])
    with compiled.machine(toy("sm_90", 4)), pytest.raises((Violation, AssertionError), match=message):
        assert_matches_definition(p, run(p, triton))


def test_a_missing_barrier_is_caught() -> None:
    p = layer_problem(*SIZES["wide"])
    with (
        compiled.without_barriers(),
        compiled.machine(toy("sm_90")),
        pytest.raises(Violation, match=r"race|unwritten"),
    ):
        run(p, triton)
