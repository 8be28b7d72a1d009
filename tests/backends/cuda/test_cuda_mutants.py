"""The proof can fail: kernels with one line broken are each caught by the machine, or by the numbers."""

from __future__ import annotations

import itertools

import pytest
import torch
from cuda_machine import Forward, forward
from cuda_source import Broken
from support.problems import Problem, definition, problem
from support.tolerances import FORWARD, assert_relative, assert_within

from tools.ptxvm import Violation, find_nvcc

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc")


def shaped(*spatial: int, dtype: torch.dtype = torch.bfloat16) -> Problem:
    return problem(2, 3, 2, spatial, dtype=dtype, bias=False)


def right(p: Problem, result: Forward) -> None:
    expected = definition(p)
    assert_relative(result.var, expected.var, 1e-6)
    assert_within(result.y, expected.y, FORWARD[p.x.dtype])


EVEN, ODD = (24, 32), (7, 7)


def test_unchanged() -> None:
    for spatial in (EVEN, ODD):
        for variant, parts in (("streaming", 1), ("resident", 1), ("cluster", 4), ("split", 3)):
            p = shaped(*spatial)
            right(p, forward(p, variant, parts, code=BROKEN[None], threads=64))


VIOLATIONS = {
    "no barrier between the warps' states and their merge": (
        "if (lane < 1u << log_lanes) area[warp * width + lane * CH + c] = s;\n  }\n  __syncthreads();",
        "if (lane < 1u << log_lanes) area[warp * width + lane * CH + c] = s;\n  }\n",
        "streaming", 1, EVEN, ("unwritten read", "race"),
    ),
    "no barrier between the factors and their use": (
        "own_parameters);\n  }\n  __syncthreads();",
        "own_parameters);\n  }\n",
        "streaming", 1, EVEN, ("unwritten read", "race"),
    ),
    "no barrier of the cluster before its states are read": (
        "    cluster_arrive();\n    cluster_wait();\n", "    __syncthreads();\n",
        "cluster", 4, EVEN, ("unwritten read", "race", "barrier", "deadlock"),
    ),
    "no barrier of the cluster before a block ends": (
        "  if (walk.cluster() > 1) cluster_wait();\n}", "}",
        "cluster", 4, EVEN, ("which has exited",),
    ),
    "a shuffle that names half a warp": (
        "return {__shfl_down_sync(0xffffffff, s.count, by)", "return {__shfl_down_sync(0x0000ffff, s.count, by)",
        "streaming", 1, EVEN, ("mask", "member"),
    ),
    "a slot too many in a thread": (
        "blockDim.x - 1) / blockDim.x", "blockDim.x) / blockDim.x",
        "streaming", 1, EVEN, ("bounds", "write count"),
    ),
    "the tail of a run one element too long": (
        "after < V ? int(after) : V;", "after < V ? int(after) + 1 : V;",
        "streaming", 1, ODD, ("bounds", "race"),
    ),
    "the head of a run one element early": (
        "before < 0 ? int(-before) : 0;", "before < 0 ? int(-before) - 1 : 0;",
        "streaming", 1, ODD, ("bounds", "race"),
    ),
    "a slot beyond the shared memory": (
        "shared[slot_of_thread(k + u)] = value;", "shared[slot_of_thread(k + u) + 1] = value;",
        "resident", 1, EVEN, ("bounds", "race", "unwritten read"),
    ),
    "a part left out of the partial buffer": (
        "p.partial) + int64_t(block) * width();", "p.partial) + int64_t(block + 1) * width();",
        "split", 3, EVEN, ("bounds", "race"),
    ),
    "no barrier between what two warps have merged and its merge": (
        "= total;\n  __syncthreads();\n  if (threadIdx.x < width) {\n#pragma unroll 1\n    for (uint32_t k = 1;",
        "= total;\n  if (threadIdx.x < width) {\n#pragma unroll 1\n    for (uint32_t k = 1;",
        "split", 40, EVEN, ("unwritten read", "race"),
    ),
}  # fmt: skip
BROKEN = Broken({name: (old, new) for name, (old, new, *_) in VIOLATIONS.items()}, "forward_bf16_rows")


@pytest.mark.parametrize("name", VIOLATIONS)
def test_violation(name: str) -> None:
    *_, variant, parts, spatial, kinds = VIOLATIONS[name]

    def run() -> None:
        for threads, schedule in itertools.product((64, 32), ("forward", "reversed", 1, 2)):
            forward(shaped(*spatial), variant, parts, code=BROKEN[name], threads=threads, schedule=schedule)

    with pytest.raises(Violation) as caught:
        run()
    assert any(kind in str(caught.value) for kind in kinds), caught.value


WRONG = {
    "a shuffle over the wrong distance": ("for (int by = 16; by >=", "for (int by = 8; by >="),
    "a share of the wrong side": ("share = quotient(b.count, count);", "share = quotient(a.count + 1, count);"),
    "half of the lanes that have merged": ("if (by < lanes)", "if (by < lanes / 2)"),
    "the last part is not merged": ("area, width, cluster, [&]", "area, width, cluster - 1, [&]"),
    "a remainder with the wrong sign": ("(total.shift - mean) + total.rest", "(mean - total.shift) - total.rest"),
}
SHIFTED = Broken(WRONG, "forward_f16_rows")


@pytest.mark.parametrize("name", WRONG)
def test_wrong_result(name: str) -> None:
    p = shaped(*EVEN, dtype=torch.float16)
    p = p._replace(x=(p.x.double() + 1000).to(p.x.dtype))
    with pytest.raises(AssertionError):
        right(p, forward(p, "cluster", 4, code=SHIFTED[name], threads=64))
