"""The Triton kernels of layer normalisation in Triton's interpreter: every kind of call, by every kind of plan."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.layer_problems import LayerProblem, assert_matches_definition, definition, layer_problem, run
from support.problems import DTYPES, GATES, STACKINGS, unstack
from support.tolerances import (
    Tolerance,
    assert_relative,
    assert_same_bits,
    assert_within,
)

pytest.importorskip("triton")
from support.interpreter import Function, device, interpreted, passes
from support.interpreter import kernels as loaded

from tsbn_kernels.backends.fallback import KernelError
from tsbn_kernels.backends.plan.triton import is_even
from tsbn_kernels.backends.triton import layer_norm as backend
from tsbn_kernels.backends.triton import operator as find
from tsbn_kernels.backends.triton.kernels import layer_norm as kernels
from tsbn_kernels.definition.options import LayerNeeds, LayerOptions, LayerSaved
from tsbn_kernels.operator import layer_ops

triton = layer_ops.flat(backend)
FEW, MANY = device(threads=64, multiprocessors=1), device(threads=256, multiprocessors=32)


# ---- every call and plan -----------------------------------------------------------------------------------------

FORMS: list[dict[str, bool]] = [{"bias": True}, {"bias": False}, {"rms": True}]
SIZES = [
    {"N": 2, "tokens": (3,), "shape": (7,)},
    {"N": 3, "tokens": (), "shape": (16,)},
    {"N": 1, "tokens": (2, 4), "shape": (3, 5)},
    {"N": 33, "tokens": (5,), "shape": (1,)},
    {"N": 8, "tokens": (9,), "shape": (256,)},
    {"N": 2, "tokens": (3,), "shape": (2500,)},
]


def problems() -> Iterator[LayerProblem]:
    rounds = zip(cycle(STACKINGS), cycle(GATES), cycle(DTYPES), cycle((False, True, True)), strict=False)
    for size, form, fan_out in product(SIZES, FORMS, (False, True)):
        stacking, gate, dtype, residual = next(rounds)
        options: dict[str, Any] = {"stacking": stacking, "gate": gate, "dtype": dtype, "residual": residual}
        yield layer_problem(**size, **form, **options, fan_out=fan_out)
        next(rounds)


def test_every_plan() -> None:
    reached: set[Hashable] = set()
    for p, toy in zip(problems(), cycle((FEW, MANY, MANY)), strict=False):
        with interpreted(toy):
            assert_matches_definition(p, run(p, triton))
            for one in (kept.plan for kept in passes()):
                kind = one.work.direction, one.work.fan_out
                reached |= {(*kind, "even", is_even(one.work, one.tile)), (*kind, "merges", one.merges)}
                reached |= {(*kind, "one tile", one.tiles == 1), (*kind, "apart", not one.work.needs_dx)}
                reached |= {(*kind, "crowded", one.crowded)}
    for direction, fan_out in product(("forward", "backward"), (True, False)):
        assert {(direction, fan_out, "even", even) for even in (True, False)} <= reached
        assert {(direction, fan_out, "one tile", one) for one in (True, False)} <= reached
        assert {(direction, fan_out, "crowded", crowded) for crowded in (True, False)} <= reached
    assert {("backward", fan_out, "merges", merges) for fan_out in (True, False) for merges in (True, False)} <= reached
    assert {("backward", True, "apart", True), ("backward", True, "apart", False)} <= reached


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fan_out", [False, True])
def test_long_rows(fan_out: bool, dtype: torch.dtype) -> None:
    """Above 8,192 values the parameters' gradients have a launch of their own; 16,384 are the most."""
    for size, launches in ((8192, 1 + fan_out), (16384, 2)):
        p = layer_problem(2, 1, (3,), (size,), dtype=dtype, fan_out=fan_out, residual=True)
        with interpreted(device(threads=1024)):
            assert_matches_definition(p, run(p, triton))
            assert len(passes()) == 1 + launches


def test_a_gpu_runs_these_operators() -> None:
    for name in ("layer_norm", "layer_norm_backward"):
        assert find(name) is getattr(backend, name)


def test_longer_rows_are_left_to_the_reference() -> None:
    p = layer_problem(2, 1, (1,), (16385,))
    with interpreted(MANY), pytest.raises(ValueError, match="rows of 16385 values are longer"):
        run(p, triton)
    options = LayerOptions(2, 1e-5, p.gate, p.stacking)
    mean, rstd = torch.zeros(2), torch.ones(2)
    with interpreted(MANY):  # which needs no row as a whole
        found = backend.layer_norm_backward(
            p.dy, None, LayerSaved(p.x, p.weight, mean, rstd), LayerNeeds(False, False, True), options
        )
    torch.testing.assert_close(found.dbias, p.dy.reshape(2, -1))


@settings(max_examples=60)
@given(
    st.fixed_dictionaries(
        {
            "T": st.integers(1, 4),
            "N": st.integers(1, 9),
            "tokens": st.sampled_from([(), (1,), (5,), (2, 7)]),
            "shape": st.sampled_from([(1,), (2,), (3, 4), (17,), (31,), (64,), (65,), (130,)]),
            "dtype": st.sampled_from(DTYPES),
            "stacking": st.sampled_from(STACKINGS),
            "gate": st.sampled_from(GATES),
            "bias": st.booleans(),
            "residual": st.booleans(),
            "rms": st.booleans(),
            "fan_out": st.booleans(),
            "seed": st.integers(0, 99),
        }
    ),
    st.sampled_from([FEW, MANY]),
)
def test_any_call(options: dict[str, Any], toy: Any) -> None:
    p = layer_problem(**options)
    with interpreted(toy, overflow=True):
        assert_matches_definition(p, run(p, triton))


# ---- numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [7, 384, 1000])
def test_a_mean_of_many_standard_deviations(size: int) -> None:
    for mean, bound in ((1.0, 5e-6), (1e3, 2e-4)):
        p = layer_problem(shape=(size,), mean=mean)
        with interpreted(MANY):
            found = run(p, triton)
        assert_within(found.y, definition(p).y, Tolerance(bound, 0))


def test_equal_values_have_no_deviation() -> None:
    p = layer_problem(shape=(300,), bias=False)
    p = p._replace(x=torch.full_like(p.x, 1234.567))
    with interpreted(MANY):
        found = run(p, triton)
    assert found.y.abs().max() < 1e-6
    assert_relative(found.rstd, torch.full_like(found.rstd, p.eps**-0.5), 1e-6)


@pytest.mark.parametrize("rms", [False, True])
def test_nan_stays_within_its_row(rms: bool) -> None:
    p = layer_problem(T=2, N=3, tokens=(), shape=(20,), rms=rms, bias=False)
    for value in (torch.nan, torch.inf):
        x = p.x.clone()
        x[1, 3] = value
        with interpreted(MANY):
            found = run(p._replace(x=x), triton)
            clean = run(p, triton)
        assert found.y[1].isnan().any()
        assert found.dx[1].isnan().any()
        others = [0, 2, 3, 4, 5]
        assert_same_bits(found.y[others], clean.y[others])
        assert_same_bits(found.dx[others], clean.dx[others])


# ---- the same bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", [FEW, MANY], ids=["few", "many"])
def test_same_bits_for_every_stacking_and_alignment(toy: Any) -> None:
    calls = [layer_problem(N=7, shape=(53,), stacking=stacking, residual=True) for stacking in STACKINGS]
    shifted = calls[0]._replace(x=torch.cat((torch.zeros(1), calls[0].x.flatten()))[1:].view(calls[0].x.shape))
    assert shifted.x.data_ptr() % 16
    with interpreted(toy):
        expected = run(calls[0], triton)
        for p in (*calls, shifted):
            found = run(p, triton)
            for name in ("dweight", "dbias"):
                assert_same_bits(getattr(found, name), getattr(expected, name))
            for name in ("y", "s", "dx"):
                stacked = getattr(found, name), getattr(expected, name)
                stackings = p.stacking, calls[0].stacking
                assert_same_bits(*(unstack(t, 3, s).contiguous() for t, s in zip(stacked, stackings, strict=True)))


@pytest.mark.parametrize("fan_out", [False, True])
@pytest.mark.parametrize("rms", [False, True])
def test_gradients_that_are_not_asked_for(rms: bool, fan_out: bool) -> None:
    """They are empty, and the others keep their bits."""
    p = layer_problem(N=5, shape=(53,), residual=True, fan_out=fan_out, rms=rms)
    with interpreted(MANY):
        everything = run(p, triton)
        whole = everything.dx, everything.dweight, definition(p).dbias if rms else everything.dbias
        for needs in product((True, False), repeat=3):
            saved = everything.s, p.weight, everything.mean, everything.rstd
            some = triton.layer_norm_backward(p.dy, p.ds, *saved, *p.options[1:], *needs)
            for got, wanted, need in zip(some[: 3 - rms], whole, needs, strict=False):
                if need and p.fan_out:  # by the same launches
                    assert_same_bits(got, wanted)
                elif need:  # without dx a program has other channels
                    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
                else:
                    assert got.numel() == 0


@pytest.mark.parametrize("shape", [(0, 5, 6), (4, 0, 6)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    x, weight = torch.empty(shape), torch.randn(2, 6)
    p = LayerProblem(x, weight, weight, x, x, x, "sigmoid", "task_major")
    with interpreted(MANY):
        found = run(p, triton)
    assert found.y.shape == found.dx.shape == shape
    assert not found.dweight.any()
    assert not found.dbias.any()


# ---- broken on purpose -------------------------------------------------------------------------------------------

MUTANTS = {
    "a row is of the task before": ("row_numbers", "n * slab.T + slab.t", "n * slab.T"),
    "rows of one sample alone": ("rows_in", "run * slab.T", "run"),
    "padding counts": ("normalize_rows", "within(values - average, place, tile)", "values - average"),
    "the sum is not rounded": ("normalize_rows", "values.to(x.dtype.element_ty).to(tile.ACC)", "values"),
    "the last tile is left out": ("layer_norm_forward", "range(first, last)", "range(first, last - 1)"),
    "no mean of the gradient": ("store_dx", "gradient - average - xhat", "gradient - xhat"),
    "the last task alone": ("layer_norm_backward", "gradient += load(", "gradient = load("),
    "the last tile's sums alone": ("layer_norm_backward", "dots += gradient", "dots = gradient"),
    "splits overwrite each other": ("layer_norm_backward", "offset = split *", "offset = 0 * split *"),
    "the sum's gradient is lost": ("store_dx", "result += load(", "result = result + 0.0 * load("),
    "parts beyond sixteen are lost": ("add_parts", "result += tl.load", "result = tl.load"),
    "no slope of the gate": ("store_parameters", "gate_slope(vector(weight, slab, tile), SIGMOID)", "1.0"),
}


def assert_every_line_is_right() -> None:
    """Calls in which every line of the kernels matters."""
    options = {"stacking": "sample_major", "residual": True, "dtype": torch.bfloat16}
    stacked = layer_problem(2, 140, (2,), (67,), **options)
    several_tiles, shared = layer_problem(2, 20, (), (600,)), layer_problem(N=5, tokens=(), shape=(67,), fan_out=True)
    for p in (stacked, several_tiles, shared):
        assert_matches_definition(p, run(p, triton))


def test_unbroken() -> None:
    with interpreted(MANY):
        assert_every_line_is_right()


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    function, text, broken = MUTANTS[name]
    source = inspect.getsource(getattr(kernels, function).fn)
    assert source.count(text) == 1
    file = tmp_path / "mutant.py"
    file.write_text(source.replace(text, broken))
    with interpreted(MANY):
        names = dict(vars(loaded().layer_norm))
        exec(compile(file.read_text(), file, "exec"), names)
        monkeypatch.setattr(loaded().layer_norm, function, Function(names[function].fn))
        with pytest.raises((AssertionError, KernelError)) as caught:
            assert_every_line_is_right()
    # What the interpreter finds in a kernel arrives as the kernel's error.
    assert isinstance(caught.value, AssertionError) or isinstance(caught.value.__cause__, AssertionError)
