"""Derivatives of the epilogue and of the fan-out: first, second, forward mode, batches and ensembles, compiled."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from support.problems import STACKINGS, problem
from torch import Tensor

from tsbn_kernels.definition.activations import ACTIVATIONS, EPILOGUES
from tsbn_kernels.functional import task_batch_norm

T, N, C = 2, 2, 2
SLOPE = 0.3

activations = pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
fans = pytest.mark.parametrize("fan_out", [False, True], ids=["streams", "fan_out"])
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*performance drop.*")
        yield


class Layer:
    """The functional form of x, weight, bias and residual; their values keep clear of the activations' kinks."""

    def __init__(
        self, activation: str | None, fan_out: bool, training: bool = True, stacking: str = "sample_major"
    ) -> None:
        torch.manual_seed(1)
        p = problem(T, N, C, (2,), dtype=torch.float64, stacking=stacking)
        x = torch.randn(N, C, 2, dtype=torch.float64) if fan_out else p.x
        self.given = (None, None) if training else (torch.randn(T, C).double(), torch.rand(T, C).double() + 0.5)
        self.options = {"num_tasks": T, "training": training, "stacking": stacking, "fan_out": fan_out}
        assert p.bias is not None
        plain = task_batch_norm(x, p.weight, p.bias, *self.given, **self.options)
        residual = torch.randn_like(plain)
        for kink in EPILOGUES[activation or "none"].kinks:
            residual += 0.4 * ((plain + residual - kink).abs() < 0.2)
        self.inputs = [tensor.clone().requires_grad_() for tensor in (x, p.weight, p.bias, residual)]
        self.options |= {"activation": activation, "negative_slope": SLOPE}

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return task_batch_norm(x, weight, bias, *self.given, residual, **self.options)


@activations
@fans
@modes
def test_all_modes_of_differentiation(activation: str | None, fan_out: bool, training: bool) -> None:
    layer = Layer(activation, fan_out, training)
    assert torch.autograd.gradcheck(
        layer, layer.inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=False
    )
    assert torch.autograd.gradgradcheck(layer, layer.inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("stacking", STACKINGS)
@fans
def test_ensembles(stacking: str, fan_out: bool) -> None:
    layer = Layer("gelu", fan_out, stacking=stacking)
    models = [torch.randn(3, *tensor.shape, dtype=torch.float64) for tensor in layer.inputs]
    together = torch.vmap(layer)(*models)
    for index, one in enumerate(together):
        torch.testing.assert_close(one, layer(*(tensor[index] for tensor in models)))
    shared = torch.vmap(layer, in_dims=(None, 0, None, 0))(layer.inputs[0], models[1], layer.inputs[2], models[3])
    torch.testing.assert_close(shared[1], layer(layer.inputs[0], models[1][1], layer.inputs[2], models[3][1]))


@activations
@fans
def test_compiled(activation: str | None, fan_out: bool) -> None:
    layer = Layer(activation, fan_out)
    torch.compiler.reset()
    compiled = torch.compile(layer.__call__, fullgraph=True, backend="aot_eager")
    dy = torch.randn_like(layer.inputs[3])
    y, expected = compiled(*layer.inputs), layer(*layer.inputs)
    torch.testing.assert_close(y, expected)
    got, wanted = (torch.autograd.grad(output, layer.inputs, dy) for output in (y, expected))
    for gradient, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(gradient, exact)


def test_gradients_that_nobody_asked_for() -> None:
    layer = Layer("silu", fan_out=True)
    everything = torch.autograd.grad(layer(*layer.inputs).sin().sum(), layer.inputs)
    for wanted in range(4):
        inputs = [tensor.detach().requires_grad_(k == wanted) for k, tensor in enumerate(layer.inputs)]
        (gradient,) = torch.autograd.grad(layer(*inputs).sin().sum(), [inputs[wanted]])
        torch.testing.assert_close(gradient, everything[wanted])
