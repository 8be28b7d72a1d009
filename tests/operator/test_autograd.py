"""First and second derivatives through the operators, and what the graph keeps alive."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.problems import DTYPES, FORMATS, GATES, STACKINGS, Problem, definition, in_memory_format, problem
from support.tolerances import BACKWARD, assert_within
from torch import Tensor

from tsbn_kernels import FusedTSigmaBN2d
from tsbn_kernels.functional import task_batch_norm

SPATIAL = {"0d": (), "1d": (3,), "2d": (2, 2), "3d": (2, 1, 2)}


def statistics(p: Problem) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    shape = p.weight.shape
    return (
        torch.randn(shape, generator=generator, dtype=p.weight.dtype),
        torch.rand(shape, generator=generator, dtype=p.weight.dtype) + 0.5,
    )


def layer(p: Problem, training: bool) -> Callable[..., Tensor]:
    running = (None, None) if training else statistics(p)

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return task_batch_norm(
            x,
            weight,
            bias,
            *running,
            num_tasks=p.num_tasks,
            training=training,
            gate=p.gate,
            stacking=p.stacking,
        )

    return forward


def leaves(p: Problem, bias: str = "learned") -> list[Tensor]:
    tensors = [p.x.requires_grad_(), p.weight.requires_grad_()]
    if p.bias is not None:
        tensors.append(p.bias.requires_grad_(bias == "learned"))
    return tensors


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("spatial", SPATIAL.values(), ids=SPATIAL)
@pytest.mark.parametrize("stacking", STACKINGS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("bias", ["none", "learned", "frozen"])
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(
    training: bool, bias: str, gate: str, stacking: str, spatial: tuple[int, ...], memory_format: str
) -> None:
    p = problem(
        2,
        3,
        2,
        spatial,
        dtype=torch.float64,
        stacking=stacking,
        memory_format=memory_format,
        gate=gate,
        bias=bias != "none",
    )
    assert torch.autograd.gradcheck(layer(p, training), leaves(p, bias), fast_mode=spatial != (2, 2))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("stacking", STACKINGS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("training", [True, False])
def test_gradgradcheck(training: bool, gate: str, stacking: str, memory_format: str) -> None:
    p = problem(2, 2, 2, (2, 2), dtype=torch.float64, stacking=stacking, memory_format=memory_format, gate=gate)
    assert torch.autograd.gradgradcheck(layer(p, training), leaves(p))


def test_create_graph_gives_the_same_first_derivative() -> None:
    p = problem(dtype=torch.float64)
    inputs = leaves(p)
    y = layer(p, True)(*inputs)
    plain = torch.autograd.grad(y, inputs, p.dy, retain_graph=True)
    differentiable = torch.autograd.grad(y, inputs, p.dy, create_graph=True)
    for got, wanted in zip(differentiable, plain, strict=True):
        torch.testing.assert_close(got.detach(), wanted)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (0, 0, 0)])
def test_only_the_gradients_that_are_needed(needed: tuple[int, int, int], training: bool) -> None:
    p = problem(dtype=torch.float64)
    inputs = leaves(p)
    everything = torch.autograd.grad(layer(p, training)(*inputs), inputs, p.dy)
    for tensor, need in zip(inputs, needed, strict=True):
        tensor.requires_grad_(bool(need))
    y = layer(p, training)(*inputs)
    assert y.requires_grad == any(needed)
    if not y.requires_grad:
        return
    y.backward(p.dy)
    for tensor, need, gradient in zip(inputs, needed, everything, strict=True):
        if need:
            assert tensor.grad is not None
            torch.testing.assert_close(tensor.grad, gradient)
        else:
            assert tensor.grad is None


def test_gradient_of_one_input_of_several() -> None:
    """autograd.grad with inputs= asks for a subset of what requires a gradient."""
    p = problem()
    inputs = leaves(p)
    y = layer(p, True)(*inputs)
    expected = torch.autograd.grad(y, inputs, p.dy, retain_graph=True)
    for tensor, gradient in zip(inputs, expected, strict=True):
        torch.testing.assert_close(torch.autograd.grad(y, tensor, p.dy, retain_graph=True)[0], gradient)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_retained_graph_gives_the_same_gradients_again(memory_format: str) -> None:
    p = problem(memory_format=memory_format)
    inputs = leaves(p)
    y = layer(p, True)(*inputs)
    first = torch.autograd.grad(y, inputs, p.dy, retain_graph=True)
    second = torch.autograd.grad(y, inputs, p.dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, inputs, p.dy)


def test_in_place_relu_after_the_layer() -> None:
    p = problem()
    inputs = leaves(p)
    forward = layer(p, True)
    in_place = torch.autograd.grad(torch.relu_(forward(*inputs)), inputs, p.dy)
    separate = torch.autograd.grad(torch.relu(forward(*inputs)), inputs, p.dy)
    for got, wanted in zip(in_place, separate, strict=True):
        assert torch.equal(got, wanted)


def test_input_changed_in_place_is_an_error() -> None:
    p = problem()
    inputs = leaves(p)
    x = inputs[0] * 1
    y = layer(p, True)(x, *inputs[1:])
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, inputs, p.dy)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
def test_saves_x_and_vectors_alone(training: bool, dtype: torch.dtype) -> None:
    p = problem(dtype=dtype)
    inputs = leaves(p)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(p, training)(*inputs)
    large = [tensor for tensor in saved if tensor.numel() > p.weight.numel()]
    assert [tensor.data_ptr() for tensor in large] == [p.x.data_ptr()]
    assert len(saved) <= 4


@pytest.mark.parametrize("training", [True, False])
def test_no_graph_without_gradients(training: bool) -> None:
    p = problem()
    inputs = leaves(p)
    with torch.no_grad():
        assert layer(p, training)(*inputs).grad_fn is None
    with torch.inference_mode():
        assert layer(p, training)(*inputs).is_inference()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_expanded_gradients(reduction: str, memory_format: str, dtype: torch.dtype) -> None:
    """``sum()`` and ``mean()`` send back one number with strides of 0; x's gradient vanishes, the bias's does not."""
    p = problem(dtype=dtype, memory_format=memory_format)
    inputs = leaves(p)
    getattr(layer(p, True)(*inputs), reduction)().backward()
    constant = p.dy.new_tensor(1.0 if reduction == "sum" else 1 / p.x.numel())
    expected = definition(p._replace(dy=constant.expand_as(p.x)))
    for tensor, wanted in zip(inputs, (expected.dx, expected.dweight, expected.dbias), strict=True):
        assert tensor.grad is not None
        assert_within(tensor.grad, wanted, BACKWARD[dtype], scale=float(constant) * 8)
    assert inputs[2].grad is not None
    assert (inputs[2].grad != 0).all()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("stacking", STACKINGS)
@pytest.mark.parametrize("how", ["other format", "strided", "shifted", "expanded over samples"])
def test_gradients_in_another_layout(how: str, stacking: str, memory_format: str) -> None:
    p = problem(stacking=stacking, memory_format=memory_format)
    other = FORMATS[1 - FORMATS.index(memory_format)]
    if how == "other format":
        dy = in_memory_format(p.dy, stacking, other)
    elif how == "strided":
        dy = torch.stack((p.dy, torch.full_like(p.dy, float("nan"))), dim=-1)[..., 0]
    elif how == "shifted":
        dy = torch.cat((p.dy.new_full((1,), float("nan")), p.dy.as_strided((p.dy.numel(),), (1,))))[1:]
        dy = dy.as_strided(p.dy.shape, p.dy.stride(), dy.storage_offset())
    else:
        dy = p.dy[:1].expand_as(p.dy)
    expected = definition(p._replace(dy=dy))
    inputs = leaves(p)
    gradients = torch.autograd.grad(layer(p, True)(*inputs), inputs, dy)
    assert gradients[0].stride() == p.x.stride()
    for got, wanted in zip(gradients, (expected.dx, expected.dweight, expected.dbias), strict=True):
        assert_within(got, wanted, BACKWARD[torch.float32], scale=8)


@pytest.mark.parametrize("x_view", ["sliced channels", "sliced samples", "shared by the tasks"])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_strided_inputs_read_in_place(memory_format: str, x_view: str) -> None:
    if x_view == "shared by the tasks":
        base = in_memory_format(torch.randn(1, 4, 5, 3, 3), "task_axis", memory_format).double()
        x, stacking = base.expand(3, 4, 5, 3, 3), "task_axis"
    elif x_view == "sliced channels":
        base = in_memory_format(torch.randn(12, 10, 3, 3), "task_major", memory_format).double()
        x, stacking = base[:, 3:8], "task_major"
    else:
        base = in_memory_format(torch.randn(24, 5, 3, 3), "task_major", memory_format).double()
        x, stacking = base[1::2], "task_major"
    p = problem(dtype=torch.float64)._replace(x=x, dy=torch.randn_like(x), stacking=stacking)
    expected = definition(p)
    inputs = leaves(p._replace(x=x.detach()))
    gradients = torch.autograd.grad(layer(p, True)(*inputs), inputs, p.dy)
    for got, wanted in zip(gradients, (expected.dx, expected.dweight, expected.dbias), strict=True):
        torch.testing.assert_close(got, wanted)


def test_one_task_at_a_time_leaves_the_others_rows_zero() -> None:
    """T backward passes through one graph, as multi-task weightings run them."""
    p = problem()
    inputs = leaves(p)
    y = layer(p, True)(*inputs)
    total = [torch.zeros_like(tensor) for tensor in inputs]
    for t, stream in enumerate(y.chunk(3)):
        gradients = torch.autograd.grad(stream, inputs, p.dy.chunk(3)[t], retain_graph=True)
        for other in {0, 1, 2} - {t}:
            assert (gradients[1][other] == 0).all()
            assert (gradients[0].chunk(3)[other] == 0).all()
        total = [a + b for a, b in zip(total, gradients, strict=True)]
    for got, wanted in zip(total, torch.autograd.grad(y, inputs, p.dy), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_functorch_grad() -> None:
    """torch.func.grad works through nn.BatchNorm, and so through this."""
    p = problem(dtype=torch.float64)
    forward = layer(p, True)

    def loss(x: Tensor) -> Tensor:
        return (forward(x, p.weight, p.bias) * p.dy).sum()

    torch.testing.assert_close(torch.func.grad(loss)(p.x), definition(p).dx)


def test_checkpointing() -> None:
    """Recomputation in the backward pass updates running statistics twice, as with nn.BatchNorm, and nothing else."""
    module = FusedTSigmaBN2d(3, 5)
    x = torch.randn(12, 5, 3, 3, requires_grad=True)
    dy = torch.randn_like(x)
    expected = torch.autograd.grad(module(x), (x, module.weight), dy)
    y = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    for got, wanted in zip(torch.autograd.grad(y, (x, module.weight), dy), expected, strict=True):
        assert torch.equal(got, wanted)
