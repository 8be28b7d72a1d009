"""Layer normalisation of mixed batches: a task index for each sample, against a loop over masks and the definition."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from support.backends import instruction_sets, threads
from support.layer_problems import LayerResults
from support.mixed import T, mixes
from support.mixed_layer import SHAPES, call_of, check
from support.problems import DTYPES
from support.tolerances import assert_same_bits
from torch import Tensor
from torch.nn import functional

from tsbn_kernels import functional as ours
from tsbn_kernels import use_backend
from tsbn_kernels.backends import backends, cpu
from tsbn_kernels.definition import mixed_layer_norm as reference
from tsbn_kernels.definition.options import MixedLayerBackend
from tsbn_kernels.operator import mixed_layer_ops
from tsbn_kernels.operator.mixed_layer_ops import eager_operators

BACKENDS = [backend.name for backend in backends() if backend.available and backend.runs_on("cpu")]
GATHERED = mixed_layer_ops.mixed_layer_norm._general


@pytest.fixture
def all_instruction_sets() -> Iterator[list[str]]:
    yield list(instruction_sets())
    cpu.set_instruction_set("")


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_loop_over_masks(backend: str) -> None:
    for index in mixes():
        for tokens, shape in SHAPES:
            x, residual, dy, ds = (torch.randn(len(index), *tokens, *shape).double() for _ in range(4))
            weight, bias = (torch.randn(T, *shape).double() for _ in range(2))
            inputs = [tensor.requires_grad_() for tensor in (x, residual, weight, bias)]
            with use_backend(backend):
                outputs = ours.add_task_layer_norm(*inputs, num_tasks=T, task_of_sample=index)
                found = torch.autograd.grad(outputs, inputs, (dy, ds))
            added, y = x + residual, torch.zeros_like(x)
            for task in range(T):
                mask = (index == task).nonzero().flatten()
                normalized = functional.layer_norm(added[mask], shape, weight[task].sigmoid(), bias[task])
                y = y.index_copy(0, mask, normalized)
            expected = torch.autograd.grad((y, added), inputs, (dy, ds))
            for one, other in zip((*outputs, *found), (y, added, *expected), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_instruction_set(dtype: torch.dtype, rms: bool, all_instruction_sets: list[str]) -> None:
    index = list(mixes(1))[4]  # nearly all of one task
    for tokens, shape in SHAPES:
        call = call_of(index, tokens, shape, dtype, rms, "identity" if rms else "sigmoid")
        expected = call.in_double().run(reference)
        for name in all_instruction_sets:
            cpu.set_instruction_set(name)
            found = call.run(eager_operators(None))
            check(call, found, expected)
            assert not found.dweight[index.bincount(minlength=T) == 0].any()
        check(call, call.run(GATHERED), expected)


@pytest.mark.parametrize("compute", [eager_operators(None), GATHERED], ids=["operators", "gathered"])
def test_no_order_and_no_number_of_threads_changes_a_bit(compute: MixedLayerBackend) -> None:
    """Some samples of a task are equal in x, and differ in dy alone; some batches are work for several threads."""
    few = [(index, tokens, shape) for index in mixes() for tokens, shape in SHAPES[:4]]
    for index, tokens, shape in (*few, (torch.randint(T, (300,)), (), (130,))):
        for dtype in (torch.float32, torch.bfloat16):
            call = call_of(index, tokens, shape, dtype, rms=len(shape) > 1)
            call.x[::2] = call.x[0].clone() if len(index) else 0.0
            order = torch.randperm(len(index))
            with threads(4):
                here = call.run(compute)
            with threads(1):
                there = call.permuted(order).run(compute)
            for name, one, other in zip(LayerResults._fields, here, there, strict=True):
                if name in ("dweight", "dbias"):
                    assert_same_bits(one, other)
                elif one is not None:
                    assert_same_bits(one.view(len(index), -1)[order], other.view(len(index), -1))


def test_absent_tasks_may_hold_anything() -> None:
    """Their gates are not read, and their gradients are zero."""
    index = torch.tensor([2, 0, 2, 2, 0])
    weight, bias = (torch.randn(T, 37) for _ in range(2))
    weight[[1, 3]], bias[[1, 3]] = float("nan"), float("inf")
    inputs = [torch.randn(5, 37), weight, bias]
    y = ours.task_layer_norm(*(t.requires_grad_() for t in inputs), num_tasks=T, task_of_sample=index)
    assert y.isfinite().all()
    for gradient in torch.autograd.grad(y, inputs, torch.randn(5, 37))[1:]:
        assert gradient.isfinite().all()
        assert not gradient[[1, 3]].any()
        assert gradient[[0, 2]].all()


def test_nothing_is_gathered_on_the_cpu() -> None:
    """The kernels look up the gates of a sample's task, and add up its gradients."""
    index = torch.randint(T, (6,))
    inputs = [torch.randn(6, 37, requires_grad=True), torch.randn(T, 37, requires_grad=True)]
    with mock.patch("torch.Tensor.index_select", side_effect=AssertionError), torch.profiler.profile() as profile:
        y = ours.task_layer_norm(*inputs, num_tasks=T, task_of_sample=index)
        torch.autograd.grad(y, inputs, torch.randn(6, 37))
    called = {event.key for event in profile.key_averages()}
    assert {"tsbn::mixed_layer_norm", "tsbn::mixed_layer_norm_backward"} <= called
    assert not {"aten::index", "aten::index_select", "aten::index_put_", "aten::index_add"} & called


def test_opcheck() -> None:
    index, options = torch.tensor([1, 0, 1, 1]), (1e-5, "sigmoid")
    for dtype, rms in ((torch.float32, False), (torch.bfloat16, True)):
        call = call_of(index, (2,), (5,), dtype, rms)
        tensors = call.x, index, call.weight.requires_grad_(), call.bias, call.residual
        torch.library.opcheck(torch.ops.tsbn.mixed_layer_norm.default, (*tensors, *options, rms))
        weight, statistic = call.weight.detach(), torch.rand(8)
        tensors = call.dy, call.ds, call.x, index, weight, statistic[: 8 * (not rms)], statistic
        for needs in ((True, True, True), (False, True, False)):
            torch.library.opcheck(torch.ops.tsbn.mixed_layer_norm_backward.default, (*tensors, "sigmoid", rms, *needs))


def test_one_graph_for_all_mixes() -> None:
    weight, bias = (torch.randn(T, 5, requires_grad=True) for _ in range(2))

    def call(x: Tensor, index: Tensor) -> Tensor:
        return ours.task_layer_norm(x, weight, bias, num_tasks=T, task_of_sample=index)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for index in (torch.randint(T, (7,)), torch.full((9,), 2), torch.arange(8) % T):
        x, dy = torch.randn(len(index), 3, 5), torch.randn(len(index), 3, 5)
        for tensor in (x, index):
            torch._dynamo.mark_dynamic(tensor, 0)
        with torch._dynamo.config.patch(error_on_recompile=len(index) != 7):
            found, expected = (torch.autograd.grad(f(x, index), (weight, bias), dy) for f in (compiled, call))
        torch.testing.assert_close(found, expected)


def test_operands_must_fit() -> None:
    call = call_of(torch.tensor([1, 0]), (), (5,), torch.float32, rms=True)
    run = torch.ops.tsbn.mixed_layer_norm
    for index, message in (
        (torch.tensor([0, T]), f"sample 1 has task {T}, and there are {T} tasks"),
        (torch.tensor([0]), "must be int64 with a task for each sample"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(call.x, index, call.weight, None, None, 1e-5, "sigmoid")
