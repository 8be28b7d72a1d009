"""Running statistics, updated by the operator that computes those of the batch."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from support.problems import problem
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tsbn_kernels import FusedTSigmaBN1d, FusedTSigmaBN2d, backends, use_backend
from tsbn_kernels.definition import batch_norm as reference
from tsbn_kernels.definition.options import Options, Running
from tsbn_kernels.functional import task_batch_norm

T, N, C, S = 3, 4, 5, 6
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def given(dtype: torch.dtype, momentum: float | None, rows: bool) -> Running:
    """Statistics of two tasks more than there are where ``rows`` picks some."""
    size = T + 2 * rows, C
    mean, var = torch.randn(size).to(dtype), torch.rand(size).to(dtype)
    return Running(mean, var, torch.arange(2, 2 + size[0]), momentum, torch.tensor([4, 0, 3]) if rows else None)


def by_hand(running: Running, mean: Tensor, var: Tensor, values: int) -> list[Tensor]:
    """The statistics after an update, in float64 and one by one."""
    wanted = [v.double() if v.is_floating_point() else v.clone() for v in running[:3] if v is not None]
    for task in range(T):
        row = task if running.rows is None else int(running.rows[task])
        wanted[2][row] += 1
        share = 1 / int(wanted[2][row]) if running.momentum is None else float(running.momentum)
        for old, batch in ((wanted[0], mean), (wanted[1], var * values / (values - 1))):
            old[row] = (1 - share) * old[row] + share * batch[task].double()
    return wanted


@pytest.mark.parametrize("by", ["native", "reference"])
@pytest.mark.parametrize("momentum", [0.1, 0.75, 1.0, None])
@pytest.mark.parametrize("rows", [False, True])
def test_what_the_operator_updates(by: str, momentum: float | None, rows: bool) -> None:
    """In every dtype, for an x of each task's own and for one that they share."""
    run = torch.ops.tsbn.forward_tracked.default if by == "native" else None
    for dtype, x_dtype, shared in product(DTYPES, DTYPES, (False, True)):
        p = problem(T, N, C, (S,), dtype=x_dtype)
        x = p.x[:N] if shared else p.x
        running, options = given(dtype, momentum, rows), Options(*p.options, fan_out=shared)
        _, mean, var = reference.forward_training(x, p.weight, p.bias, None, options)
        wanted = by_hand(running, mean, var, N * S)
        if run is None:
            y, *_ = reference.forward_tracked(x, p.weight, p.bias, None, running, options)
        else:
            y, *_ = run(x, p.weight, p.bias, *running, *p.options, None, "none", 0.0, shared)
        torch.testing.assert_close(y, reference.forward_training(x, p.weight, p.bias, None, options).y)
        for got, exact in zip(running[:3], wanted, strict=True):
            assert got is not None
            rtol = max(torch.finfo(dtype).eps, 1e-12 if dtype == x_dtype == torch.float64 else 1e-5)
            torch.testing.assert_close(got, exact.to(got.dtype), rtol=rtol, atol=rtol)


@pytest.mark.parametrize(("momentum", "before"), [(0.999, 1e4), (0.001, 1e-6)])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_a_momentum_close_to_0_or_1_keeps_the_digits(
    momentum: float, before: float, dtype: torch.dtype, rtol: float
) -> None:
    """The native operator rounds what is left of the old value once; ``lerp``, which the reference calls, twice."""
    if not backends.cpu.available:
        pytest.skip("no native library")
    p, old = problem(T, N, C, (S,), dtype=torch.float32), torch.full((T, C), before, dtype=dtype)
    _, mean, _ = torch.ops.tsbn.forward_tracked(p.x, p.weight, p.bias, old, None, None, momentum, None, *p.options)
    exact = (1 - momentum) * before + momentum * mean.double()
    torch.testing.assert_close(old.double(), exact, rtol=rtol, atol=1e-4 * rtol)


def test_the_native_operator_is_there() -> None:
    if not backends.cpu.available:
        pytest.skip("no native library")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("tsbn::forward_tracked", "CPU")


def test_a_forward_pass_of_a_layer_is_one_operator() -> None:
    """Nothing else has an operator, whatever the momentum; but for the rows of some tasks, which are selected."""
    index = torch.tensor([1, 0, 2, 1, 2, 0, 2])
    calls: list[tuple[dict[str, Any], int, set[str]]] = [
        ({}, T * N, {"tsbn::forward_tracked"}),
        ({"tasks": torch.tensor([2, 0])}, 2 * N, {"tsbn::forward_tracked", "aten::index_select"}),
        ({"task_of_sample": index}, len(index), {"tsbn::mixed_forward_tracked"}),
    ]
    for momentum, (how, rows, expected) in product((0.1, None), calls):
        layer = FusedTSigmaBN1d(T, C, momentum=momentum)
        x = torch.randn(rows, C, requires_grad=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            layer(x, **how)
        names = {event.key for event in profile.key_averages() if event.key.startswith(("tsbn::", "aten::"))}
        assert not names & {"aten::lerp_", "aten::add_", "aten::mul", "aten::index_copy_", "aten::reciprocal"}
        assert expected <= names
        assert "tasks" in how or names == expected


@pytest.fixture(params=[0.1, None])
def layers(request: pytest.FixtureRequest) -> tuple[FusedTSigmaBN2d, list[nn.BatchNorm2d]]:
    """A layer, and the plain ones of its tasks."""
    layer = FusedTSigmaBN2d(T, C, momentum=request.param)
    return layer, [nn.BatchNorm2d(C, momentum=request.param) for _ in range(T)]


def assert_alike(layer: FusedTSigmaBN2d, plain: list[nn.BatchNorm2d]) -> None:
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(layer, name), torch.stack([getattr(one, name) for one in plain]))


def test_as_the_plain_layers(layers: tuple[FusedTSigmaBN2d, list[nn.BatchNorm2d]]) -> None:
    layer, plain = layers
    for tasks in (None, [2, 0], None, torch.tensor([1, 2, 0, 1])[::2], [1]):  # strided, too
        which = list(range(T)) if tasks is None else [int(task) for task in tasks]
        x = torch.randn(len(which) * N, C, 2, 2)
        layer(x, tasks=tasks)
        for task, part in zip(which, x.chunk(len(which)), strict=True):
            plain[task](part)
        assert_alike(layer, plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_repeated_pass_updates_nothing(layers: tuple[FusedTSigmaBN2d, list[nn.BatchNorm2d]], reentrant: bool) -> None:
    layer, plain = layers
    x = torch.randn(T * N, C, 2, 2, requires_grad=True)
    for _ in range(3):
        y = checkpoint(layer, x, use_reentrant=reentrant)
        y.backward(torch.randn_like(y))
        for one, part in zip(plain, x.chunk(T), strict=True):
            one(part)
    assert_alike(layer, plain)


def test_autograd_sees_the_change() -> None:
    """A pass in evaluation keeps the running statistics: its backward pass must not find others unawares."""
    p = problem(T, N, C, (S,))
    weight, mean, var = p.weight.requires_grad_(), torch.zeros(T, C), torch.ones(T, C)
    y = task_batch_norm(p.x, weight, None, mean, var, num_tasks=T, training=False)
    task_batch_norm(p.x, weight, None, mean, var, num_tasks=T)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(p.dy)


def test_what_the_operator_cannot_update_is_updated_beside_it() -> None:
    """Strided statistics, a momentum of each task's own, and a count of another dtype, by every backend."""
    p = problem(T, N, C, (S,))
    _, mean, var = reference.forward_training(p.x, p.weight, p.bias, None, Options(*p.options))
    unbiased = var * (N * S / (N * S - 1))
    for backend in ("cpu", "reference") if backends.cpu.available else ("reference",):
        momentum = torch.tensor([[0.1], [0.5], [0.9]])
        for old in (torch.zeros(C, T).t(), torch.zeros(T, C), torch.zeros(T, 2 * C)[:, ::2]):
            running_var = torch.ones(T, C)
            with use_backend(backend):
                task_batch_norm(p.x, p.weight, p.bias, old, running_var, num_tasks=T, momentum=momentum)
            torch.testing.assert_close(old, mean * momentum)
            torch.testing.assert_close(running_var, 1 + (unbiased - 1) * momentum)
            with use_backend(backend):
                task_batch_norm(p.x, p.weight, p.bias, old.zero_(), None, num_tasks=T, momentum=0.25)
            torch.testing.assert_close(old, mean / 4)
    layer = FusedTSigmaBN1d(T, C, momentum=None)
    layer.num_batches_tracked = torch.zeros(T, dtype=torch.int32)
    layer(p.x)
    torch.testing.assert_close(layer.running_mean, mean)
    assert layer.num_batches_tracked.tolist() == [1] * T


def test_a_cumulative_average_needs_the_number_of_batches() -> None:
    p = problem(T, N, C, (S,))
    with pytest.raises(TypeError, match="momentum must be a number, got None"):
        task_batch_norm(p.x, p.weight, None, torch.zeros(T, C), num_tasks=T, momentum=None)  # type: ignore[arg-type]


def test_an_empty_batch_is_counted() -> None:
    layer = FusedTSigmaBN1d(T, C)
    layer(torch.randn(0, C))
    assert layer.num_batches_tracked is not None
    assert layer.num_batches_tracked.tolist() == [1] * T
    torch.testing.assert_close(layer.running_mean, torch.zeros(T, C))


def test_a_call_that_is_refused_counts_nothing() -> None:
    layer = FusedTSigmaBN1d(T, C)
    with pytest.raises(ValueError, match="Expected more than 1 value"):
        layer(torch.randn(T, C))
    assert layer.num_batches_tracked is not None
    assert layer.num_batches_tracked.tolist() == [0] * T


_SHAPE = "must be contiguous \\[R, 5\\]"
_NUMBERS = "must be contiguous int64 of one dimension"
BAD: list[tuple[dict[str, Any], str]] = [
    ({"rows": torch.tensor([0, 1, T])}, "have 3 rows, and none is 3"),
    ({"rows": torch.tensor([0, -1, 2])}, "have 3 rows, and none is -1"),
    ({"rows": torch.tensor([0, 1])}, "there are 3 tasks and 2 rows"),
    ({"rows": torch.arange(T, dtype=torch.int32)}, f"rows {_NUMBERS}"),
    ({"rows": torch.arange(T).unsqueeze(1)}, f"rows {_NUMBERS}"),
    ({"rows": torch.arange(2 * T)[::2]}, f"rows {_NUMBERS}"),
    ({"batches": torch.zeros(2, dtype=torch.int64)}, "have 2 rows, and none is 2"),
    ({"batches": torch.zeros(T, dtype=torch.int32)}, f"batches {_NUMBERS}"),
    ({"batches": torch.zeros(T, 1, dtype=torch.int64)}, f"batches {_NUMBERS}"),
    ({"batches": torch.zeros(2 * T, dtype=torch.int64)[::2]}, f"batches {_NUMBERS}"),
    ({"batches": None, "momentum": None}, "the cumulative average needs the number of batches"),
    *(
        ({name: bad}, message)
        for name in ("mean", "var")
        for bad, message in (
            (torch.zeros(2, C), "have 2 rows, and none is 2"),
            (torch.zeros(T, C - 1), _SHAPE),
            (torch.zeros(T * C), _SHAPE),
            (torch.zeros(1, T, C), _SHAPE),
            (torch.zeros(C, T).t(), _SHAPE),
        )
    ),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_what_the_native_operator_refuses_changes_nothing(bad: dict[str, Any], message: str) -> None:
    p = problem(T, N, C, (S,))
    running = given(torch.float32, 0.1, rows=False)._replace(**bad)
    before = copy.deepcopy(running)
    with pytest.raises(RuntimeError, match=f"tsbn: .*{message}"):
        torch.ops.tsbn.forward_tracked(p.x, p.weight, p.bias, *running, *p.options)
    torch.testing.assert_close(running, before, rtol=0, atol=0)
