"""The layers of layer normalisation: equal to a loop of plain ones, and what they take and refuse."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from support.layers import assert_same, train
from support.problems import STACKINGS, stack, unstack
from torch import Tensor, nn

from tsbn_kernels import FusedTSigmaLN, FusedTSigmaLN2d, FusedTSigmaRMSNorm
from tsbn_kernels.layers.layer_norm import LayerNorm2d

T, N, C = 3, 2, 5
KINDS: list[tuple[Any, Any, tuple[int, ...]]] = [  # the layer, its plain one, and the size of a sample
    (FusedTSigmaLN, nn.LayerNorm, (4, C)),
    (FusedTSigmaRMSNorm, nn.RMSNorm, (4, C)),
    (FusedTSigmaLN2d, LayerNorm2d, (C, 4, 3)),
]
kinds = pytest.mark.parametrize(("fused", "plain", "sample"), KINDS)
stackings = pytest.mark.parametrize("stacking", STACKINGS)


def loop(layer: Any, streams: Tensor) -> Tensor:
    """The streams ``[T, N, *]`` through T plain layers."""
    return torch.stack([layer.task(t)(stream) for t, stream in enumerate(streams)])


def upstream(like: Tensor) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype)


@kinds
@stackings
@pytest.mark.parametrize("gate", ["sigmoid", "identity"])
@pytest.mark.parametrize("fan_out", [False, True])
def test_equals_a_loop_of_plain_layers(
    fan_out: bool, gate: str, stacking: str, fused: Any, plain: Any, sample: tuple[int, ...]
) -> None:
    bias = {} if fused is FusedTSigmaRMSNorm else {"bias": True}
    layer = train(fused(T, C, gate=gate, stacking=stacking, fan_out=fan_out, dtype=torch.float64, **bias))
    assert type(layer.task(1)) is plain
    shared = torch.randn(N, *sample, dtype=torch.float64)
    streams = shared.expand(T, *shared.shape) if fan_out else torch.randn(T, N, *sample, dtype=torch.float64)
    x = shared if fan_out else stack(streams, stacking)
    wanted = loop(layer, streams)
    torch.testing.assert_close(unstack(layer(x), T, stacking), wanted)
    torch.testing.assert_close(torch.stack(layer.streams(x)), wanted)
    residual = torch.randn_like(x)
    y, s = layer.add(x, residual)
    assert torch.equal(s, x + residual)
    torch.testing.assert_close(y, layer(s))


@kinds
@pytest.mark.parametrize("tasks", [[2], [2, 0], torch.tensor([1, 2])])
@pytest.mark.parametrize("fan_out", [False, True])
def test_some_of_the_tasks(fan_out: bool, tasks: Any, fused: Any, plain: Any, sample: tuple[int, ...]) -> None:
    layer = train(fused(T, C, dtype=torch.float64))
    streams = torch.randn(1 if fan_out else len(tasks), N, *sample, dtype=torch.float64)
    x = streams.flatten(0, 1).requires_grad_()
    y = layer(x, tasks=tasks, fan_out=fan_out)
    parts = streams.expand(len(tasks), *streams.shape[1:])
    wanted = torch.cat([layer.task(int(t))(part) for t, part in zip(tasks, parts, strict=True)])
    torch.testing.assert_close(y, wanted)
    for one, other in zip(layer.streams(x, tasks=tasks, fan_out=fan_out), wanted.chunk(len(tasks)), strict=True):
        torch.testing.assert_close(one, other)
    s = layer.add(x, x, tasks=tasks, fan_out=fan_out)
    torch.testing.assert_close(s[0], layer(2 * x, tasks=tasks, fan_out=fan_out))
    y.backward(upstream(y))
    absent = [t for t in range(T) if t not in [int(task) for task in tasks]]
    assert not layer.weight.grad[absent].any()
    assert layer.weight.grad[[int(task) for task in tasks]].all()


@kinds
def test_training_and_evaluation_do_not_differ(fused: Any, plain: Any, sample: tuple[int, ...]) -> None:
    layer, x = train(fused(T, C)), torch.randn(T * N, *sample)
    y = layer.train()(x)
    assert torch.equal(layer.eval()(x), y)
    assert not layer.task(0).training
    assert layer.train().task(0).training
    assert not list(layer.buffers())


def test_streams_cost_the_tasks_that_a_gradient_comes_from() -> None:
    layer, x = train(FusedTSigmaLN(T, C, fan_out=True)), torch.randn(N, 4, C, requires_grad=True)
    first, _, last = layer.streams(x)
    torch.autograd.backward([first, last], [upstream(first), upstream(last)])
    assert layer.weight.grad.any(1).tolist() == [True, False, True]
    first.mul_(2)  # a head may write


@pytest.mark.parametrize("kind", ["contiguous", "channels_last"])
def test_channels_first_keeps_the_memory_format_that_it_computes_in(kind: str) -> None:
    layer, x = train(FusedTSigmaLN2d(T, C)), torch.randn(T * N, C, 4, 3)
    x = x.to(memory_format=torch.channels_last) if kind == "channels_last" else x
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, torch.cat([layer.task(t)(part) for t, part in enumerate(x.chunk(T))]))


# ---- parameters and states ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["sigmoid", "identity"])
@pytest.mark.parametrize("bias", [True, False, "frozen"])
def test_starts_as_it_says(bias: Any, gate: Any) -> None:
    layer = FusedTSigmaLN(T, (4, C), gate=gate, bias=bias)
    assert layer.weight.shape == (T, 4, C)
    assert (layer.gates == (0.5 if gate == "sigmoid" else 1.0)).all()
    assert [name for name, _ in layer.named_parameters()] == ["weight"] + ["bias"] * (bias is True)
    assert [name for name, _ in layer.named_buffers()] == ["bias"] * (bias == "frozen")
    assert list(layer.state_dict()) == ["weight"] + ["bias"] * bool(bias)
    train(layer)
    layer.reset_parameters()
    assert (layer.gates == (0.5 if gate == "sigmoid" else 1.0)).all()


@kinds
@pytest.mark.parametrize("gate", ["sigmoid", "identity"])
def test_the_state_of_a_plain_layer_loads(gate: str, fused: Any, plain: Any, sample: tuple[int, ...]) -> None:
    bias = {} if fused is FusedTSigmaRMSNorm else {"bias": True}
    source, layer = plain(C), fused(T, C, gate=gate, **bias)
    nn.init.uniform_(source.weight, 0.1, 0.9)
    layer.load_state_dict(source.state_dict())
    x = torch.randn(N, *sample)
    for y in layer(x, fan_out=True).chunk(T):
        torch.testing.assert_close(y, source(x), rtol=1e-4, atol=1e-5)
    assert_same(layer.task(2).state_dict().values(), source.state_dict().values())


def test_a_plain_state_is_told_by_its_dimensions() -> None:
    layer = FusedTSigmaLN(T, (4, C), bias=True)
    plain = nn.LayerNorm((4, C))
    with pytest.warns(UserWarning, match=r"lie outside of \(0, 1\)"):
        layer.load_state_dict({name: value + 2 for name, value in plain.state_dict().items()})
    with pytest.raises(ValueError, match="weight of the state is that of a plain layer, and bias is not"):
        layer.load_state_dict({**layer.state_dict(), "weight": plain.weight})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"bias\""):
        FusedTSigmaLN(T, (4, C)).load_state_dict(plain.state_dict())


def test_what_it_prints() -> None:
    assert repr(FusedTSigmaLN(T, C, bias="frozen", fan_out=True)) == (
        "FusedTSigmaLN(3, (5,), eps=1e-05, gate='sigmoid', bias='frozen', stacking='task_major', fan_out=True)"
    )
    assert repr(FusedTSigmaRMSNorm(T, [4, C], gate="identity", stacking="task_axis")) == (
        "FusedTSigmaRMSNorm(3, (4, 5), eps=None, gate='identity', stacking='task_axis')"
    )


# ---- names and errors --------------------------------------------------------------------------------------------


@kinds
def test_every_public_name_of_the_plain_layer(fused: Any, plain: Any, sample: tuple[int, ...]) -> None:
    layer, one = fused(T, C), plain(C)
    missing = {name for name in dir(one) if not name.startswith("_") and not hasattr(layer, name)}
    assert missing == {"elementwise_affine"}  # gates are what makes a layer task-specific
    for name in ("normalized_shape", "eps"):
        assert getattr(layer, name) == getattr(one, name)
    ours, theirs = (inspect.signature(kind).parameters for kind in (fused, plain))
    assert list(ours)[:3] == ["num_tasks", *list(theirs)[:2]]
    assert ours["eps"].default == theirs["eps"].default


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: FusedTSigmaLN(0, C), ValueError, "num_tasks must be 1 or more, got 0"),
        (lambda: FusedTSigmaLN(T, 0), ValueError, "normalized_shape must be 1 or more, got 0"),
        (lambda: FusedTSigmaLN(T, ()), ValueError, "normalized_shape must have one dimension or more"),
        (lambda: FusedTSigmaLN(T, 2.0), TypeError, "normalized_shape must be an integer, got 2.0"),  # type: ignore[arg-type]
        (lambda: FusedTSigmaLN(T, C, -1.0), ValueError, "eps must be a finite number of 0.0 or more"),
        (lambda: FusedTSigmaLN(T, C, None), TypeError, "eps must be a number, got None"),
        (lambda: FusedTSigmaLN(T, C, gate="relu"), ValueError, "gate must be one of sigmoid, identity"),  # type: ignore[arg-type]
        (lambda: FusedTSigmaLN(T, C, bias="yes"), ValueError, "bias must be True, False or 'frozen', got 'yes'"),  # type: ignore[arg-type]
        (lambda: FusedTSigmaLN(T, C, stacking="no"), ValueError, "stacking must be one of task_major"),  # type: ignore[arg-type]
        (lambda: FusedTSigmaLN(T, C, fan_out=1), TypeError, "fan_out must be True or False, got 1"),  # type: ignore[arg-type]
        (lambda: FusedTSigmaLN(T, C, dtype=torch.int32), TypeError, "dtype must be float32"),
        (lambda: FusedTSigmaRMSNorm(T, C, bias=True), TypeError, "bias"),  # type: ignore[call-arg]
        (lambda: FusedTSigmaLN(T, C)([1.0]), TypeError, "input must be a tensor, got list"),
        (lambda: FusedTSigmaLN(T, C).streams([1.0]), TypeError, "input must be a tensor, got list"),  # type: ignore[arg-type]
        (lambda: FusedTSigmaLN(T, C).add(torch.ones(T, C), 1), TypeError, "residual must be a tensor, got int"),  # type: ignore[arg-type]
        (lambda: FusedTSigmaLN(T, C)(torch.ones(6, 4)), ValueError, r"Given normalized_shape=\[5\], expected input"),
        (lambda: FusedTSigmaLN(T, C)(torch.ones(4, C)), ValueError, "4, is not a multiple of num_tasks=3"),
        (lambda: FusedTSigmaLN(T, C)(torch.ones(6, C), tasks=[3]), ValueError, "different indices below num_tasks=3"),
        (lambda: FusedTSigmaLN(T, C)(torch.ones(6, C), tasks="ab"), TypeError, "tasks must be a sequence of integers"),  # type: ignore[arg-type]
        (lambda: FusedTSigmaLN(T, C).task(3), IndexError, "task 3 is out of range for num_tasks=3"),
        (lambda: FusedTSigmaLN2d(T, C)(torch.ones(6, 4, C)), ValueError, r"expected 4D input, got 3D input of shape"),
        (
            lambda: FusedTSigmaLN2d(T, C).add(torch.ones(6, C, 4, 4), torch.ones(6, C)),
            ValueError,
            r"expected 4D residual, got 2D residual of shape \[6, 5\]",
        ),
        (
            lambda: FusedTSigmaLN2d(T, C, stacking="task_axis")(torch.ones(3, C, 4, 4)),
            ValueError,
            "FusedTSigmaLN2d expected 5D input, got 4D",
        ),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
