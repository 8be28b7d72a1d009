"""The functional form of layer normalisation: gradients to any order, transforms, streams, dtypes, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.layer_problems import LayerProblem, defined, in_double, layer_problem
from support.problems import STACKINGS, unstack
from torch import Tensor

from tsbn_kernels import functional, use_backend
from tsbn_kernels.definition.options import LayerOptions
from tsbn_kernels.operator import layer_autograd

Call = Callable[..., Any]
FORMS = [{"bias": True}, {"bias": False, "gate": "identity"}, {"rms": True}]
CASES = [
    {"stacking": stacking, "fan_out": fan_out, "residual": residual, **form}
    for stacking in STACKINGS
    for fan_out in (False, True)
    for residual in (False, True)
    for form in FORMS
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def call_of(p: LayerProblem) -> tuple[Call, list[Tensor]]:
    """The function of the functional form that computes a problem, and its tensors."""
    names = ["x", "residual", "weight", "bias"]
    tensors = [tensor for name in names if (tensor := getattr(p, name)) is not None]
    options: dict[str, Any] = {
        "num_tasks": len(p.weight),
        "eps": p.eps,
        "gate": p.gate,
        "stacking": p.stacking,
        "fan_out": p.fan_out,
    }
    name = ("add_" if p.residual is not None else "") + ("task_rms_norm" if p.rms else "task_layer_norm")
    function = getattr(functional, name)
    return lambda *tensors: function(*tensors, **options), [tensor.detach().clone() for tensor in tensors]


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


@cases
def test_equals_the_operator(case: dict[str, Any]) -> None:
    p = layer_problem(**case)
    call, tensors = call_of(p)
    y, s, *_ = torch.ops.tsbn.layer_norm(p.x, p.weight, p.bias, p.residual, *p.options)
    found = call(*tensors)
    assert torch.equal(found if p.residual is None else found[0], y)
    if p.residual is not None:
        assert torch.equal(found[1], s)


@cases
def test_first_and_second_derivative(case: dict[str, Any]) -> None:
    call, tensors = call_of(layer_problem(2, 2, (2,), (3,), dtype=torch.float64, **case))
    assert torch.autograd.gradcheck(call, leaves(tensors), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaves(tensors), check_fwd_over_rev=True)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("fan_out", [False, True])
def test_each_gradient_alone(fan_out: bool, index: int) -> None:
    call, tensors = call_of(layer_problem(dtype=torch.float64, fan_out=fan_out, residual=True))
    dys = [torch.randn_like(out) for out in call(*tensors)]
    all_of_them = leaves(tensors)
    wanted = torch.autograd.grad(call(*all_of_them), all_of_them, dys)
    alone = [tensor.requires_grad_(at == index) for at, tensor in enumerate(leaves(tensors))]
    (found,) = torch.autograd.grad(call(*alone), [alone[index]], dys)
    torch.testing.assert_close(found, wanted[index], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_of_two(used: int) -> None:
    """The sum alone, or the normalisation alone, may go on."""
    p = layer_problem(dtype=torch.float64, residual=True)
    call, tensors = call_of(p)
    dy, results = torch.randn_like(p.dy), []
    for function in (call, lambda x, r, w, b: defined.layer_norm(x, w, b, r, *p.options)):
        operands = leaves(tensors)
        results.append(torch.autograd.grad(function(*operands)[used], operands, dy, allow_unused=True))
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@cases
def test_statistics_under_vmap(case: dict[str, Any]) -> None:
    """All that the function returns is in the order of the rows of x, for it is saved."""
    p = layer_problem(dtype=torch.float64, **case)
    options = LayerOptions(len(p.weight), p.eps, p.gate, p.stacking, p.rms, p.fan_out)

    def call(x: Tensor) -> tuple[Tensor, ...]:
        return layer_autograd.apply_transformed(x, p.weight, p.bias, p.residual, options, None)

    many = torch.randn(3, *p.x.shape, dtype=torch.float64)
    for found, wanted in zip(torch.vmap(call)(many), zip(*map(call, many), strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(wanted))


@cases
def test_transforms(case: dict[str, Any]) -> None:
    call, tensors = call_of(layer_problem(2, 2, (2,), (3,), dtype=torch.float64, **case))
    weight_at = 2 if case["residual"] else 1
    for batched in (0, weight_at):
        many = torch.randn(3, *tensors[batched].shape, dtype=torch.float64)

        def of(one: Tensor, at: int = batched) -> tuple[Tensor, ...]:
            outputs = call(*tensors[:at], one, *tensors[at + 1 :])
            return outputs if isinstance(outputs, tuple) else (outputs,)

        loop = [torch.stack(outputs) for outputs in zip(*map(of, many), strict=True)]
        for found, wanted in zip(torch.vmap(of)(many), loop, strict=True):
            torch.testing.assert_close(found, wanted)
        upstream = [torch.randn(out.shape[1:], dtype=torch.float64) for out in loop]

        def loss(one: Tensor, of: Call = of, upstream: list[Tensor] = upstream) -> Tensor:
            return torch.stack([(a * b).sum() for a, b in zip(of(one), upstream, strict=True)]).sum()

        gradients = torch.stack([torch.func.grad(loss)(one) for one in many])
        torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(many), gradients)
        hessian = torch.autograd.functional.hessian(loss, many[0])
        torch.testing.assert_close(torch.func.hessian(loss)(many[0]), hessian)
        assert torch.equal(torch.func.functionalize(of)(many[0])[0], of(many[0])[0])


@pytest.mark.parametrize("stacking", STACKINGS)
@pytest.mark.parametrize("fan_out", [False, True])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("used", [(1,), (0, 2), (2, 1, 0)])
def test_streams(used: tuple[int, ...], rms: bool, fan_out: bool, stacking: str) -> None:
    """Outputs and gradients are those of the whole; a task that no gradient comes from gets none."""
    p = layer_problem(dtype=torch.float64, stacking=stacking, fan_out=fan_out, rms=rms)
    call, tensors = call_of(p)
    operands = leaves(tensors)
    settings = len(p.weight), p.eps, p.gate, p.stacking, p.rms, p.fan_out
    x, weight, bias = (*operands, None)[:3]
    found = functional.normalize_rows((x, weight, bias, None), settings, as_streams=True)
    whole = unstack(call(*operands), 3, stacking)
    for one, other in zip(found, whole, strict=True):
        assert torch.equal(one, other)
    dys = [torch.randn_like(found[task]) for task in used]
    for create_graph in (False, True):
        options = {"retain_graph": True, "create_graph": create_graph}
        gradients = torch.autograd.grad([found[task] for task in used], operands, dys, **options)
        wanted = torch.autograd.grad([whole[task] for task in used], operands, dys, **options)
        for a, b in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    again = [torch.randn_like(gradient) for gradient in gradients[:2]]  # that of the bias depends on none of them
    second, expected = (torch.autograd.grad(of[:2], operands, again, allow_unused=True) for of in (gradients, wanted))
    for a, b in zip(second, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    found[0].add_(1)  # it shares memory with the others, and yet may be changed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rms", [False, True])
def test_half_precision_is_rounded_once(rms: bool, dtype: torch.dtype) -> None:
    p = layer_problem(N=8, shape=(96,), dtype=dtype, rms=rms)
    call, tensors = call_of(p)
    exact = defined.layer_norm(*in_double(p)[:4], *p.options)[0]
    found = call(*tensors)
    unit = torch.finfo(dtype).eps * exact.abs().clamp_min(torch.finfo(dtype).tiny)
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= unit).all()


def test_a_residual_of_another_dtype_is_promoted() -> None:
    p = layer_problem(dtype=torch.float32, residual=True)
    assert p.residual is not None
    y, s = functional.add_task_layer_norm(p.x.bfloat16(), p.residual, p.weight, num_tasks=3)
    assert y.dtype == s.dtype == torch.float32
    assert torch.equal(s, p.x.bfloat16() + p.residual)


def test_an_eps_that_is_not_given_is_that_of_the_rms_norm() -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.full((2, 4), 1e-8, dtype=dtype)
        y = functional.task_rms_norm(x, torch.ones(1, 4, dtype=dtype), num_tasks=1, gate="identity")
        torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (4,)))


@pytest.mark.parametrize("stacking", STACKINGS)
def test_an_input_of_any_strides(stacking: str) -> None:
    p = layer_problem(dtype=torch.float64, tokens=(5, 3), stacking=stacking)
    call, (x, *more) = call_of(p)
    strided = x.transpose(-2, -3).contiguous().transpose(-2, -3).requires_grad_()
    y = call(strided, *more)
    assert y.grad_fn.saved_tensors[0].is_contiguous()  # it is copied once
    torch.testing.assert_close(call(strided, *more), call(x, *more))
    (dx,) = torch.autograd.grad(call(strided, *more), [strided], p.dy.mT.contiguous().mT)
    torch.testing.assert_close(dx, torch.autograd.grad(call(plain := x.requires_grad_(), *more), [plain], p.dy)[0])


def test_a_backend_that_is_chosen_runs() -> None:
    p = layer_problem(residual=True)
    call, tensors = call_of(p)
    with use_backend("reference"):
        found = call(*tensors)
    for a, b in zip(found, defined.layer_norm(p.x, p.weight, p.bias, p.residual, *p.options), strict=False):
        assert torch.equal(a, b)


@pytest.mark.parametrize("residual", [False, True])
def test_saves_what_is_normalised_once(residual: bool) -> None:
    """And the statistics of its rows; neither y nor xhat."""
    call, tensors = call_of(layer_problem(N=8, residual=residual))
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = call(*leaves(tensors))
    large = [tensor for tensor in saved if tensor.numel() >= tensors[0].numel()]
    assert len(large) == 1
    assert torch.equal(large[0], outputs[1] if residual else tensors[0])
    assert len(saved) <= 4


def test_an_input_that_is_changed_in_place_is_an_error() -> None:
    call, (x, *more) = call_of(layer_problem())
    operand = x.requires_grad_() * 1
    y = call(operand, *more)
    operand.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(torch.randn_like(y))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_expanded_gradients(reduction: str) -> None:
    """``sum()`` and ``mean()`` send back one number with strides of 0."""
    call, tensors = call_of(layer_problem(dtype=torch.float64))
    y = call(*(operands := leaves(tensors)))
    found = torch.autograd.grad(getattr(y, reduction)(), operands, retain_graph=True)
    wanted = torch.autograd.grad(y, operands, torch.full_like(y, 1.0 if reduction == "sum" else 1 / y.numel()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_outputs_can_be_changed_in_place() -> None:
    call, tensors = call_of(layer_problem(residual=True))
    y, _ = call(*leaves(tensors))
    y.add_(1).square().sum().backward()


X, W = torch.randn(6, 4, 5), torch.zeros(3, 5)
LAYER, ADD = functional.task_layer_norm, functional.add_task_layer_norm


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LAYER([1.0], W, num_tasks=3), TypeError, "x must be a tensor, got list"),
        (lambda: LAYER(X.int(), W, num_tasks=3), TypeError, r"got torch.int32; convert it with x.float\(\)"),
        (lambda: LAYER(X.to_sparse(), W, num_tasks=3), TypeError, r"convert it with .to_dense\(\)"),
        (lambda: LAYER(X, W.int(), num_tasks=3), TypeError, "weight must be float32, .* got torch.int32"),
        (lambda: LAYER(X, W[0], num_tasks=3), ValueError, r"\[num_tasks, \*normalized_shape\] with num_tasks=3, got"),
        (lambda: LAYER(X, W, num_tasks=2), ValueError, r"with num_tasks=2, got \[3, 5\]"),
        (lambda: LAYER(X, W, num_tasks=0), ValueError, "num_tasks must be 1 or more, got 0"),
        (lambda: LAYER(X, W, num_tasks=3.0), TypeError, "num_tasks must be an integer, got 3.0"),
        (
            lambda: LAYER(X[..., :4], W, num_tasks=3),
            ValueError,
            r"Given normalized_shape=\[5\], expected input with shape \[T\*N, ..., 5\], but got input of size",
        ),
        (lambda: LAYER(X[0, 0], W, num_tasks=3), ValueError, r"shape \[T\*N, ..., 5\], but got input of size \[5\]"),
        (lambda: LAYER(X[0], W, num_tasks=3, stacking="task_axis"), ValueError, r"\[T, N, ..., 5\]"),
        (lambda: LAYER(X[0, 0], W, num_tasks=3, fan_out=True), ValueError, r"shape \[N, ..., 5\]"),
        (lambda: LAYER(X[:5], W, num_tasks=3), ValueError, "5, is not a multiple of num_tasks=3; stack one batch"),
        (lambda: LAYER(X, W, num_tasks=3, stacking="task_axis"), ValueError, "has 6 tasks along its first dimension"),
        (lambda: LAYER(X, W, W[:, :4], num_tasks=3), ValueError, r"bias must have the shape of weight, \[3, 5\], got"),
        (lambda: LAYER(X, W, W[0], num_tasks=3), ValueError, r"shape of weight, \[3, 5\], got \[5\]"),
        (lambda: LAYER(X, W, W.bool(), num_tasks=3), TypeError, "bias must be float32"),
        (
            lambda: LAYER(X, W, num_tasks=3, eps=-1.0),
            ValueError,
            "eps must be a finite number of 0.0 or more",
        ),
        (lambda: LAYER(X, W, num_tasks=3, eps=None), TypeError, "eps must be a number, got None"),
        (
            lambda: LAYER(X, W, num_tasks=3, gate="tanh"),
            ValueError,
            "gate must be one of sigmoid, identity, got 'tanh'",
        ),
        (lambda: LAYER(X, W, num_tasks=3, stacking="TNC"), ValueError, "stacking must be one of task_major"),
        (lambda: LAYER(X, W, num_tasks=3, fan_out=1), TypeError, "fan_out must be True or False, got 1"),
        (lambda: LAYER(X, W.to("meta"), num_tasks=3), RuntimeError, r"weight is on meta and x on cpu; .*\.to\(\)"),
        (lambda: ADD(X, None, W, num_tasks=3), TypeError, "residual must be a tensor, got NoneType"),
        (lambda: ADD(X, X[:3], W, num_tasks=3), ValueError, r"residual must have the shape of x, \[6, 4, 5\], got"),
        (lambda: ADD(X, X.long(), W, num_tasks=3), TypeError, "residual must be float32, .* got torch.int64"),
    ],
)
def test_bad_arguments(call: Call, error: type[Exception], message: str) -> None:
    for _ in range(2):  # nothing that is wrong is remembered as right
        with pytest.raises(error, match=message):
            call()


def test_what_is_remembered_of_a_call_is_not_mistaken() -> None:
    """1, True and 1.0 are equal, and not all right."""
    x, weight = torch.randn(2, 4), torch.zeros(1, 4)
    functional.task_layer_norm(x, weight, num_tasks=1, fan_out=False)
    with pytest.raises(TypeError, match="num_tasks must be an integer"):
        functional.task_layer_norm(x, weight, num_tasks=1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="fan_out must be True or False"):
        functional.task_layer_norm(x, weight, num_tasks=1, fan_out=0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="x must be float32"):
        functional.task_layer_norm(x.int(), weight, num_tasks=1)
