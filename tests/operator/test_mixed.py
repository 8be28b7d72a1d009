"""Mixed batches: a task index for each sample, with unequal and empty tasks, against a loop over masks."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from support.mixed import T, masked_loop, mixes
from support.problems import DTYPES, FORMATS, in_memory_format
from support.tolerances import BACKWARD, FORWARD, STATISTICS, Tolerance, assert_same_bits, assert_within
from torch import Tensor

from tsbn_kernels import FusedTSigmaBN1d, use_backend
from tsbn_kernels.backends import backends
from tsbn_kernels.definition import mixed_batch_norm as reference
from tsbn_kernels.definition.options import MixedBackend, Moments, Needs, Options, Running, Saved
from tsbn_kernels.functional import task_batch_norm
from tsbn_kernels.operator.mixed_ops import eager_operators
from tsbn_kernels.operator.mixed_parts import Parts, exact_task_sums, joined
from tsbn_kernels.operator.ops import batch_norm

C = 5
ALL = Needs(True, True, True, True)
BACKENDS = [backend.name for backend in backends() if backend.available and backend.runs_on("cpu")]
EVERY_ACTIVATION = [None, "relu", "gelu"]


def operands(index: Tensor, spatial: tuple[int, ...], dtype: torch.dtype = torch.float64, **how: Any) -> list[Tensor]:
    """x, weight, bias, residual and dy."""
    torch.manual_seed(len(index))
    stacked = [torch.randn(len(index), C, *spatial).to(dtype) for _ in range(3)]
    x, residual, dy = (in_memory_format(t, "task_major", how.get("memory_format", "contiguous")) for t in stacked)
    vectors = [torch.randn(T, C).to(torch.float64 if dtype == torch.float64 else torch.float32) for _ in range(2)]
    return [x, *vectors, residual, dy]


def of_loop(x: Tensor, index: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, activation: Any) -> Tensor:
    z = masked_loop(x, index, torch.sigmoid(weight), bias) + residual
    return z if activation is None else getattr(torch.nn.functional, activation)(z)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", EVERY_ACTIVATION)
def test_equals_the_loop_over_masks(backend: str, activation: Any) -> None:
    for index in mixes():
        for spatial in ((2, 3), (7,)):
            *tensors, dy = operands(index, spatial)
            x, weight, bias, residual = (tensor.requires_grad_() for tensor in tensors)
            with use_backend(backend):
                y = task_batch_norm(
                    x, weight, bias, None, None, residual, num_tasks=T, task_of_sample=index, activation=activation
                )
                found = torch.autograd.grad(y, (x, weight, bias, residual), dy)
            expected = of_loop(x, index, weight, bias, residual, activation)
            wanted = torch.autograd.grad(expected, (x, weight, bias, residual), dy)
            for one, other in zip((y, *found), (expected, *wanted), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


COMPUTES = {
    "operators": eager_operators(None),
    "parts": Parts(batch_norm.dispatched),
    "plain": Parts(batch_norm.of_reference),
}


@pytest.mark.parametrize("compute", COMPUTES.values(), ids=COMPUTES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_every_dtype_is_as_exact_as_with_equal_tasks(
    dtype: torch.dtype, memory_format: str, activation: str, compute: MixedBackend
) -> None:
    options = Options(T, 1e-5, "sigmoid", "task_major", activation)
    for index in mixes(1):
        x, weight, bias, residual, dy = operands(index, (3, 5), dtype, memory_format=memory_format)
        wide = [tensor.double() for tensor in (x, weight, bias, residual)]
        y, mean, var = compute.mixed_forward_training(x, index, weight, bias, residual, options)
        exact_y, *exact = reference.mixed_forward_training(wide[0], index, *wide[1:], options)
        assert y.stride() == x.stride()
        assert_within(y, exact_y, FORWARD[dtype], scale=max(1.0, float(exact_y.abs().max()) / 4))
        for got, wanted in zip((mean, var), exact, strict=True):
            assert_within(got, wanted, Tolerance(STATISTICS[dtype], 1), scale=1.0)
        needs = ALL if activation != "none" else ALL._replace(dresidual=False)
        saved = Saved(x, weight, bias, residual, mean, var)
        found = compute.mixed_backward(dy, saved, index, True, needs, options)
        saved = Saved(*wide, *exact)
        expected = reference.mixed_backward(dy.double(), saved, index, True, needs, options)
        for name, got, wanted in zip(Needs._fields, found, expected, strict=True):
            if wanted is None:
                assert got is None
            elif name in ("dweight", "dbias"):
                positions = max(1, x.numel() // C)
                assert_within(got, wanted, Tolerance(STATISTICS[dtype], 1), scale=4 * positions**0.5)
            else:
                assert_within(got, wanted, BACKWARD[dtype], scale=max(1.0, float(wanted.abs().max()) / 4))


def test_far_means() -> None:
    index = torch.tensor([2, 0, 2, 2, 1, 0, 2, 1])
    x = torch.randn(8, C, 40) + 1e4 * torch.randn(T, C)[index].unsqueeze(2)
    y = task_batch_norm(x, torch.zeros(T, C), num_tasks=T, task_of_sample=index)
    expected = masked_loop(x.double(), index, torch.full((T, C), 0.5, dtype=torch.float64), None)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("compute", COMPUTES.values(), ids=COMPUTES)
@pytest.mark.parametrize("momentum", [0.3, None])
def test_what_the_operator_updates(momentum: float | None, compute: MixedBackend) -> None:
    """As the definition does beside the forward pass, in every dtype; what is missing is left out."""
    index, options = torch.tensor([2, 0, 2, 3, 0, 2]), Options(T, 1e-5, "sigmoid", "task_major", "silu")
    for dtype, kept in zip(DTYPES, (torch.float32, torch.float64, torch.bfloat16, torch.float32), strict=True):
        x, weight, bias, residual, _ = operands(index, (3,), dtype)
        plain = compute.mixed_forward_training(x, index, weight, bias, residual, options)
        mean, var, batches = torch.randn(T, C).to(kept), torch.rand(T, C).to(kept), torch.arange(T)
        for running in (Running(mean, var, batches, momentum), Running(None, var, batches, momentum), Running()):
            own = Running(*(v.clone() if isinstance(v, Tensor) else v for v in running))
            found = compute.mixed_forward_tracked(x, index, weight, bias, residual, own, options)
            for one, other in zip(found, plain, strict=True):
                assert_same_bits(one, other)
            reference.track(running, found.mean, found.var, torch.bincount(index, minlength=T), 3)
            rtol = max(torch.finfo(kept).eps, 1e-12 if dtype == kept == torch.float64 else 1e-6)
            torch.testing.assert_close(own, running, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_error_leaves_the_running_statistics_alone(backend: str) -> None:
    layer = FusedTSigmaBN1d(T, C)
    layer(torch.randn(2 * T, C), task_of_sample=torch.arange(T).repeat(2))
    before = copy.deepcopy(layer.state_dict())
    bad = {"got 4 for sample 1": [0, 4, 0], "got -1 for sample 2": [0, 0, -1], "one sample of task 2": [1, 2, 1]}
    for message, index in bad.items():
        with use_backend(backend), pytest.raises(ValueError, match=message):
            layer(torch.randn(3, C), task_of_sample=torch.tensor(index))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    with use_backend(backend), pytest.raises(ValueError, match="got 4 for sample 0"):
        layer.eval()(torch.randn(1, C), task_of_sample=torch.tensor([4]))


def test_running_statistics_of_the_tasks_that_take_part() -> None:
    for momentum in (0.3, torch.rand(T, C, dtype=torch.float64)):
        for index in mixes():
            x, weight, bias, *_ = operands(index, (4,))
            before = torch.randn(T, C).double(), torch.rand(T, C).double()
            absent = torch.bincount(index, minlength=T) == 0
            for vector in before:
                vector[absent, 0], vector[absent, 1] = float("nan"), float("inf")
            mean, var = (vector.clone() for vector in before)
            options: Any = {"num_tasks": T, "task_of_sample": index}
            y = task_batch_norm(x, weight, bias, mean, var, momentum=momentum, **options)
            assert y.isfinite().all()
            if not isinstance(momentum, Tensor):
                expected = tuple(vector.clone() for vector in before)
                masked_loop(x, index, torch.sigmoid(weight), bias, *expected, momentum=momentum)
                torch.testing.assert_close((mean, var), expected, rtol=1e-12, atol=1e-12, equal_nan=True)
            for left, was in zip((mean, var), before, strict=True):
                assert_same_bits(left[absent], was[absent])
            y = task_batch_norm(x, weight, bias, mean, var, training=False, **options)
            wanted = masked_loop(x, index, torch.sigmoid(weight), bias, mean, var, training=False)
            torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)


def test_gradients_of_absent_tasks_are_zero() -> None:
    x, weight, bias, _, dy = operands(torch.zeros(6), (3,))
    weight[1:], bias[1:] = float("nan"), float("inf")
    x, weight, bias = (tensor.requires_grad_() for tensor in (x, weight, bias))
    index = torch.zeros(6, dtype=torch.int64)
    for training in (True, False):
        statistics = torch.zeros(T, C).double(), torch.ones(T, C).double()
        y = task_batch_norm(
            x, weight, bias, *statistics, num_tasks=T, task_of_sample=index, training=training, activation="relu"
        )
        dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), dy)
        assert dx.isfinite().all()
        assert not dweight[1:].any()
        assert not dbias[1:].any()
        assert dweight[0].any()


def test_first_and_second_derivatives() -> None:
    index = torch.tensor([1, 0, 1, 3, 0])
    torch.manual_seed(0)
    tensors = [torch.randn(*shape).double().requires_grad_() for shape in ((5, 2, 3), (T, 2), (T, 2), (5, 2, 3))]
    for training in (True, False):
        statistics = torch.randn(T, 2).double(), torch.rand(T, 2).double() + 0.5

        def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
            return task_batch_norm(
                x,
                weight,
                bias,
                *(vector.clone() for vector in statistics),  # noqa: B023
                residual,
                num_tasks=T,
                task_of_sample=index,
                training=training,  # noqa: B023
                activation="silu",
            )

        assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transforms_round_gradients_of_half_parameters_once(dtype: torch.dtype) -> None:
    x, weight, bias, _, dy = operands(torch.arange(T).repeat(200), (), dtype)
    index, weight, bias = torch.arange(T).repeat(200), weight.bfloat16(), bias.bfloat16()

    def gradients(x: Tensor, *vectors: Tensor) -> Any:
        def call(*vectors: Tensor) -> Tensor:
            return task_batch_norm(x, *vectors, num_tasks=T, task_of_sample=index)

        return torch.func.vjp(call, *vectors)[1](dy.to(x))

    exact = gradients(x.double(), weight.double(), bias.double())
    for got, wanted in zip(gradients(x, weight, bias), exact, strict=True):
        assert_within(got, wanted, Tolerance(1e-4, 1), scale=1.0)


@pytest.mark.parametrize("compute", [COMPUTES["operators"], COMPUTES["parts"]], ids=["operators", "parts"])
def test_no_order_of_the_samples_changes_a_bit(compute: MixedBackend) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for index in mixes():
            for spatial in ((6, 5), (3,)):
                x, weight, bias, residual, dy = operands(index, spatial, dtype)
                options = Options(T, 1e-5, "sigmoid", "task_major", "silu")
                results = []
                order = torch.randperm(len(index))
                for rows in (torch.arange(len(index)), order):
                    of_rows = [tensor[rows] for tensor in (x, residual, dy)]
                    found = compute.mixed_forward_training(of_rows[0], index[rows], weight, bias, of_rows[1], options)
                    saved = Saved(of_rows[0], weight, bias, of_rows[1], found.mean, found.var)
                    gradients = compute.mixed_backward(of_rows[2], saved, index[rows], True, ALL, options)
                    results.append((*found, *gradients))
                for here, there in zip(*results, strict=True):
                    assert_same_bits(here[order] if len(here) == len(index) and here.dim() == x.dim() else here, there)


@pytest.mark.parametrize("spatial", [(), (3,), (2, 2)])
def test_no_order_changes_a_bit_of_samples_that_are_alike(spatial: tuple[int, ...]) -> None:
    """They differ in their last channel alone, or in the gradient, or in the residual."""
    pairs = torch.randint(T, (20,))
    index = torch.cat([pairs, pairs])
    x, weight, bias, residual, dy = operands(index, spatial, torch.float32, memory_format="channels_last")
    x[:, :-1] = 1.0
    x[20:] = x[:20]
    dy[20:30], residual[30:] = dy[:10], residual[10:20]
    for memory_format in FORMATS:
        operators, options = eager_operators(None), Options(T, 1e-5, "sigmoid", "task_major", "silu")
        results = []
        for order in (torch.arange(40), torch.randperm(40), torch.arange(39, -1, -1)):
            of_rows = [in_memory_format(tensor[order], "task_major", memory_format) for tensor in (x, residual, dy)]
            found = operators.mixed_forward_training(of_rows[0], index[order], weight, bias, of_rows[1], options)
            saved = Saved(of_rows[0], weight, bias, of_rows[1], found.mean, found.var)
            _, *gradients = operators.mixed_backward(of_rows[2], saved, index[order], True, ALL, options)
            results.append((found.mean, found.var, *gradients[:2]))
        for one in results[1:]:
            for here, there in zip(results[0], one, strict=True):
                assert here is not None
                assert there is not None
                assert_same_bits(here, there)


def test_an_index_that_is_a_view() -> None:
    for index in mixes():
        x, weight, bias, *_ = operands(index, (3,))
        view = torch.stack([index, index.roll(1)], 1)[:, 0]
        found, expected = (
            task_batch_norm(x, weight, bias, num_tasks=T, task_of_sample=given) for given in (view, index)
        )
        assert_same_bits(found, expected)


def test_exact_sums() -> None:
    index = torch.randint(3, (50,))
    values = torch.randn(50, 2).double() * 10.0 ** torch.randint(-20, 20, (50, 1)).double()
    sums = exact_task_sums(values, index, 4)
    expected = reference.task_sums(values, index, 4)
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=0)
    order = torch.randperm(50)
    assert_same_bits(exact_task_sums(values[order], index[order], 4), sums)
    values[0, 0], values[1, 1] = float("nan"), float("inf")
    sums = exact_task_sums(values, index, 4)
    assert sums.isnan().nonzero().tolist() == sorted([[int(index[0]), 0], [int(index[1]), 1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    index = torch.tensor([1, 0, 1, 1])
    torch.manual_seed(0)
    x, residual, dy = (torch.randn(4, C, 2, 3).to(dtype) for _ in range(3))
    weight, mean = (torch.randn(T, C, requires_grad=need) for need in (True, False))
    ops, how = torch.ops.tsbn, (1e-5, "sigmoid", "silu")
    for bias, added in ((None, None), (torch.randn(T, C), residual)):
        torch.library.opcheck(ops.mixed_forward_training.default, (x, index, weight, bias, added, *how))
        saved = x, index, weight, bias, added, mean, mean.square()
        torch.library.opcheck(ops.mixed_forward_eval.default, (*saved, *how))
        for needs in ((True,) * 4, (False, True, True, False)):
            saved = x, index, weight.detach(), bias, added, mean, mean.square()
            torch.library.opcheck(ops.mixed_backward.default, (dy, *saved, *how, 0.0, True, *needs))


def test_empty_batches() -> None:
    for shape in ((0, C, 3), (2, C, 0)):
        x = torch.randn(shape, requires_grad=True)
        weight = torch.randn(T, C, requires_grad=True)
        mean, var = torch.zeros(T, C), torch.ones(T, C)
        for training in (True, False):
            y = task_batch_norm(
                x,
                weight,
                None,
                mean,
                var,
                num_tasks=T,
                task_of_sample=torch.zeros(shape[0], dtype=torch.int64),
                training=training,
            )
            y.backward(torch.randn(shape))
            assert y.shape == shape
            assert weight.grad is not None
            assert not weight.grad.any()
        assert not mean.any()
        assert bool((var == 1).all())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"task_of_sample": torch.tensor([0, 4, 1])}, ValueError, "got 4 for sample 1"),
        ({"task_of_sample": torch.tensor([0, 1, -1])}, ValueError, "got -1 for sample 2"),
        ({"task_of_sample": torch.tensor([0, 1])}, ValueError, r"task_of_sample must have shape \[N\]"),
        ({"task_of_sample": torch.tensor([0, 1, 1]).int()}, TypeError, r"convert it with .long\(\)"),
        ({"task_of_sample": [0, 1, 1]}, TypeError, "task_of_sample must be a tensor, got list"),
        ({"fan_out": True}, ValueError, "takes no fan_out"),
        ({"stacking": "sample_major"}, ValueError, "takes no stacking"),
        ({"recover_input": True}, ValueError, "takes no recover_input"),
        ({"residual": torch.zeros(3, C)}, ValueError, "residual must have the shape of the output"),
        ({"x": torch.zeros(3, C)}, ValueError, "one sample of task 0"),
        ({"weight": torch.zeros(3, C)}, ValueError, "weight must have shape"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.randn(3, C, 2),
        "weight": torch.randn(T, C),
        "num_tasks": T,
        "task_of_sample": torch.tensor([0, 1, 1]),
        **change,
    }
    with pytest.raises(error, match=message):
        task_batch_norm(**arguments)


def test_one_value_is_evaluated_whatever_other_tasks_hold() -> None:
    """Running statistics that are not read, of a task with more values or none, reach no output and no gradient."""
    index = torch.tensor([0, 1, 0, 3, 0, 3])  # task 1 has one value
    x, weight, bias, _, dy = operands(index, ())
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    options: Any = {"num_tasks": T, "task_of_sample": index, "evaluate_single": True}
    results = []
    for other in (1.0, float("nan"), float("inf"), -1.0):
        statistics = [torch.full((T, C), other).double().index_fill(0, torch.tensor(1), 2.0) for _ in range(2)]
        y = task_batch_norm(*inputs, *statistics, **options)
        results.append((y, *torch.autograd.grad(y, inputs, dy)))
    for found in results[1:]:
        for one, wanted in zip(found, results[0], strict=True):
            assert_same_bits(one, wanted)
    mean = torch.zeros(T, C).double()
    with pytest.raises(ValueError, match="needs running_mean and running_var"):
        task_batch_norm(*inputs, mean, None, **options)
    assert not mean.any()


def test_one_value_per_channel_is_no_error_of_a_task_with_more() -> None:
    x, index = torch.randn(5, C), torch.tensor([1, 3, 1, 3, 3])
    y = task_batch_norm(x, torch.zeros(T, C), num_tasks=T, task_of_sample=index)
    torch.testing.assert_close(y, masked_loop(x, index, torch.full((T, C), 0.5), None))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("counts", [(0, 28, 2, 2), (9, 8, 7, 8), (0, 0, 0, 32)])
def test_no_number_of_threads_changes_a_bit(counts: tuple[int, ...], memory_format: str) -> None:
    """Of batches that are worth several threads; one task has most samples, all, or none."""
    index = torch.repeat_interleave(torch.arange(T), torch.tensor(counts))[torch.randperm(32)]
    x, weight, bias, residual, dy = operands(index, (48, 50), torch.float32, memory_format=memory_format)
    options = Options(T, 1e-5, "sigmoid", "task_major", "gelu")
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            compute = eager_operators(None)
            found = compute.mixed_forward_training(x, index, weight, bias, residual, options)
            saved = Saved(x, weight, bias, residual, found.mean, found.var)
            results.append((*found, *compute.mixed_backward(dy, saved, index, True, ALL, options)))
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)
    wide = [tensor.double() for tensor in (x, weight, bias, residual)]
    exact = reference.mixed_forward_training(wide[0], index, *wide[1:], options)
    expected = reference.mixed_backward(dy.double(), Saved(*wide, *exact[1:]), index, True, ALL, options)
    for got, wanted in zip(results[0], (*exact, *expected), strict=True):
        assert wanted is not None
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


def test_joined_means_of_a_large_batch_keep_their_digits() -> None:
    """Integers have room for a sum of a million values, and so few bits for each: what they lose is added up again."""
    mean = 1 + 1e-3 * torch.rand(1 << 20, 1, dtype=torch.float64)
    index = torch.zeros(len(mean), dtype=torch.int64)
    found = joined(Moments(mean, torch.zeros_like(mean)), index, torch.tensor([len(mean)]))
    exact = math.fsum(mean.flatten().tolist()) / len(mean)
    assert abs(found.mean.item() - exact) <= 1e-15
    torch.testing.assert_close(found.var.item(), (mean - exact).square().mean().item(), rtol=1e-9, atol=0)
