"""Any input that the package accepts gives the definition's result; any other gives a documented error."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.layer_problems import LayerProblem, definition
from support.problems import DTYPES, GATES, STACKINGS
from support.strategies import Call, assert_equals_the_definition, calls, few, sizes, strided
from support.tolerances import BACKWARD, FORWARD, Tolerance, assert_within

from tsbn_kernels import use_backend
from tsbn_kernels.functional import normalize_rows, task_batch_norm, task_layer_norm


@settings(max_examples=150)
@given(calls())
def test_equals_the_definition(call: Call) -> None:
    assert_equals_the_definition(call)


@settings(max_examples=100)
@given(
    shape=st.lists(st.integers(0, 4), min_size=0, max_size=6),
    parameters=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    num_tasks=st.integers(-1, 4),
    stacking=st.sampled_from([*STACKINGS, "other"]),
    gate=st.sampled_from([*GATES, "other"]),
    dtype=st.sampled_from([*DTYPES, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]),
    training=st.booleans(),
)
def test_anything_else_is_an_error_that_says_so(
    shape: list[int],
    parameters: list[int],
    num_tasks: int,
    stacking: str,
    gate: str,
    dtype: torch.dtype,
    training: bool,
) -> None:
    """No crash, no PyTorch-internal message: ValueError or TypeError, or an output of the right shape."""
    x, weight = torch.zeros(shape).to(dtype), torch.zeros(parameters)
    options = {"num_tasks": num_tasks, "training": training, "stacking": stacking, "gate": gate}
    try:
        y = task_batch_norm(x, weight, None, weight.clone(), weight + 1, **options)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        refusal = str(error)
    else:
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        assert (y == 0).all()
        return
    assert any(word in refusal for word in ("got", "expected", "not a multiple"))


@settings(max_examples=60)
@given(calls())
def test_reference_backend_accepts_the_same(call: Call) -> None:
    """The same call on the reference backend has the same strides and nearly the same values."""
    options = {"num_tasks": call.num_tasks, "eps": call.eps, "gate": call.gate, "stacking": call.stacking}
    y = task_batch_norm(call.x, call.weight, call.bias, **options)  # type: ignore[arg-type]
    with use_backend("reference"):
        other = task_batch_norm(call.x, call.weight, call.bias, **options)  # type: ignore[arg-type]
    assert y.stride() == other.stride()
    torch.testing.assert_close(y, other, rtol=2e-2, atol=2e-2)


# ---- layer normalisation ---------------------------------------------------------------------------------------------


@st.composite
def layer_calls(draw: st.DrawFn) -> LayerProblem:
    """A call in any strides, whose rows are of any shape."""
    T, N = draw(few), draw(few)
    tokens = draw(st.lists(st.integers(1, 7), max_size=2))
    shape = draw(st.lists(sizes, min_size=1, max_size=2).filter(lambda s: torch.Size(s).numel() <= 300))
    stacking, fan_out = draw(st.sampled_from(STACKINGS)), draw(st.booleans())
    dtype, parameter_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    seed, rms = draw(st.integers(0, 99)), draw(st.booleans())
    stacked = [T, N, *tokens, *shape] if stacking == "task_axis" else [T * N, *tokens, *shape]
    of_input = [N, *tokens, *shape] if fan_out else stacked
    generator = torch.Generator().manual_seed(seed + 1)
    weight, bias = (torch.randn((T, *shape), generator=generator).to(parameter_dtype) for _ in range(2))
    x = draw(strided(of_input, dtype, seed, len(of_input) - 1))
    residual = draw(st.sampled_from([None, draw(strided(of_input, dtype, seed + 2, 1))]))
    return LayerProblem(
        x,
        weight,
        None if rms else draw(st.sampled_from([bias, None])),
        residual,
        draw(strided(stacked, dtype, seed + 3, 1)) / 8,
        None if residual is None else torch.randn(of_input, generator=generator).to(dtype),
        draw(st.sampled_from(GATES)),
        stacking,
        draw(st.sampled_from([1e-5, 1e-3])),
        rms,
        fan_out,
    )


@settings(max_examples=150)
@given(layer_calls())
def test_layer_normalisation_equals_the_definition(p: LayerProblem) -> None:
    exact, dtype = definition(p), p.x.dtype
    names = [name for name in ("x", "residual", "weight", "bias") if getattr(p, name) is not None]
    operands = [getattr(p, name).detach().clone(memory_format=torch.preserve_format) for name in names]
    operands = [operand.requires_grad_() for operand in operands]
    given_tensors = dict.fromkeys(("x", "weight", "bias", "residual")) | dict(zip(names, operands, strict=True))
    options = len(p.weight), p.eps, p.gate, p.stacking, p.rms, p.fan_out
    outputs = normalize_rows(tuple(given_tensors.values()), options)
    dys = [p.dy] if p.ds is None else [p.dy, p.ds]
    found = dict(zip(names, torch.autograd.grad(outputs, operands, dys), strict=True))
    assert outputs[0].shape == p.dy.shape
    assert [out.dtype for out in outputs] == [dtype] * len(outputs)
    # A row of few values may lie close together, far from zero: then (s - mean) * rstd has fewer digits than s.
    mean = exact.mean.abs().max() if exact.mean.numel() else torch.zeros(())
    condition = float((exact.rstd * (mean + 1)).max().clamp_min(1))
    assert_within(outputs[0], exact.y, FORWARD[dtype], max(1.0, float(exact.y.abs().max()) / 4) * condition)
    terms = max(1.0, float(exact.dx.abs().max()) / 4, float(p.dy.abs().max()) * len(p.weight)) * condition
    for name in {"x", "residual"} & set(names):
        assert_within(found[name], exact.dx, BACKWARD[dtype], terms)
    for name, wanted in (("weight", exact.dweight), ("bias", exact.dbias)):
        if name in names:
            units = Tolerance(BACKWARD[p.x.dtype].absolute, 1)
            assert_within(found[name], wanted, units, max(1.0, float(wanted.abs().max())) * condition)


@settings(max_examples=100)
@given(
    shape=st.lists(st.integers(0, 4), min_size=0, max_size=5),
    parameters=st.lists(st.integers(0, 4), min_size=0, max_size=3),
    num_tasks=st.integers(-1, 4),
    stacking=st.sampled_from([*STACKINGS, "other"]),
    dtype=st.sampled_from([*DTYPES, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]),
    fan_out=st.booleans(),
)
def test_any_other_layer_normalisation_is_an_error_that_says_so(
    shape: list[int], parameters: list[int], num_tasks: int, stacking: str, dtype: torch.dtype, fan_out: bool
) -> None:
    x, weight = torch.zeros(shape).to(dtype), torch.zeros(parameters)
    try:
        y = task_layer_norm(x, weight, num_tasks=num_tasks, stacking=stacking, fan_out=fan_out)
    except (ValueError, TypeError) as error:
        refusal = str(error)
    else:
        assert y.numel() == x.numel() * (num_tasks if fan_out else 1)
        assert (y == 0).all()
        return
    assert any(word in refusal for word in ("got", "expected", "not a multiple"))
