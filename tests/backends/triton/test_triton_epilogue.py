"""Residual and activation in the Triton kernels: every plan in the interpreter, the compiled code and its traffic."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from itertools import cycle, product

import pytest
import torch
from support.problems import FORMATS, STACKINGS, defined, in_double, problem
from support.tolerances import BACKWARD, assert_within

pytest.importorskip("triton")
from support import compiled
from support.fused import Epilogue, assert_equals_reference, fused
from support.interpreter import device, interpreted, kernels, passes
from test_triton_compiled import SIZES, assert_traffic, toy

from tsbn_kernels.backends.plan import DEVICES, Work
from tsbn_kernels.backends.plan.triton import is_even, plan
from tsbn_kernels.backends.triton import ops as triton_ops
from tsbn_kernels.backends.triton.kernels import activations
from tsbn_kernels.definition import activations as reference_activations
from tsbn_kernels.definition.activations import ACTIVATIONS, activation_slope
from tsbn_kernels.operator.ops import flat

ops = flat(triton_ops)

EPILOGUES: tuple[Epilogue, ...] = (*product(ACTIVATIONS, (False, True)), ("none", True))

# ---- every plan in the interpreter -------------------------------------------------------------------------------

SMALL = [(3, 4, 2, (8,)), (2, 3, 3, (5,)), (2, 3, 2, (193,)), (2, 8, 2, (80,))]


def test_every_plan() -> None:
    reached: set[Hashable] = set()
    rounds = zip(cycle(EPILOGUES), cycle(STACKINGS), cycle((torch.float32, torch.bfloat16)), strict=False)
    for size, memory_format, training in product(SMALL, FORMATS, (True, False)):
        for multiprocessors in (1, 8):
            epilogue, stacking, dtype = next(rounds)
            options = {"stacking": stacking, "memory_format": memory_format, "dtype": dtype}
            call = fused(*size, epilogue=epilogue, training=training, bias=epilogue[0] != "silu", **options)
            with interpreted(device(threads=16, multiprocessors=multiprocessors)):
                assert_equals_reference(call)
                if not training:
                    assert_equals_reference(replace(call, sums=False))
                for one in (kept.plan for kept in passes()):
                    kind = one.variant, one.work.family, one.work.direction
                    reached.update({kind, (*kind, is_even(one.work, one.tile))})
    for family, direction, even in product(("rows", "columns"), ("forward", "backward"), (True, False)):
        for variant in ("resident", "streaming", "split", "elementwise"):
            assert (variant, family, direction, even) in reached


@pytest.mark.parametrize("memory_format", FORMATS)
def test_float64_and_given_strides(memory_format: str) -> None:
    """What x, dy and residual are cut from holds NaN elsewhere."""
    options = {"dtype": torch.float64, "memory_format": memory_format}
    call = fused(2, 5, 3, (53,), epilogue=("gelu", True), **options)
    x, dy, residual = (
        torch.stack((t, torch.full_like(t, torch.nan)), 1).flatten(0, 1)[::2]
        for t in (call.p.x, call.p.dy, call.residual)
    )
    with interpreted(device(threads=16, multiprocessors=8)):
        assert_equals_reference(replace(call, p=call.p._replace(x=x, dy=dy), residual=residual))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_an_output_in_the_place_of_the_input(memory_format: str, training: bool) -> None:
    """``u = leaky_relu(v)`` instead of v gives the gradients of v times the activation's."""
    for size, parameters in (((2, 3, 2, (107,)), True), ((2, 4, 3, (8,)), False)):
        p = problem(*size, memory_format=memory_format)
        v = torch.where(p.x > 0, p.x, p.x * 0.25)
        mean, var = p.weight / 2, p.weight.abs() + 0.5
        needs = training, True, parameters, parameters
        with interpreted(device(threads=16, multiprocessors=8)):
            end = p.bias, None, "inverse_leaky_relu", 0.25
            got = ops.backward(p.dy, v, p.weight, mean, var, *p.options, *needs, *end)
        q = in_double(p._replace(x=v))
        end = q.bias, None, "inverse_leaky_relu", 0.25
        wanted = defined.backward(q.dy, q.x, q.weight, mean.double(), var.double(), *q.options, *needs, *end)
        for actual, expected in zip(got, wanted, strict=True):
            assert actual.shape == expected.shape
            if expected.numel():
                assert_within(actual, expected, BACKWARD[torch.float32], scale=float(expected.abs().max()) + 1)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_lies_outside_of_a_tile_adds_nothing(name: str, memory_format: str) -> None:
    """There z may be infinite."""
    p = problem(2, 3, 3, (5,), memory_format=memory_format, gate="identity")
    p = p._replace(x=torch.full_like(p.x, 1e30))
    mean, var = torch.full_like(p.weight, 1e30), torch.full_like(p.weight, 1e-20)
    options = p.num_tasks, 0.0, "identity", p.stacking, False, True, True, True, p.bias, None, name, 0.25
    with interpreted(device(threads=16, multiprocessors=8)):
        _, dweight, dbias, _ = ops.backward(p.dy, p.x, p.weight, mean, var, *options)
    z = p.bias.double().repeat_interleave(3, 0)[:, :, None].expand(p.x.shape)
    gradient = (p.dy * activation_slope(z, name, 0.25)).unflatten(0, (2, 3)).sum((1, 3))
    assert_within(dbias, gradient, BACKWARD[torch.float32], scale=4.0)
    assert (dweight == 0).all()


def test_an_unknown_activation() -> None:
    for name in ("swish", ""):
        with pytest.raises(ValueError, match=f"unknown activation '{name}', expected one of none, relu"):
            fused(2, 3, 2, (8,), epilogue=(name, True)).run(ops)
    assert list(activations.TABLE) == list(reference_activations.EPILOGUES)


def test_the_dresidual_alone() -> None:
    p = problem(2, 5, 3, (53,))
    mean, var = p.weight / 2, p.weight.abs() + 0.5
    for training in (True, False):
        options = *p.options, training, False, False, False, p.bias, p.dy / 2, "silu", 0.0, False, True
        with interpreted(device(threads=16, multiprocessors=8)):
            *others, got = ops.backward(p.dy, p.x, p.weight, mean, var, *options)
            assert [kept.plan.variant for kept in passes()] == ["elementwise"]
        q = in_double(p)
        options = *p.options, False, False, False, False, q.bias, q.dy / 2, "silu", 0.0, False, True
        *_, wanted = defined.backward(q.dy, q.x, q.weight, mean.double(), var.double(), *options)
        assert_within(got, wanted, BACKWARD[torch.float32])
        assert [other.numel() for other in others] == [0, 0, 0]


# ---- as compiled -------------------------------------------------------------------------------------------------

COMPILED = [
    ("resident", "rows", True, torch.bfloat16, "sm_90", ("relu", True)),
    ("resident", "rows", False, torch.float32, "sm_80", ("gelu", False)),
    ("resident", "columns", False, torch.float32, "sm_100", ("silu", True)),
    ("streaming", "rows", True, torch.float32, "sm_100", ("gelu", True)),
    ("streaming", "columns", True, torch.bfloat16, "sm_90", ("relu", True)),
    ("split", "rows", False, torch.bfloat16, "sm_80", ("silu", False)),
    ("split", "columns", True, torch.bfloat16, "sm_90", ("leaky_relu", True)),
    ("split", "columns", False, torch.float64, "sm_90", ("gelu", False)),
    ("elementwise", "rows", True, torch.bfloat16, "sm_100", ("relu", True)),
    ("elementwise", "columns", False, torch.float32, "sm_90", ("silu", True)),
]


@pytest.mark.parametrize(("variant", "family", "even", "dtype", "target", "epilogue"), COMPILED)
def test_compiled(variant: str, family: str, even: bool, dtype: torch.dtype, target: str, epilogue: Epilogue) -> None:
    memory_format = "contiguous" if family == "rows" else "channels_last"
    sums = variant != "elementwise"
    # Where no gradient of the bias is asked for, a plan does not know of it.
    options = {"dtype": dtype, "memory_format": memory_format, "stacking": "sample_major", "bias": sums}
    with compiled.machine(toy(variant, target), "reversed") as done:
        assert_equals_reference(
            fused(*SIZES[variant, family, even], epilogue=epilogue, training=sums, sums=sums, **options)
        )
    assert [(one.variant, one.work.family) for one in done.plans] == [(variant, family)] * 2
    assert_traffic(done, aligned=even)


# ---- broken on purpose, and plans --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_wrong_derivative_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = fused(2, 3, 2, (11,), epilogue=(name, True))
    with interpreted(device(threads=16)):
        assert_equals_reference(call)
        monkeypatch.setattr(kernels().backward, "through", lambda gradient, *others: gradient)
        with pytest.raises(AssertionError):
            assert_equals_reference(call)


def test_bytes() -> None:
    """CelebA's first layer is streamed: x twice forward, the residual once.

    Backward a ReLU's dresidual serves in the second pass in the place of dy and residual, a GELU's is rounded.
    """
    options = {"activation": "relu", "residual": True}
    forward = plan(Work(40, 256, 64, 4096, 2, **options), DEVICES["H100"])  # type: ignore[arg-type]
    details = {"direction": "backward", "needs_dresidual": True, **options}
    backward = plan(Work(40, 256, 64, 4096, 2, **details), DEVICES["H100"])  # type: ignore[arg-type]
    size = forward.work.activation_bytes
    assert (forward.activation_bytes_read, forward.activation_bytes_written) == (3 * size, size)
    assert (backward.activation_bytes_read, backward.activation_bytes_written) == (5 * size, 2 * size)
    rounded = plan(replace(backward.work, activation="gelu"), DEVICES["H100"])
    assert (rounded.activation_bytes_read, rounded.activation_bytes_written) == (6 * size, 2 * size)
    plain = plan(replace(backward.work, activation="none", needs_dresidual=False), DEVICES["H100"])
    assert (plain.activation_bytes_read, plain.activation_bytes_written) == (4 * size, size)
