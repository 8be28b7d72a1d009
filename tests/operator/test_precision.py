"""Dtypes, autocast, scaled gradients and deterministic mode, against PyTorch's layers."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from support.graphs import WAYS, Way, tensors
from support.layers import LAYERS, SHAPE, WITH_BIAS, of_any_kind, trained
from support.problems import DTYPES
from support.tolerances import assert_same_bits
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from tsbn_kernels import FusedTSigmaBN2d

T, N, C = 2, 4, 5
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


def step(call: Any, x: Tensor, dy: Tensor, amp: torch.dtype | None) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    with nullcontext() if amp is None else torch.autocast("cpu", dtype=amp):
        y = call(leaf)
    y.backward(dy.to(y.dtype))
    assert leaf.grad is not None
    return y.detach(), leaf.grad


REFUSALS = "mixed dtype|expected scalar type|same dtype"


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "training"), [("BN", True), ("BN", False), ("LN", True), ("RMS", True)])
@pytest.mark.parametrize("parameter_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_combination_that_plain_layers_take(
    dtype: torch.dtype, parameter_dtype: torch.dtype, kind: str, training: bool, amp: torch.dtype | None
) -> None:
    """Dtypes of results are those of the plain layers; combinations that these refuse work, too."""
    bias = {"bias": True} if kind in WITH_BIAS else {}
    layer = LAYERS[kind](dtype=parameter_dtype, **bias).train(training)
    nn.init.normal_(layer.weight)
    tasks = range(layer.num_tasks)
    plain = [layer.task(t) for t in tasks]
    x, dy = torch.randn(SHAPE).to(dtype), torch.randn(SHAPE)
    y, dx = step(layer, x, dy, amp)
    assert (y.dtype, dx.dtype) == (dtype, dtype)
    try:
        parts = [step(plain[t], x.chunk(len(tasks))[t], dy.chunk(len(tasks))[t], amp) for t in tasks]
    except RuntimeError as refusal:
        if not re.search(REFUSALS, str(refusal)):
            raise
        return
    coarse = max(CLOSE[dtype], CLOSE[parameter_dtype])
    for got, at in ((y, 0), (dx, 1)):
        wanted = torch.cat([part[at] for part in parts])
        torch.testing.assert_close(got, wanted, rtol=coarse, atol=coarse, check_dtype=kind != "RMS")
    if layer.bias is not None:
        wanted = torch.stack([p.bias.grad for p in plain])
        torch.testing.assert_close(layer.bias.grad, wanted, rtol=coarse, atol=coarse * 10)
    for name in ("running_mean", "running_var") if kind == "BN" else ():
        wanted = torch.stack([getattr(p, name) for p in plain])
        torch.testing.assert_close(getattr(layer, name), wanted, rtol=coarse, atol=coarse)


@contextmanager
def autocast_of(device: str, dtype: torch.dtype) -> Iterator[None]:
    """``torch.autocast`` turns itself off where there is no such device."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@of_any_kind
def test_autocast_lets_activations_pass(kind: str, dtype: torch.dtype, device: str) -> None:
    """As for BatchNorm: in a network the convolution gives half precision, and the layer keeps it."""
    with FakeTensorMode(), autocast_of(device, torch.bfloat16):
        layer = LAYERS[kind](device=device)
        conv = nn.Conv2d(C, C, 1, device=device)
        x = torch.randn(SHAPE, device=device, dtype=dtype)
        for norm in (layer, nn.BatchNorm2d(C, device=device)):
            assert norm(x).dtype == dtype
            assert norm(conv(x)).dtype == torch.bfloat16
        assert {tensor.dtype for tensor in layer.state_dict().values()} <= {torch.float32, torch.int64}


@pytest.mark.parametrize("fan_out", [False, True])
@pytest.mark.parametrize("of_residual", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_of_another_dtype(dtype: torch.dtype, of_residual: torch.dtype, fan_out: bool) -> None:
    """A skip connection that autocast left in float32: promoted, as by ``norm(x) + residual``."""
    layer = FusedTSigmaBN2d(T, C, activation="relu", fan_out=fan_out)
    x = torch.randn(N if fan_out else T * N, C, 6, 5).to(dtype).requires_grad_()
    residual = torch.randn(T * N, C, 6, 5).to(of_residual).requires_grad_()
    y = layer(x, residual)
    assert y.dtype == (x[:1] + residual[:1]).dtype
    y.backward(torch.randn(y.shape).to(y.dtype))
    assert x.grad is not None and x.grad.dtype == dtype
    assert residual.grad is not None and residual.grad.dtype == of_residual
    exact = FusedTSigmaBN2d(T, C, activation="relu", fan_out=fan_out, dtype=torch.float64)
    wanted = exact(x.detach().double(), residual.detach().double())
    torch.testing.assert_close(y.detach().double(), wanted, rtol=CLOSE[y.dtype], atol=CLOSE[y.dtype])


def test_residual_that_is_no_floating_point_tensor() -> None:
    with pytest.raises(TypeError, match=r"residual must be float32, float64, float16 or bfloat16, got torch\.int64"):
        FusedTSigmaBN2d(T, C)(torch.randn(T * N, C, 2, 2), torch.ones(T * N, C, 2, 2, dtype=torch.int64))


@of_any_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scaled_gradients(dtype: torch.dtype, kind: str) -> None:
    """A power of two as scale leaves the gradients' bits, but where half precision ends; an overflow is found."""
    layer = trained(kind, **{"bias": True} if kind in WITH_BIAS else {})
    twin = copy.deepcopy(layer)
    x, dy = torch.randn(SHAPE).to(dtype), torch.randn(SHAPE).to(dtype)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    scaler.scale((layer(x) * dy).float().sum()).backward()
    scaler.unscale_(optimizer)
    (twin(x) * dy).float().sum().backward()
    for scaled, wanted in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(scaled.grad, wanted.grad, rtol=1e-6, atol=1e-6)
    scaler.step(optimizer)
    scaler.update()

    before = layer.weight.detach().clone()
    optimizer.zero_grad()
    dy[0, 0, 0, 0] = float("inf")
    scaler.scale((layer(x) * dy).float().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(layer.weight, before)  # the step was left out
    assert scaler.get_scale() < 2.0**8


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_deterministic_mode(way: Way, training: bool) -> None:
    """Nothing raises, and two runs have the same bits, on memory that was filled with NaN."""
    assert torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    module = way.make().train(training)
    inputs = way.inputs(N)
    runs = []
    for copied in (module, copy.deepcopy(module)):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        outputs = tensors(copied(*leaves))
        generator = torch.Generator().manual_seed(1)
        torch.autograd.backward(outputs, [torch.randn(y.shape, generator=generator) for y in outputs])
        gradients = [tensor.grad for tensor in (*leaves, *copied.parameters()) if tensor.grad is not None]
        runs.append([*outputs, *gradients, *copied.buffers()])
    for a, b in zip(*runs, strict=True):
        assert_same_bits(a, b)
        assert torch.isfinite(a).all()
