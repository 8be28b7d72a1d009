"""The Triton kernels of the second derivative: in Triton's interpreter, and as compiled for NVIDIA."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from itertools import cycle, product
from pathlib import Path

import pytest
import torch
from support.problems import FORMATS, STACKINGS
from support.twice import assert_equals_definition, cut_out, in_formats, make_call

pytest.importorskip("triton")
from support import compiled
from support.interpreter import device, interpreted, passes
from test_triton_compiled import SIZES, TARGETS, assert_traffic

from tools.ptxvm.launch import Violation
from tsbn_kernels.backends import triton
from tsbn_kernels.backends.fallback import Health
from tsbn_kernels.backends.plan import DEVICES, Device
from tsbn_kernels.backends.plan.double_backward import TwicePlan, plan, work_of
from tsbn_kernels.backends.plan.triton import is_even
from tsbn_kernels.backends.triton.launch import Launch
from tsbn_kernels.definition import double_backward as reference
from tsbn_kernels.definition.options import Options
from tsbn_kernels.operator import ops
from tsbn_kernels.operator.registry import chained

TRITON = ops.flat(ops.operators("triton"))
TOY = device(threads=64, multiprocessors=2)

# ---- in the interpreter ----------------------------------------------------------------------------------------------

SMALL = [(3, 4, 2, (8,)), (2, 5, 3, (7,)), (2, 3, 2, (193,)), (3, 8, 2, (40,)), (1, 3, 2, ())]


def test_every_plan() -> None:
    reached: set[Hashable] = set()
    rounds = zip(cycle(STACKINGS), cycle((torch.float32, torch.bfloat16, torch.float16, torch.float64)), strict=False)
    for size, memory_format, multiprocessors in product(SMALL, FORMATS, (1, 8)):
        stacking, dtype = next(rounds)
        call = make_call(*size, stacking=stacking, memory_format=memory_format, dtype=dtype)
        with interpreted(device(threads=64, multiprocessors=multiprocessors)):
            assert_equals_definition(call, TRITON)
            (made,) = (one.plan for one in passes())
        reached.add((made.work.family, is_even(made.work, made.tile)))
        reached.add((made.work.family, "split" if made.splits > 1 else "whole"))
    assert reached == set(product(("rows", "columns"), (True, False, "split", "whole")))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_operands_that_lie_apart(memory_format: str) -> None:
    """Each has strides of its own, is in the other memory format, or is one input that all tasks share."""
    other = {"contiguous": "channels_last", "channels_last": "contiguous"}[memory_format]
    call = make_call(2, 3, 3, (2, 5), stacking="sample_major", memory_format=memory_format, dtype=torch.float64)
    shared = make_call(2, 3, 3, (2, 5), stacking="task_axis", memory_format=memory_format)
    x, ddx = (t[:1].expand(t.shape) for t in (shared.x, shared.ddx))
    with interpreted(TOY):
        for one in (cut_out(call), in_formats(call, other), shared._replace(x=x, ddx=ddx)):
            assert_equals_definition(one, TRITON)


def test_no_values() -> None:
    call = make_call(2, 0, 3, (4,))
    with interpreted(TOY):
        assert torch.equal(call.sums(TRITON), torch.zeros(5, 2, 3, dtype=torch.float64))
        assert [gradient.shape for gradient in call.gradients(TRITON)] == [call.x.shape] * 2


def test_what_runs_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels, and operations of PyTorch's in the place of one that does not run."""
    monkeypatch.setattr(triton, "health", Health("Triton"))
    call = make_call(2, 3, 3, (5,))
    options = Options(call.num_tasks, 0.0, "identity", call.stacking)
    launched: list[str] = []

    def fails(self: Launch, *arguments: object) -> None:
        launched.append(self.kernel)
        raise ValueError("too many programs")

    for name, operands in {"double_backward_sums": call.read, "double_backward": (*call.read, call.factors)}.items():
        definition = getattr(reference, name)
        run, expected = chained(name, "CUDA", definition), definition(*operands, options)
        with interpreted(TOY), monkeypatch.context() as patch:
            torch.testing.assert_close(run(*operands, options), expected, rtol=1e-5, atol=1e-5)
            patch.setattr(Launch, "__call__", fails)
            with pytest.warns(UserWarning, match=f"without the kernel {name} of Triton, more slowly: ValueError"):
                found = run(*operands, options)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert launched == ["double_backward_partial", "double_backward_apply"]


# ---- as compiled -----------------------------------------------------------------------------------------------------

# Even tiles in rows and columns, and others, on every target.
COMPILED = [
    ("rows", True, torch.bfloat16, "sm_90", "sample_major"),
    ("rows", False, torch.float32, "sm_80", "task_axis"),
    ("columns", True, torch.float32, "sm_100", "task_axis"),
    ("columns", False, torch.bfloat16, "sm_90", "task_major"),
]


def toy(target: str) -> Device:
    """A GPU on which small slabs are split, and a split has several tiles."""
    return replace(DEVICES[TARGETS[target]], block_threads=256, multiprocessors=3)


@pytest.mark.parametrize(("family", "even", "dtype", "target", "stacking"), COMPILED)
def test_compiled(family: str, even: bool, dtype: torch.dtype, target: str, stacking: str) -> None:
    """Results, bounds, races, unwritten reads, every value written once, and the bytes that the plan claims."""
    memory_format = "contiguous" if family == "rows" else "channels_last"
    call = make_call(*SIZES["split", family, even], dtype=dtype, memory_format=memory_format, stacking=stacking)
    with compiled.machine(toy(target), "reversed") as done:
        assert_equals_definition(call, TRITON)
    (made,) = done.plans
    assert (made.work.family, is_even(made.work, made.tile)) == (family, even)
    assert min(made.splits, made.share) > 1
    assert_traffic(done, aligned=even)


# ---- broken on purpose -----------------------------------------------------------------------------------------------

MUTANTS = {
    "walks one tile too far": (
        "    last = tl.minimum(first + share, tiles_of(slab, tile))\n    for i",
        "    last = tl.minimum(first + share + 1, tiles_of(slab, tile))\n    for i",
        "race|write count",
    ),
    "the last tile's sum alone": ("products += u * dz", "products = u * dz", "out of bounds"),
    "two sums in one place": ("data + 2 * step", "data + step", "race|write count|unwritten"),
    "a factor is left out": ("(deviation * f5 + f6)", "(deviation * f5)", "out of bounds"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, broken, message = MUTANTS[name]
    compiled.break_kernel("double_backward", text, broken, tmp_path, monkeypatch)
    call = make_call(*SIZES["split", "rows", True])
    with compiled.machine(toy("sm_90")), pytest.raises((Violation, AssertionError), match=message):
        assert_equals_definition(call, TRITON)


# ---- plans -----------------------------------------------------------------------------------------------------------


def test_bytes_of_the_celeba_layers() -> None:
    """Eight tensors of x's size, and vectors and sums that are a few hundredths of that."""
    for size, memory_format in product(((64, 64), (4, 4)), (torch.contiguous_format, torch.channels_last)):
        x = torch.empty(40 * 256, 64, *size, dtype=torch.bfloat16, device="meta").to(memory_format=memory_format)
        made: TwicePlan = plan(work_of(x, Options(40, 0.0, "identity", "task_major")), DEVICES["H100"])
        assert (made.activation_bytes_read, made.activation_bytes_written) == (6 * x.nbytes, 2 * x.nbytes)
        more = made.bytes_read + made.bytes_written - 8 * x.nbytes
        assert more < 0.03 * 8 * x.nbytes
