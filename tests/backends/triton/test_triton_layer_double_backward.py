"""The Triton kernel of layer normalisation's second derivative: in Triton's interpreter, and as compiled for NVIDIA."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
from support.problems import DTYPES, STACKINGS
from support.tolerances import assert_same_bits
from support.twice import LayerCall, assert_layer_matches_definition, layer_call

pytest.importorskip("triton")
from support import compiled
from support.interpreter import device, interpreted, passes
from test_triton_compiled import TARGETS, assert_traffic

from tools.ptxvm.launch import Violation
from tsbn_kernels.backends import triton
from tsbn_kernels.backends.fallback import Health
from tsbn_kernels.backends.plan import DEVICES, Device
from tsbn_kernels.backends.plan.layer_double_backward import fits, plan, work_of
from tsbn_kernels.backends.plan.triton import is_even
from tsbn_kernels.backends.triton.launch import Launch
from tsbn_kernels.definition import layer_norm as reference
from tsbn_kernels.definition.options import LayerOptions
from tsbn_kernels.operator import layer_ops
from tsbn_kernels.operator.registry import chained

run = layer_ops.operators("triton").layer_norm_double_backward
FEW, MANY = device(threads=64, multiprocessors=1), device(threads=128, multiprocessors=16)
T = 2


def make(
    size: tuple[tuple[int, ...], tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
    stacking: str = "task_major",
    rms: bool = False,
    fan_out: bool = False,
) -> LayerCall:
    """A call with the same numbers each time."""
    torch.manual_seed(0)
    return layer_call(size, dtype, LayerOptions(T, 1e-5, "identity", stacking, rms, fan_out))


# ---- in the interpreter ----------------------------------------------------------------------------------------------

SIZES = [((2, 3), (7,)), ((3,), (16,)), ((1, 2, 4), (3, 5)), ((33, 5), (1,)), ((48,), (128,)), ((21, 3), (130,))]


def test_every_plan() -> None:
    reached: set[Hashable] = set()
    forms = cycle(((False, False), (True, False), (False, True), (True, True), (False, False)))
    rounds = zip(forms, cycle(STACKINGS), cycle(DTYPES), strict=False)
    for size, toy in product(SIZES, (FEW, MANY)):
        (rms, fan_out), stacking, dtype = next(rounds)
        call = make(size, dtype, stacking, rms, fan_out)
        with interpreted(toy, overflow=True):
            assert_layer_matches_definition(run(*call), call)
            for made in (one.plan for one in passes()):
                reached |= {("even", is_even(made.work, made.tile)), ("split", made.splits > 1)}
                reached |= {("one tile", made.tiles == 1), ("fan-out", fan_out), ("rms", rms)}
    assert reached == set(product(("even", "split", "one tile", "fan-out", "rms"), (True, False)))


def test_rows_that_do_not_fit() -> None:
    """Are left to the definition, as are no rows."""
    call = make(((1, 2), (520,)), rms=True)
    empty = make(((0, 2), (5,)))
    with interpreted(FEW):
        for one in (call, empty):
            expected = reference.layer_norm_double_backward(*one)
            for got, wanted in zip(run(*one), expected, strict=True):
                assert_same_bits(got, wanted)
        assert passes() == []
    for dtype, most in ((torch.bfloat16, 4096), (torch.float64, 2048)):
        for length in (most, most + 1):
            x = torch.empty(4, length, dtype=dtype, device="meta")
            work = work_of(x, x[:2], LayerOptions(2, 0.0, "identity", "task_major"))
            assert fits(work, DEVICES["H100"]) == (length == most)


def test_operands_that_lie_anywhere() -> None:
    """Their order and alignment change no bits."""
    call = make(((20, 2), (53,)))

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor.new_full((1,), torch.nan), tensor.flatten()])[1:].view(tensor.shape)

    def turned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)

    with interpreted(MANY):
        expected = run(*call)
        assert passes()[0].plan.splits > 1
        for moved in (shifted, turned):
            saved = call.saved._replace(s=moved(call.saved.s), rstd=shifted(call.saved.rstd))
            found = run(moved(call.ddx), moved(call.dy), saved, moved(call.factors), call.options)
            for got, wanted in zip(found, expected, strict=True):
                assert_same_bits(got, wanted)


def test_what_runs_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernel, and operations of PyTorch's in the place of one that does not run."""
    monkeypatch.setattr(triton, "health", Health("Triton"))
    call, definition = make(((3, 2), (5,))), reference.layer_norm_double_backward
    on_gpu, expected = chained("layer_norm_double_backward", "CUDA", definition), definition(*call)

    def fails(self: Launch, *arguments: object) -> None:
        raise ValueError("too many programs")

    with interpreted(FEW):
        assert_layer_matches_definition(on_gpu(*call), call)
        assert [one.plan.launches for one in passes()] == [1]
        monkeypatch.setattr(Launch, "__call__", fails)
        with pytest.warns(UserWarning, match="without the kernel layer_norm_double_backward of Triton, more slowly"):
            found = on_gpu(*call)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# ---- as compiled -----------------------------------------------------------------------------------------------------


def toy(target: str, multiprocessors: int) -> Device:
    """A GPU that runs so few programs at a time that each has several tiles."""
    return replace(DEVICES[TARGETS[target]], multiprocessors=multiprocessors, threads=256)


COMPILED = [
    (((12, 4), (384,)), torch.bfloat16, "sm_90", {"stacking": "sample_major"}),
    (((20, 2), (67,)), torch.float32, "sm_80", {"rms": True}),
    (((6, 5), (256,)), torch.float16, "sm_100", {"fan_out": True}),
]


@pytest.mark.parametrize(("size", "dtype", "target", "form"), COMPILED, ids=["vit", "odd", "fan-out"])
def test_compiled(size: Any, dtype: torch.dtype, target: str, form: dict[str, Any]) -> None:
    """Results, bounds, races, unwritten reads, every value written once, and the bytes that the plan claims."""
    call = make(size, dtype, **form)
    with compiled.machine(toy(target, 4), "reversed") as done:
        assert_layer_matches_definition(run(*call), call)
    (made,) = done.plans
    assert min(made.splits, made.share) > 1
    read = call.dy.nbytes * 3
    assert (made.activation_bytes_read, made.activation_bytes_written) == (read, 2 * call.dy.nbytes)
    assert_traffic(done, aligned=size[1] != (67,))


# ---- broken on purpose -----------------------------------------------------------------------------------------------

MUTANTS = {
    "sums of all splits in one place": ("    partials += split * size\n", "", "race|write count|unwritten"),
    "the last tile's sum alone": ("rests += gradient * rest", "rests = gradient * rest", "out of"),
    "what the statistics give is left out": ("(bend + cross)", "bend", "out of"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, broken, message = MUTANTS[name]
    compiled.break_kernel("layer_norm", text, broken, tmp_path, monkeypatch)
    call = make(((20, 2), (67,)))
    with compiled.machine(toy("sm_90", 4)), pytest.raises((Violation, AssertionError), match=message):
        assert_layer_matches_definition(run(*call), call)


# ---- plans -----------------------------------------------------------------------------------------------------------


def test_bytes_of_transformers() -> None:
    """Five tensors of x's size; vectors and sums are a few hundredths of that."""
    for tasks, rows, length in ((5, 8 * 1024, 384), (8, 16 * 512, 768), (2, 8192, 4096)):
        x, weight = (torch.empty(n, length, dtype=torch.bfloat16, device="meta") for n in (tasks * rows, tasks))
        made = plan(work_of(x, weight, LayerOptions(tasks, 0.0, "identity", "task_major")), DEVICES["H100"])
        assert (made.activation_bytes_read, made.activation_bytes_written) == (3 * x.nbytes, 2 * x.nbytes)
        more = made.bytes_read + made.bytes_written - 5 * x.nbytes
        assert more < 0.05 * 5 * x.nbytes
