"""The proof of the epilogue and the fan-out can fail: each broken line is caught."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_cases import case, check
from cuda_machine import Epilogue
from cuda_source import Broken
from support.problems import Problem

from tools.ptxvm import Violation, find_nvcc

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc")

ALONE, SHARED = False, True
BOTH, FORWARD, BACKWARD = (0, 1), (0,), (1,)  # the passes that a change is in


def of(shared: bool) -> tuple[Problem, Epilogue]:
    return case("leaky_relu", True, 3, 3, 2, (16, 24), shared=shared, dtype=torch.bfloat16)


def run(name: str | None, shared: bool, variant: str, parts: int) -> None:
    for schedule in ("forward", "reversed", 1):
        check(*of(shared), variant, parts, code=BROKEN[shared][name], threads=64, schedule=schedule)


@pytest.mark.parametrize("shared", [ALONE, SHARED])
@pytest.mark.parametrize(("variant", "parts"), [("resident", 1), ("split", 3)])
def test_unchanged(variant: str, parts: int, shared: bool) -> None:
    run(None, shared, variant, parts)


MUTANTS: dict[str, tuple[str, str, tuple[int, ...], bool, str, int, tuple[str, ...]]] = {
    "no barrier between the statistics and the tasks' factors": (
        "shared[threadIdx.x] = total;\n    __syncthreads();", "shared[threadIdx.x] = total;",
        FORWARD, SHARED, "resident", 1, ("unwritten read", "race"),
    ),
    "no barrier between the tasks' factors and their use": (
        "sums[i] = {};\n  __syncthreads();", "sums[i] = {};",
        BACKWARD, SHARED, "split", 3, ("unwritten read", "race"),
    ),
    "no barrier between the warps' sums and their merge": (
        "  __syncthreads();\n  Sums<A>* partial", "  Sums<A>* partial",
        BACKWARD, SHARED, "split", 3, ("race",),
    ),
    "no barrier between the tasks' sums and the factors of dx": (
        "  // dx = h + (x - center) * scale + bias\n  __syncthreads();", "",
        BACKWARD, SHARED, "split", 3, ("race",),
    ),
    "h of another thread": (
        "slot.load(mine + (int64_t(k) * V + e)", "slot.load(mine + kPiece + (int64_t(k) * V + e)",
        BACKWARD, SHARED, "streaming", 1, ("race", "bounds"),
    ),
    "every task's gradient of the residual in the first one's place": (
        "dresidual + t * p.n.dresidual.t", "dresidual",
        BACKWARD, SHARED, "split", 3, ("race", "write count"),
    ),
    "the residual kept in another's place": (
        "kept_residual.template put<U>(k, u, added[u]);", "kept_residual.template put<U>(k, u + 1, added[u]);",
        BACKWARD, ALONE, "resident", 1, ("race", "bounds", "unwritten read"),
    ),
    "loaded slots that do not move up": (
        "slots[u - 1] = slots[u];", "",
        BOTH, ALONE, "resident", 1, ("out of bounds; worst",),
    ),
    "one residual for all tasks": (
        "residual + t * p.n.residual.t, p.n.residual, walk.template place<kMasks>",
        "residual, p.n.residual, walk.template place<kMasks>",
        FORWARD, SHARED, "resident", 1, ("out of bounds; worst",),
    ),
    "a sum over tasks without their gates": (
        "scale * of_task.total, scale * of_task.dot", "of_task.total, of_task.dot",
        BACKWARD, SHARED, "split", 3, ("out of bounds; worst",),
    ),
    "the slope on the wrong side": (
        "return z > 0 ? dy : dy * slope", "return z < 0 ? dy : dy * slope",
        BACKWARD, ALONE, "split", 3, ("out of bounds; worst",),
    ),
    "z without the residual in the backward": (
        "if (p.residual_data != nullptr) z[e] += r[e];\n      if (epilogue", "if (epilogue",
        BACKWARD, ALONE, "split", 3, ("out of bounds; worst",),
    ),
}  # fmt: skip


def broken(shared: bool, *kernels: str) -> Broken:
    chosen = {name: mutant for name, mutant in MUTANTS.items() if mutant[3] == shared}
    return Broken(
        {name: (old, new, *(kernels[k] for k in passes)) for name, (old, new, passes, *_) in chosen.items()}, *kernels
    )


BROKEN = {
    ALONE: broken(ALONE, "forward_epilogue_bf16_rows", "backward_epilogue_bf16_rows"),
    SHARED: broken(SHARED, "forward_epilogue_bf16_rows", "backward_fan_out_bf16_rows"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant(name: str) -> None:
    *_, shared, variant, parts, kinds = MUTANTS[name]
    caught: Any
    with pytest.raises((Violation, AssertionError)) as caught:
        run(name, shared, variant, parts)
    assert any(kind in str(caught.value) for kind in kinds), caught.value
