"""The CUDA C++ kernels of layer normalisation in the PTX machine, against the definition in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda_machine import H100
from cuda_source import Broken
from rows_machine import ALL, Launched, Machine
from support.layer_problems import LayerProblem, assert_matches_definition, definition, layer_problem
from support.problems import DTYPES, STACKINGS
from support.tolerances import FORWARD, Tolerance, assert_same_bits, assert_within
from torch import Tensor

from tools.ptxvm import Violation, find_nvcc
from tsbn_kernels.backends.plan import DEVICES
from tsbn_kernels.definition.options import LayerNeeds

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "added": {"residual": True},
    "rms": {"rms": True, "residual": True},
    "fan-out": {"fan_out": True},
    "fan-out of a sum": {"fan_out": True, "residual": True, "bias": False},
    "identity": {"gate": "identity", "bias": False},
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def check(p: LayerProblem, machine: Machine | None = None) -> tuple[Launched, Launched]:
    """Both passes: results by the definition, bytes by the plan."""
    found, there, back = (machine or Machine()).both(p, LayerNeeds(True, True, p.bias is not None))
    assert_matches_definition(p, found)
    for done in (there, back):
        assert done.counted == done.planned
    return there, back


@dtypes
@forms
@pytest.mark.parametrize("size", [1, 40, 197, 384], ids=str)
def test_sizes(size: int, form: dict[str, Any], dtype: torch.dtype) -> None:
    """A few threads a row, whole warps, several warps; slots of 16 bytes and single values."""
    check(layer_problem(2, 3, (7,), (size,), dtype=dtype, **form))


@dtypes
@pytest.mark.parametrize("size", [1100, 2056, 5000, 8192], ids=str)
def test_rows_of_several_warps(size: int, dtype: torch.dtype) -> None:
    there, back = check(layer_problem(2, 1, (3,), (size,), dtype=dtype, residual=True))
    assert len(there.reports) == 1 and all(plan.lanes > 32 or size < 2000 for plan in (*there.plans, *back.plans))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [12288, 16383, 16384], ids=str)
def test_the_longest_rows(size: int, dtype: torch.dtype) -> None:
    """Each activation is read once: all sums of a row are kept on chip."""
    there, back = check(layer_problem(1, 1, (3,), (size,), dtype=dtype))
    assert (len(there.plans), len(back.plans)) == (1, 1)


def test_rows_for_which_a_device_has_less_room() -> None:
    """On an A100 the gradients of parameters of 16,384 columns are summed by a launch of their own, in pieces."""
    _, back = check(layer_problem(2, 1, (5,), (16384,), dtype=torch.bfloat16), Machine(80, device=DEVICES["A100"]))
    dx, parameters = back.plans
    assert (dx.pieces, parameters.pieces) == (1, 16)


@dtypes
@pytest.mark.parametrize("stacking", STACKINGS)
@pytest.mark.parametrize("fan_out", [False, True])
def test_stackings(fan_out: bool, stacking: str, dtype: torch.dtype) -> None:
    for shape, tokens in (((24,), (2, 3)), ((3, 5), ())):
        check(layer_problem(3, 4, tokens, shape, dtype=dtype, stacking=stacking, fan_out=fan_out))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_tasks_than_there_is_room_for(dtype: torch.dtype) -> None:
    """Gates are staged a few tasks at a time, and the parameters' gradients get a launch of their own."""
    p = layer_problem(40, 1, (5,), (96,), dtype=dtype, fan_out=True, residual=True)
    there, back = check(p, Machine(device=replace(H100, block_shared_memory=8000)))
    assert there.plans[0].staged < 40 and back.plans[0].staged < 40 and len(back.plans) == 2
    there, back = check(layer_problem(7, 2, (9,), (96,), dtype=dtype, fan_out=True, residual=True))
    assert there.plans[0].staged == 7 and len(back.plans) == 1


@pytest.mark.parametrize("schedule", ["forward", "reversed", 1, 2])
@forms
def test_same_bits_in_every_order(form: dict[str, Any], schedule: Any) -> None:
    for size in (24, 1288):
        p = layer_problem(2, 3, (40,) if size < 100 else (6,), (size,), dtype=torch.bfloat16, **form)
        first, _, _ = Machine().both(p)
        for one, other in zip(first, Machine(schedule=schedule).both(p)[0], strict=True):
            assert_same_bits(one, other)


@dtypes
@pytest.mark.parametrize("target", [80, 100])
def test_targets(target: int, dtype: torch.dtype) -> None:
    for form in FORMS.values():
        check(layer_problem(2, 3, (20,), (72,), dtype=dtype, **form), Machine(target))


@forms
@pytest.mark.parametrize("needs", [n for n in itertools.product((True, False), repeat=3) if any(n)], ids=str)
def test_needed_gradients_only(needs: tuple[bool, bool, bool], form: dict[str, Any]) -> None:
    """What is not asked for changes no bit of the rest, beyond the order in which a fan-out's sums are added."""
    p = layer_problem(2, 3, (5,), (40,), **form)
    expected = definition(p)
    s = p.x if p.residual is None else p.x + p.residual
    mean = None if p.rms else expected.mean.float()
    found, done = Machine().backward(p, s, mean, expected.rstd.float(), LayerNeeds(*needs))
    whole, _ = Machine().backward(p, s, mean, expected.rstd.float(), ALL)
    assert done.counted == done.planned
    for (name, actual), needed in zip(found.items(), needs, strict=True):
        assert (actual is not None) == needed
        if actual is not None and whole[name] is not None:
            assert_within(actual, whole[name], Tolerance(2e-6, 1), 4.0)


def _shifted(x: Tensor) -> Tensor:
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


@dtypes
def test_addresses(dtype: torch.dtype) -> None:
    """Operands that begin off 16 bytes are read value by value."""
    p = layer_problem(2, 3, (4,), (64,), dtype=dtype)
    for one, forward in ((p._replace(x=_shifted(p.x)), "scalar"), (p._replace(dy=_shifted(p.dy)), "rows")):
        there, back = check(one)
        assert (there.plans[0].access, back.plans[0].access) == (forward, "scalar")


@pytest.mark.parametrize("parameters", DTYPES, ids=str)
def test_parameters_of_any_dtype(parameters: torch.dtype) -> None:
    for size in (40, 384):
        p = layer_problem(2, 3, (9,), (size,), dtype=torch.bfloat16, parameter_dtype=parameters)
        found, there, back = Machine().both(p)
        expected = definition(p)
        assert found.dweight.dtype == found.dbias.dtype == parameters
        assert_within(found.y, expected.y, FORWARD[torch.bfloat16], float(expected.y.abs().max()))
        for actual, wanted in ((found.dweight, expected.dweight), (found.dbias, expected.dbias)):
            assert_within(actual, wanted, Tolerance(1e-5, 1), 8.0)
        assert (there.counted, back.counted) == (there.planned, back.planned)


@dtypes
@pytest.mark.parametrize("ratio", [1.0, 30.0, 1e3])
def test_mean_far_from_zero(ratio: float, dtype: torch.dtype) -> None:
    """The package's promise: y in float32 within 5e-6 at a mean of one standard deviation, and 2e-4 at a thousand."""
    p = layer_problem(1, 2, (3,), (768,), dtype=dtype, mean=ratio, bias=False)
    found, _ = Machine().forward(p)
    expected = definition(p).y
    tolerance = Tolerance(5e-6 if ratio <= 1 else 2e-4, 0) if dtype == torch.float32 else FORWARD[dtype]
    assert found["y"] is not None
    scale = max(1.0, float(expected.abs().max()) / 4) * (max(1.0, ratio) if dtype == torch.float64 else 1.0)
    assert_within(found["y"], expected, tolerance, scale)


@pytest.mark.parametrize("value", [0.0, -3e4, 0.1])
def test_constant_rows(value: float) -> None:
    p = layer_problem(2, 2, (3,), (100,))
    p = p._replace(x=torch.full_like(p.x, value))
    found, _ = Machine().forward(p)
    assert p.bias is not None and found["mean"] is not None and found["y"] is not None
    assert (found["mean"] == p.x[0, 0, 0]).all()
    assert torch.equal(found["y"], p.bias.repeat_interleave(2, 0)[:, None].expand_as(p.x))


def test_non_finite_values_stay_in_their_row() -> None:
    p = layer_problem(2, 3, (5,), (40,))
    clean, _ = Machine().forward(p)
    for value in (float("nan"), float("inf")):
        p.x[4, 2, 8] = value
        found, _ = Machine().forward(p)
        hit = torch.zeros(p.x.shape[:2], dtype=torch.bool)
        hit[4, 2] = True
        assert found["y"] is not None and clean["y"] is not None and found["rstd"] is not None
        assert found["y"][hit].isnan().all() and torch.equal(found["y"][~hit], clean["y"][~hit])
        assert found["rstd"].isfinite()[~hit.flatten()].all()


def test_accesses_are_whole_sectors() -> None:
    """Warps read and write 16 bytes a thread, no sector twice, and shared memory without bank conflicts."""
    p = layer_problem(2, 16, (16,), (384,), dtype=torch.bfloat16)
    for done in check(p):
        rows = [row for row in done.reports[0].rows if row.bytes and row.bytes == 16 * row.threads]
        outside = [row for row in rows if row.space == "global" and row.bytes >= p.x.nbytes // 4]
        assert sum(row.bytes for row in outside) >= 2 * p.x.nbytes
        assert sum(row.sectors for row in outside) * 32 == sum(row.bytes for row in outside)
        assert sum(row.conflicts for row in rows if row.space == "shared") == 0


ROW_KERNELS = "layer_norm_forward_f16_rows", "layer_norm_backward_f16_rows", "layer_norm_parameters_f32"
MUTANTS = {
    "no barrier between the warps' sums and their use": (
        "area[warp * 2 + i] = sums[i];\n    }\n    __syncthreads();",
        "area[warp * 2 + i] = sums[i];\n    }\n",
        *ROW_KERNELS[:2],
    ),
    "one place for the sums of every turn": ("turn ^= 1;", "", *ROW_KERNELS[:2]),
    "no barrier between the groups' sums": ("half /= 2) {\n      __syncthreads();", "half /= 2) {", ROW_KERNELS[1]),
    "a slot too many": ("lane + lanes() - 1) >> n.log_lanes)", "lane + lanes()) >> n.log_lanes)", *ROW_KERNELS[:2]),
    "padding counts": ("v[u][e] = u < mine ? v[u][e] - mean : A(0);", "v[u][e] = v[u][e] - mean;", ROW_KERNELS[0]),
    "the last part is left out": ("k < kParts; ++k) sum +=", "k < kParts - 1; ++k) sum +=", ROW_KERNELS[2]),
}
BROKEN = Broken(MUTANTS, *ROW_KERNELS, file="layer_norm.cu")


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants(name: str) -> None:
    """The proof can fail: a kernel with one line broken is caught by the machine, or by the numbers."""

    def run() -> None:
        for schedule in ("forward", "reversed", 1):
            for tokens, size in ((40, 40), (3, 2056)):
                p = layer_problem(2, 2, (tokens,), (size,), dtype=torch.float16, residual=True, mean=300.0)
                check(p, Machine(code=BROKEN[name], schedule=schedule))

    with pytest.raises((Violation, AssertionError)):
        run()
