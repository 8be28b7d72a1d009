"""The output kept in place of the input: what it costs in digits, what it spares, what it refuses."""

from __future__ import annotations

import pytest
import torch
from support.problems import DTYPES, FORMATS, Problem, defined, in_double, problem
from support.tolerances import BACKWARD, Tolerance, assert_within
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from tsbn_kernels import FusedTSigmaBN2d
from tsbn_kernels.definition.activations import TABLE
from tsbn_kernels.definition.options import Options
from tsbn_kernels.functional import task_batch_norm
from tsbn_kernels.operator import recover_input

SLOPE = 0.125
EPILOGUES = ((None, 0.0), ("leaky_relu", SLOPE))
epilogues = pytest.mark.parametrize(("activation", "slope"), EPILOGUES)


def gradients(p: Problem, activation: str | None, slope: float, training: bool = True) -> list[Tensor]:
    """Of x, weight and bias, with the output kept in place of the input."""
    inputs = [tensor.detach().requires_grad_() for tensor in (p.x, p.weight, p.bias) if tensor is not None]
    given = (None, None) if training else (torch.zeros_like(p.weight) + 0.25, torch.ones_like(p.weight) * 0.5)
    bias = None if p.bias is None else inputs[2]
    y = task_batch_norm(
        *inputs[:2],
        bias,
        *given,
        num_tasks=p.num_tasks,
        training=training,
        eps=p.eps,
        gate=p.gate,
        stacking=p.stacking,
        activation=activation,
        negative_slope=slope,
        recover_input=True,
    )
    return list(torch.autograd.grad(y, inputs, p.dy))


def exact(p: Problem, activation: str | None, slope: float, training: bool = True) -> list[Tensor]:
    """The same by the definition, from the input, in float64."""
    q = in_double(p)
    mean, var = defined.moments(q.x, q.num_tasks, q.stacking)
    if not training:
        mean, var = torch.zeros_like(mean) + 0.25, torch.ones_like(var) * 0.5
    flags = training, True, True, True, q.bias, None, activation or "none", slope
    return list(defined.backward(q.dy, q.x, q.weight, mean, var, *q.options, *flags)[:3])


def assert_exact(p: Problem, activation: str | None, slope: float, training: bool = True) -> None:
    """Gradients within the bound that rounding y to its dtype sets."""
    unit = torch.finfo(p.x.dtype).eps / 2
    for got, wanted in zip(
        gradients(p, activation, slope, training), exact(p, activation, slope, training), strict=False
    ):
        size = float(wanted.abs().max())
        bound = BACKWARD[p.x.dtype]
        # xhat is off by unit * (|xhat| + 9), at random, so a sum of dy * xhat by less than its terms together.
        assert_within(got, wanted, Tolerance(bound.absolute + 16 * unit, bound.units), scale=max(1.0, size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("training", [True, False])
@epilogues
def test_gradients(
    activation: str | None, slope: float, training: bool, memory_format: str, dtype: torch.dtype
) -> None:
    for gate in ("sigmoid", "identity"):
        p = problem(3, 5, 7, (4, 5), dtype=dtype, memory_format=memory_format, gate=gate, stacking="sample_major")
        assert_exact(p, activation, slope, training)


def test_no_bias() -> None:
    assert_exact(problem(bias=False, dtype=torch.bfloat16), None, 0.0)


@epilogues
def test_gates_too_small_to_invert(activation: str | None, slope: float) -> None:
    """Their channels keep the input: gates of 1e-18, of 0, and some that the bias hides."""
    p = problem(2, 4, 6, (5, 5), gate="identity")
    assert p.bias is not None
    weight = p.weight.clone()
    weight[0, 1], weight[1, 3], weight[1, 4], weight[0, 5] = 0.0, 1e-25, 1e-3, -0.8
    bias = p.bias.clone()
    bias[1, 4] = 1.0
    q = p._replace(weight=weight, bias=bias)
    assert_exact(q, activation, slope)
    channels, kept = recover_input.keep(q.x, weight, bias, Options(*q.options, activation or "none", slope))
    assert {1, 3, 4} <= set(channels.tolist())
    assert 5 not in channels.tolist() or float(bias[0, 5].abs()) > 8 * 0.8
    assert torch.equal(kept, q.x[:, channels])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@epilogues
def test_the_bound_on_xhat(activation: str | None, slope: float, dtype: torch.dtype) -> None:
    """|error| <= u * (|xhat| + 9) in every channel that is not kept, with gates down to what the dtype resolves."""
    p = in_double(problem(4, 50, 33, (7,), gate="identity", seed=11))
    assert p.bias is not None
    weight = torch.logspace(-7, 1, 33, dtype=torch.float64).expand(4, 33)
    bias = (p.bias * weight * 6).clamp(-7.9 * weight, 7.9 * weight)
    like = torch.empty(0, dtype=dtype)
    mean, var = defined.moments(p.x, p.num_tasks, p.stacking)
    xhat = defined.forward_eval(p.x, torch.ones_like(weight), None, mean, var, *p.options[:2], "identity", p.stacking)
    z = defined.forward_eval(p.x, weight, bias, mean, var, *p.options)
    y = (z if activation is None else torch.where(z > 0, z, z * slope)).to(dtype)
    options = Options(p.num_tasks, p.eps, "identity", p.stacking, activation or "none", slope)
    channels, _ = recover_input.keep(p.x.to(dtype), weight, bias, options)
    v = y.double() if activation is None else torch.where(y > 0, y.double(), y.double() / slope)
    spread = [vector.repeat_interleave(50, 0)[:, :, None] for vector in (weight, bias)]
    error = ((v - spread[1]) / spread[0] - xhat).abs()
    unit = torch.finfo(like.dtype).eps / 2
    recovered = torch.ones(weight.shape[1], dtype=torch.bool)
    recovered[channels] = False
    assert recovered.any()
    slack = 1e-12 if dtype == torch.float64 else 0.0  # of the computation itself
    assert (error <= unit * (xhat.abs() + 9) + slack)[:, recovered].all()


def test_the_input_is_freed_in_the_forward_pass() -> None:
    convolution, layer = nn.Conv2d(3, 8, 3), FusedTSigmaBN2d(2, 8, activation="leaky_relu", recover_input=True)
    memory: list[StorageWeakRef] = []
    layer.register_forward_pre_hook(lambda _, inputs: memory.append(StorageWeakRef(inputs[0].untyped_storage())))
    y = nn.Conv2d(8, 4, 1)(layer(convolution(torch.randn(4, 3, 16, 16))))
    assert memory[0].expired()
    y.sum().backward()
    layer.recover_input = False
    y = layer(convolution(torch.randn(4, 3, 16, 16)))
    assert not memory[1].expired()


def test_gradients_of_a_network() -> None:
    torch.manual_seed(2)
    blocks = [
        nn.Sequential(nn.Conv2d(3, 3, 3), FusedTSigmaBN2d(2, 3, activation="leaky_relu", bias=True)) for _ in range(3)
    ]
    network = nn.Sequential(*blocks).double()
    x = torch.randn(4, 3, 9, 9, dtype=torch.float64)
    results = []
    for recover in (True, False):
        for block in blocks:
            block[1].recover_input = recover
        results.append(torch.autograd.grad(network(x).square().sum(), list(network.parameters())))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_an_output_that_is_changed_in_place_is_an_error() -> None:
    layer = FusedTSigmaBN2d(2, 3, recover_input=True)
    y = layer(torch.randn(4, 3, 5, 5, requires_grad=True)).relu_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_derivatives_that_need_the_input_are_refused() -> None:
    layer = FusedTSigmaBN2d(2, 3, recover_input=True, track_running_stats=False)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(layer, (x.detach(),), (torch.ones_like(x),))


@pytest.mark.parametrize(
    "options",
    [
        *({"activation": name} for name, row in TABLE.items() if not row.invertible),
        {"activation": "leaky_relu", "negative_slope": 0.0},
    ],
    ids=str,
)
def test_outputs_that_cannot_be_inverted(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="needs an output that can be inverted"):
        FusedTSigmaBN2d(2, 3, recover_input=True, **options)


def test_outputs_that_do_not_tell_the_input() -> None:
    with pytest.raises(ValueError, match="neither a residual nor fan_out"):
        FusedTSigmaBN2d(2, 3, recover_input=True, fan_out=True)
    x = torch.randn(4, 3, 5, 5)
    with pytest.raises(ValueError, match="neither a residual nor fan_out"):
        FusedTSigmaBN2d(2, 3, recover_input=True)(x, x)
