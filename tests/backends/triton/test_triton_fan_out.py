"""One input for all tasks in the Triton kernels: every plan in the interpreter, the compiled code and its traffic."""

from __future__ import annotations

import inspect
from collections.abc import Hashable
from dataclasses import replace
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
from support.problems import FORMATS, STACKINGS

pytest.importorskip("triton")
from support import compiled
from support.fused import Epilogue, assert_equals_reference, fused
from support.interpreter import Function, device, interpreted, kernels, passes
from test_triton_compiled import SIZES, assert_traffic, toy

from tsbn_kernels.backends.fallback import KernelError
from tsbn_kernels.backends.plan import DEVICES, Plan, Work
from tsbn_kernels.backends.plan.triton import alternatives, is_even, plan
from tsbn_kernels.backends.triton.kernels import fan_out
from tsbn_kernels.definition.activations import ACTIVATIONS

EPILOGUES: tuple[Epilogue, ...] = tuple(zip(("none", *ACTIVATIONS), cycle((False, True))))

# ---- every plan in the interpreter -------------------------------------------------------------------------------

SMALL = [(3, 4, 2, (8,)), (2, 5, 3, (7,)), (2, 3, 2, (193,)), (3, 8, 2, (40,)), (1, 3, 2, (5,))]


def test_every_plan() -> None:
    reached: set[Hashable] = set()
    rounds = zip(cycle(EPILOGUES), cycle(STACKINGS), cycle((torch.float32, torch.bfloat16)), strict=False)
    for size, memory_format, training in product(SMALL, FORMATS, (True, False)):
        for multiprocessors in (1, 8):
            epilogue, stacking, dtype = next(rounds)
            options = {"stacking": stacking, "memory_format": memory_format, "dtype": dtype}
            call = fused(
                *size, epilogue=epilogue, shared=True, training=training, bias=epilogue[0] != "silu", **options
            )
            with interpreted(device(threads=16, multiprocessors=multiprocessors)):
                assert_equals_reference(call)
                assert_equals_reference(replace(call, sums=False))
                for one in (kept.plan for kept in passes()):
                    kind = one.variant, one.work.family, one.work.direction
                    reached.update({kind, (*kind, is_even(one.work, one.tile)), (*kind, one.work.training)})
    for family, direction in product(("rows", "columns"), ("forward", "backward")):
        for variant, even in product(("resident", "split", "elementwise"), (True, False)):
            assert (variant, family, direction, even) in reached
            assert (variant, family, direction, variant != "elementwise") in reached


def test_float64_and_given_strides() -> None:
    """What x, dy and residual are cut from holds NaN elsewhere."""
    for memory_format in FORMATS:
        options = {"dtype": torch.float64, "memory_format": memory_format}
        call = fused(2, 5, 3, (53,), epilogue=("gelu", True), shared=True, **options)
        x, dy, residual = (
            torch.stack((t, torch.full_like(t, torch.nan)), 1).flatten(0, 1)[::2]
            for t in (call.p.x, call.p.dy, call.residual)
        )
        with interpreted(device(threads=16, multiprocessors=8)):
            assert_equals_reference(replace(call, p=call.p._replace(x=x, dy=dy), residual=residual))


# ---- as compiled -------------------------------------------------------------------------------------------------

COMPILED = [
    ("resident", "rows", True, torch.bfloat16, "sm_90", ("relu", True)),
    ("resident", "columns", False, torch.float32, "sm_80", ("silu", False)),
    ("split", "rows", True, torch.float32, "sm_100", ("gelu", True)),
    ("split", "rows", False, torch.bfloat16, "sm_80", ("none", False)),
    ("split", "columns", True, torch.bfloat16, "sm_90", ("leaky_relu", False)),
    ("split", "columns", False, torch.float64, "sm_90", ("gelu", False)),
    ("elementwise", "rows", True, torch.bfloat16, "sm_100", ("relu", True)),
    ("elementwise", "columns", False, torch.float32, "sm_90", ("none", False)),
]


@pytest.mark.parametrize(("variant", "family", "even", "dtype", "target", "epilogue"), COMPILED)
def test_compiled(variant: str, family: str, even: bool, dtype: torch.dtype, target: str, epilogue: Epilogue) -> None:
    memory_format = "contiguous" if family == "rows" else "channels_last"
    size = SIZES[variant, family, even]
    sums = variant != "elementwise"
    # Where no gradient of the bias is asked for, a plan does not know of it.
    options = {"dtype": dtype, "memory_format": memory_format, "stacking": "sample_major", "bias": sums}
    with compiled.machine(toy(variant, target), "reversed") as done:
        assert_equals_reference(fused(*size, epilogue=epilogue, shared=True, training=sums, sums=sums, **options))
    assert [(one.variant, one.work.family) for one in done.plans] == [(variant, family)] * 2
    assert_traffic(done, aligned=False)
    for report, what in product(done.reports if even else (), ("load", "store")):
        moved = compiled.moved(report, what, activations=True)
        # What was gathered for bfloat16 is float32: a thread loads a sector by two instructions.
        half = report.kernel == "fan_out_gradient" and what == "load" and dtype == torch.bfloat16
        assert half or moved.sectors * 32 == moved.bytes


MUTANTS = {
    "a task reads what belongs to the first": ("of_task", "tl.cast(t, tl.int64)", "tl.cast(0 * t, tl.int64)"),
    "the last task alone is gathered": ("fan_out_gather", "gathered += gradient", "gathered = gradient"),
    "the first task's terms alone": ("fan_out_gradient", "add_splits(terms, T,", "add_splits(terms, 1,"),
    "one sum overwrites the other": ("fan_out_gather", "(split + splits) * size", "split * size"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    function, text, broken = MUTANTS[name]
    source = inspect.getsource(getattr(fan_out, function).fn)
    assert source.count(text) == 1
    file = tmp_path / "mutant.py"
    file.write_text(source.replace(text, broken))
    call = fused(2, 3, 2, (211,), epilogue=("relu", True), shared=True)
    with interpreted(device(threads=16, multiprocessors=8)):
        assert_equals_reference(call)
        names = dict(vars(kernels().fan_out))
        exec(compile(file.read_text(), file, "exec"), names)
        monkeypatch.setattr(kernels().fan_out, function, Function(names[function].fn))
        with pytest.raises((AssertionError, KernelError)) as caught:
            assert_equals_reference(call)
        # What the interpreter finds in a kernel arrives as the kernel's error.
        assert isinstance(caught.value, AssertionError) or isinstance(caught.value.__cause__, AssertionError)


# ---- plans -------------------------------------------------------------------------------------------------------


def celeba(family: str, **details: Any) -> Plan:
    return plan(Work(40, 256, 64, 4096, 2, family, fan_out=True, **details), DEVICES["H100"])  # type: ignore[arg-type]


def test_bytes() -> None:
    """Every task's activation moves once, the input twice, and the gathered gradients are written and read once."""
    for family in ("rows", "columns"):
        forward, backward = celeba(family), celeba(family, direction="backward", bias=True)
        work, one = backward.work, forward.work.input_bytes
        assert forward.activation_bytes_read == 2 * one
        assert forward.activation_bytes_written == 40 * one
        assert backward.activation_bytes_read == 40 * one + 2 * one + 2 * one  # in float32
        assert backward.activation_bytes_written == one + 2 * one
        assert (forward.launches, backward.launches) == (2, 3)
        partials = 2 * 2 * backward.splits * work.tasks * work.channels * 4  # two sums, written and read
        assert partials < 0.04 * backward.activation_bytes_read


def test_alternatives_of_a_gathering_backward_have_one_tile_a_program() -> None:
    for other in alternatives(celeba("rows", direction="backward")):
        assert other.splits == other.tiles
