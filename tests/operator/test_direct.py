"""Calls that go past the dispatcher, and those that must not: CPU tensors are taken for a GPU's, in the interpreter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from support.interpreter import device, interpreted

from benchmarks.hot_paths.host_cost import NORMALIZATIONS, taken_for_a_gpu
from tsbn_kernels import FusedTSigmaBN2d, FusedTSigmaLN, functional, recompute_outputs, use_backend
from tsbn_kernels.backends import triton

T, N, C = 3, 2, 5
INDEX = torch.tensor([2, 0, 2, 0, 0, 2])


class Nothing:
    """Operators that must not be called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, operator: str) -> Any:
        raise AssertionError(f"{self._name} {operator}")


@contextmanager
def gpu(refused: str) -> Iterator[None]:
    """Takes CPU tensors for those of a GPU; ``refused`` is the way that no call may take, "direct" or "dispatched"."""
    with ExitStack() as stack:
        stack.enter_context(interpreted(device(threads=64)))
        stack.enter_context(taken_for_a_gpu())
        for one in NORMALIZATIONS:
            if refused == "direct":
                stack.enter_context(mock.patch.dict(one.direct, {"CPU": Nothing("direct")}))
            if refused == "dispatched":
                stack.enter_context(mock.patch.object(one, "dispatched", Nothing("dispatched")))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("error", UserWarning)  # of kernels that do not run
        yield


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).requires_grad_()


def stacked() -> tuple[Tensor, Tensor]:
    return leaf(T * N, C, 3, 3), leaf(T, C)


def batch_normalized(**options: Any) -> list[Tensor]:
    x, weight = stacked()
    mean, var = torch.zeros(T, C), torch.ones(T, C)
    given = [mean, var] if options.get("running") else []
    options.pop("running", None)
    y = functional.task_batch_norm(x, weight, leaf(T, C), *given, num_tasks=T, **options)
    return [y, *torch.autograd.grad(y, (x, weight), torch.ones_like(y).cumsum(0)), *given]


def streamed() -> list[Tensor]:
    x, weight = stacked()
    ys = functional.task_streams(x, weight, num_tasks=T)
    return [*ys, *torch.autograd.grad([ys[0], ys[2]], (x, weight), [torch.ones_like(ys[0]).cumsum(0)] * 2)]


def evaluated() -> list[Tensor]:
    layer = FusedTSigmaBN2d(T, C).eval()
    x, _ = stacked()
    y = layer(x)
    return [y, *torch.autograd.grad(y, (x, layer.weight), torch.ones_like(y).cumsum(1))]


def rows(**options: Any) -> list[Tensor]:
    x, weight = leaf(T * N, 3, C), leaf(T, C)
    y = functional.task_layer_norm(x, weight, num_tasks=T, **options)
    return [y, *torch.autograd.grad(y, (x, weight), torch.ones_like(y).cumsum(0))]


def streams_of_rows() -> list[Tensor]:
    x, layer = leaf(T * N, 3, C), FusedTSigmaLN(T, C)
    ys = layer.streams(x)
    return [*ys, *torch.autograd.grad(ys[1], (x, layer.weight), torch.ones_like(ys[1]).cumsum(0))]


def recomputed() -> list[Tensor]:
    x, weight = stacked()
    with recompute_outputs():
        y = functional.task_batch_norm(x, weight, num_tasks=T, activation="relu")
        z = (y * y).sum(dim=(2, 3))
    return [z, *torch.autograd.grad(z, (x, weight), torch.ones_like(z).cumsum(0))]


CALLS: dict[str, Callable[[], list[Tensor]]] = {
    "a batch": batch_normalized,
    "running statistics": lambda: batch_normalized(running=True, activation="silu"),
    "samples of any task": lambda: batch_normalized(running=True, task_of_sample=INDEX),
    "an evaluation": evaluated,
    "streams": streamed,
    "rows": rows,
    "rows of any task": lambda: rows(task_of_sample=INDEX),
    "streams of rows": streams_of_rows,
    "outputs that are computed again": recomputed,
}


@pytest.mark.parametrize("name", CALLS)
def test_plain_calls_need_no_dispatcher(name: str) -> None:
    with use_backend("reference"):
        wanted = CALLS[name]()
    with gpu(refused="dispatched"):
        found = CALLS[name]()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# ---- what the dispatcher is needed for -------------------------------------------------------------------------------


class Watching(TorchDispatchMode):
    """A mode that sees every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(function._schema.name)
        return function(*args, **(kwargs or {}))


class Wrapped(Tensor):
    """A tensor that stands for another one."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made: Wrapped = Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(tree: Any) -> Any:
            return torch.utils._pytree.tree_map(lambda t: t.inner if isinstance(t, Wrapped) else t, tree)

        return function(*plain(args), **plain(kwargs or {}))


def negated(like: Tensor) -> Tensor:
    """A view that PyTorch marks as negated, of the values of a tensor."""
    view: Tensor = torch._neg_view(-like)
    return view


def watched() -> list[Tensor]:
    with Watching() as mode:
        found = batch_normalized()
    assert {"tsbn::forward_training", "tsbn::backward"} <= set(mode.seen)
    return found


def profiled() -> list[Tensor]:
    with torch.autograd.profiler.profile() as profile:
        found = batch_normalized()
    assert {"tsbn::forward_training", "tsbn::backward"} <= {event.name for event in profile.function_events}
    return found


def of_negated() -> list[Tensor]:
    x, weight = stacked()
    return [functional.task_batch_norm(negated(x.detach()), weight, num_tasks=T).detach()]


def of_a_wrapped_weight() -> list[Tensor]:
    x, weight = stacked()
    return [functional.task_batch_norm(x.detach(), Wrapped(weight.detach()), num_tasks=T).detach()]


def of_each_model() -> list[Tensor]:
    x, weight = stacked()
    both = torch.stack((weight, -weight)).detach()
    return [torch.vmap(lambda w: functional.task_batch_norm(x.detach(), w, num_tasks=T))(both)]


def in_a_graph() -> list[Tensor]:
    x, weight = stacked()
    compiled = torch.compile(functional.task_batch_norm, backend="aot_eager", fullgraph=True)
    return [compiled(x, weight, num_tasks=T).detach()]


WATCHED: dict[str, Callable[[], list[Tensor]]] = {
    "a mode": watched,
    "the profiler": profiled,
    "a negated view": of_negated,
    "a subclass": of_a_wrapped_weight,
    "vmap": of_each_model,
    "a compiler": in_a_graph,
}


@pytest.mark.parametrize("name", WATCHED)
def test_who_stands_between_is_asked(name: str) -> None:
    with use_backend("reference"):
        x, weight = stacked()
        wanted = {
            "a mode": batch_normalized,
            "the profiler": batch_normalized,
            "vmap": of_each_model,
        }.get(name, lambda: [functional.task_batch_norm(x, weight, num_tasks=T).detach()])()
    with gpu(refused="direct"):
        found = WATCHED[name]()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def of_signed(sign: Callable[[Tensor], Tensor], name: str) -> list[Tensor]:
    """A call whose tensors all go through ``sign``, and its gradients from one that does too."""
    index = {"task_of_sample": INDEX} if "any task" in name else {}
    x, dy = leaf(T * N, C, 3, 3).detach(), torch.ones(T * N, C, 3, 3).cumsum(0)
    vectors = [sign(leaf(T, size).detach()) for size in (C, C)]
    function: Any = functional.task_batch_norm
    if "rows" in name:
        x, dy, function = x.movedim(1, -1).contiguous(), dy.movedim(1, -1).contiguous(), functional.task_layer_norm
    elif name == "an evaluation":
        vectors += [sign(leaf(T, C).detach()), sign(leaf(T, C).detach().exp())]
        index["training"] = False
    leaves = [sign(x).requires_grad_(), *(vector.requires_grad_() for vector in vectors[:2])]
    y = function(*leaves, *vectors[2:], num_tasks=T, **index)
    return [y.detach(), *torch.autograd.grad(y, leaves, sign(dy))]


@pytest.mark.parametrize("name", ["a batch", "an evaluation", "samples of any task", "rows", "rows of any task"])
def test_a_chosen_backend_reads_negated_views(name: str) -> None:
    with use_backend("reference"):
        wanted = of_signed(Tensor.clone, name)
    with mock.patch.object(triton, "device_types", ("cpu",)), interpreted(device(threads=64)), use_backend("triton"):
        found = of_signed(negated, name)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["negated", "wrapped", "watched", "differentiable", "each of several", "compiled"])
def test_a_gradient_that_needs_the_dispatcher(kind: str) -> None:
    x, weight = stacked()
    dy = torch.ones(T * N, C, 3, 3).cumsum(0)
    with use_backend("reference"):
        y = functional.task_batch_norm(x, weight, num_tasks=T)
        wanted = torch.autograd.grad(y, (x, weight), dy)
    with gpu(refused="nothing"):
        y = functional.task_batch_norm(x, weight, num_tasks=T)
    with gpu(refused="direct"):
        if kind == "each of several":
            found = torch.autograd.grad(y, (x, weight), torch.stack((dy, dy)), is_grads_batched=True)
            found = found[0][1], found[1][0]
        elif kind == "compiled":
            with compiled_autograd._enable(torch.compile(backend="eager")):
                y.backward(dy)
            found = x.grad, weight.grad
        elif kind == "watched":
            with Watching() as mode:
                found = torch.autograd.grad(y, (x, weight), dy)
            assert "tsbn::backward" in mode.seen
        else:
            given = {"negated": negated, "wrapped": Wrapped}.get(kind, Tensor.clone)(dy)
            found = torch.autograd.grad(y, (x, weight), given, create_graph=kind == "differentiable")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
