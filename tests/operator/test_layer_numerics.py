"""Accuracy of the native layer normalisation, against the definition in float64 on the same rounded input."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.backends import instruction_sets
from support.layer_problems import (
    LayerResults,
    assert_matches_definition,
    definition,
    layer_problem,
    run,
)
from support.problems import DTYPES, GATES, STACKINGS
from support.tolerances import STATISTICS, Tolerance, assert_relative, assert_same_bits, assert_within
from torch import Tensor

from tsbn_kernels.backends import cpu

pytestmark = pytest.mark.usefixtures("native")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
fan_outs = pytest.mark.parametrize("fan_out", [False, True])
both_forms = pytest.mark.parametrize("rms", [False, True])


@pytest.fixture(params=instruction_sets(), autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    cpu.set_instruction_set(request.param)
    yield request.param
    cpu.set_instruction_set("")


@pytest.fixture(autouse=True)
def _poisoned_pool() -> None:
    """Leaves pooled blocks full of NaN behind: large results, scratch and sums of chunks lie there."""
    x, weight = torch.zeros(1 << 14, 64), torch.zeros(1, 64)
    blocks = [torch.ops.tsbn.layer_norm(x, weight, None, None, 1e-5, "sigmoid", "task_major")[0] for _ in range(3)]
    for block in blocks:
        block.fill_(float("nan"))


# Every width of a vector and one off, tiles of narrow rows, more than one piece of a sum.
WIDTHS = [*range(1, 20), 31, 32, 33, 63, 64, 65, 384, 768, 1000, 4097, 16384]


@dtypes
@fan_outs
def test_widths(dtype: torch.dtype, fan_out: bool) -> None:
    for D in WIDTHS:
        p = layer_problem(
            2, 1 if D > 1000 else 3, (7,), (D,), dtype=dtype, fan_out=fan_out, residual=D % 2 == 0, seed=D
        )
        assert_matches_definition(p, run(p))


@dtypes
@both_forms
@pytest.mark.parametrize("stacking", STACKINGS)
@fan_outs
def test_stackings(dtype: torch.dtype, rms: bool, stacking: str, fan_out: bool) -> None:
    """With one row a sample, and with several; of one dimension that is normalised, and of two."""
    for tokens, shape in (((), (5,)), ((), (40,)), ((7,), (3,)), ((2, 3), (2, 19)), ((1,), (33,))):
        for gate, bias, residual in zip(GATES, (False, True), (True, False), strict=True):
            how = {"gate": gate, "bias": bias, "residual": residual, "rms": rms, "fan_out": fan_out}
            p = layer_problem(3, 5, tokens, shape, dtype=dtype, stacking=stacking, **how)
            assert_matches_definition(p, run(p))


@dtypes
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 127, 601])
def test_numbers_of_rows(dtype: torch.dtype, rows: int) -> None:
    """More than one block, and more than one chunk."""
    for T, D in ((1, 3), (3, 21), (2, 300)):
        p = layer_problem(T, rows, (), (D,), dtype=dtype, seed=rows)
        found = run(p)
        if rows == 0:
            assert found.y.shape == found.dx.shape == p.x.shape
            assert not found.dweight.any() and not found.dbias.any()
        else:
            assert_matches_definition(p, found)


@dtypes
@fan_outs
@both_forms
@pytest.mark.parametrize("instruction_set", [""], indirect=True)  # all of them, against a definition that takes long
def test_large_outputs(dtype: torch.dtype, fan_out: bool, rms: bool, instruction_set: str, streamed: int) -> None:
    """Rows of whole cache lines are written by streaming stores, and others are not."""
    for D in (192, 200 + 1) if dtype == torch.float32 else (192,):
        rows = streamed // (3 * D * dtype.itemsize) + 1
        form = {"dtype": dtype, "stacking": "task_axis", "fan_out": fan_out, "residual": not rms, "rms": rms}
        p = layer_problem(3, rows, (), (D,), **form)  # type: ignore[arg-type]
        expected = definition(p)
        for which in instruction_sets():
            if which == "avx512_bf16" and dtype != torch.bfloat16:  # which has the kernels of the next one
                continue
            cpu.set_instruction_set(which)
            found = run(p)
            assert found.y.nbytes >= streamed
            assert_matches_definition(p, found, expected)
            for result in found:
                result.fill_(float("nan"))  # the next ones lie there


@pytest.mark.parametrize("D", [5, 384, 16384])
@pytest.mark.parametrize(("mean", "bound"), [(1.0, 5e-6), (1e3, 2e-4)])
def test_rows_far_from_zero(D: int, mean: float, bound: float) -> None:
    p = layer_problem(2, 9, (3,), (D,), mean=mean)
    found, wanted = run(p), definition(p)
    assert_within(found.y, wanted.y, Tolerance(bound, 0))


@dtypes
def test_rows_that_begin_far_from_their_mean(dtype: torch.dtype) -> None:
    """Sums are taken around the mean of the first few values, which says little of these rows."""
    p = layer_problem(2, 3, (3,), (16384,), dtype=dtype)
    far = 100 * torch.linspace(-1, 1, 9)[:, None]
    x = (p.x.double().reshape(2, 9, -1) + far).index_fill(-1, torch.arange(16), 0.0).reshape_as(p.x).to(dtype)
    p = p._replace(x=x)
    assert_relative(run(p).rstd, definition(p).rstd, STATISTICS[dtype])


def test_extreme_values_keep_to_their_row() -> None:
    """Infinity and NaN make a row NaN and no other; a constant row gives the bias."""
    for D in (4, 40):
        p = layer_problem(1, 1, (9,), (D,), residual=False)
        p.x[0, 2, 1], p.x[0, 5, 3] = float("inf"), float("nan")
        p.x[0, 7] = 3.25
        y = run(p).y
        assert y[0, [2, 5]].isnan().all()
        assert y[0, [0, 1, 3, 4, 6, 8]].isfinite().all()
        assert p.bias is not None
        assert torch.equal(y[0, 7], p.bias[0])


@dtypes
@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (False, False, False)]
)
@fan_outs
def test_what_is_not_needed_changes_nothing_else(
    dtype: torch.dtype, needs: tuple[bool, bool, bool], fan_out: bool
) -> None:
    for D in (6, 37):
        p = layer_problem(3, 50, (2,), (D,), dtype=dtype, fan_out=fan_out)
        everything = run(p)
        found = torch.ops.tsbn.layer_norm_backward(
            p.dy, None, p.x, p.weight, everything.mean, everything.rstd, *p.options[1:], *needs
        )
        for got, wanted, need in zip(found, everything[4:], needs, strict=True):
            assert_same_bits(got, wanted if need else wanted.new_empty(0))


def _concatenated(results: list[LayerResults], index: int) -> Tensor:
    return torch.cat([result[index] for result in results])


def test_results_of_a_task_do_not_depend_on_the_others() -> None:
    p = layer_problem(5, 90, (3,), (29,))
    assert p.bias is not None
    alone = [
        run(p._replace(x=x, dy=dy, weight=weight[None], bias=bias[None]))
        for x, dy, weight, bias in zip(p.x.chunk(5), p.dy.chunk(5), p.weight, p.bias, strict=True)
    ]
    for index, wanted in enumerate(run(p)):
        assert_same_bits(_concatenated(alone, index) if index != 1 else wanted, wanted)


def test_operands_must_fit() -> None:
    p = layer_problem()
    ops = torch.ops.tsbn
    with pytest.raises(RuntimeError, match="last dimensions of x are not those of weight"):
        ops.layer_norm(p.x[..., :-1], p.weight, None, None, *p.options)
    with pytest.raises(RuntimeError, match="first dimension of x does not hold 3 tasks"):
        ops.layer_norm(p.x[:-1], p.weight, None, None, *p.options)
    with pytest.raises(RuntimeError, match="residual has the wrong dtype or number of elements"):
        ops.layer_norm(p.x, p.weight, None, p.x.double(), *p.options)
    with pytest.raises(RuntimeError, match="unknown stacking 'rows'"):
        ops.layer_norm(p.x, p.weight, None, None, 1e-5, "sigmoid", "rows")
    with pytest.raises(RuntimeError, match="unknown gate 'tanh'"):
        ops.layer_norm(p.x, p.weight, None, None, 1e-5, "tanh", "task_major")
    found = run(p)
    with pytest.raises(RuntimeError, match="dy has the wrong dtype or number of elements"):
        ops.layer_norm_backward(p.dy[1:], None, p.x, p.weight, found.mean, found.rstd, *p.options[1:])
