"""Any input that the package accepts gives the definition's result; any other gives a documented error."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.problems import DTYPES, GATES, STACKINGS
from support.strategies import Call, assert_equals_the_definition, calls

from tsbn_kernels import use_backend
from tsbn_kernels.functional import task_batch_norm


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
