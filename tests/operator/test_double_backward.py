"""The second derivative: its operators, what they serve under ``create_graph=True``, and the memory that it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from support.backends import BACKENDS, instruction_sets, on_backend, threads
from support.problems import DTYPES, FORMATS, STACKINGS, fill_cache_with_nan, problem, stack
from support.tolerances import assert_same_bits
from support.twice import (
    assert_equals_definition,
    assert_layer_matches_definition,
    call_of,
    cut_out,
    layer_call,
    make_call,
)
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from tsbn_kernels import FusedTSigmaBN2d, FusedTSigmaLN, functional
from tsbn_kernels.backends import cpu
from tsbn_kernels.definition import batch_norm as reference
from tsbn_kernels.definition import layer_norm, mixed_batch_norm
from tsbn_kernels.definition.options import LayerOptions, Options
from tsbn_kernels.operator import double_backward, layer_ops

T, N, C, SPATIAL = 3, 4, 5, (6, 7)
Call = Callable[..., Tensor]


def by_autograd(call: Call, operands: Sequence[Tensor], dy: Tensor, seed: int = 1) -> list[Tensor]:
    """Gradients of the operands and of dy, of random gradients of all that a backward pass gives; then those again."""
    dy, *operands = (tensor.detach().clone().requires_grad_() for tensor in (dy, *operands))
    first = torch.autograd.grad(call(*operands), operands, dy, create_graph=True)
    generator = torch.Generator().manual_seed(seed)
    given = [torch.randn(t.shape, generator=generator, dtype=torch.float32).to(t) for t in first]
    return [*first, *torch.autograd.grad(first, (dy, *operands), given, materialize_grads=True)]


# Options of a call, of which the definition's are made; None of an activation: there is none.
CASES: list[dict[str, Any]] = [
    *({"stacking": stacking, "memory_format": f} for stacking in STACKINGS for f in FORMATS),
    *({"activation": name, "stacking": "sample_major"} for name in ("relu", "leaky_relu", "hardswish", "gelu_tanh")),
    {"gate": "identity", "memory_format": "channels_last", "activation": "silu"},
    {"training": False},
    {"training": False, "gate": "identity", "activation": "gelu", "memory_format": "channels_last"},
    {"fan_out": True, "stacking": "sample_major"},
    {"fan_out": True, "activation": "silu", "memory_format": "channels_last"},
    {"fan_out": True, "training": False, "stacking": "task_axis", "activation": "relu6"},
    {"mixed": True},
    {"mixed": True, "activation": "silu", "training": False},
    {"mixed": True, "activation": "relu", "memory_format": "channels_last"},
    *({"backend": "triton", "memory_format": f, "activation": "silu"} for f in FORMATS),
    {"backend": "triton", "training": False, "gate": "identity"},
    {"backend": "triton", "fan_out": True, "activation": "relu"},
    {"backend": "triton", "mixed": True, "activation": "relu"},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_that_of_the_definition_through_autograd(case: dict[str, Any]) -> None:
    """In float64 to 1e-10, with a learned bias, and with a residual where an activation follows."""
    case = {"training": True, "activation": None, "fan_out": False, "mixed": False, "backend": "native"} | case
    if case["backend"] not in BACKENDS:
        pytest.skip("Triton is not installed")
    named = {name: case[name] for name in ("stacking", "memory_format", "gate") if name in case}
    p = problem(T, N, C, SPATIAL, dtype=torch.float64, **named)
    assert p.bias is not None
    x = p.x if not case["fan_out"] else (p.x[0] if p.stacking == "task_axis" else p.x[:N])
    index = torch.tensor([1, 0, 1, 1, 0, 1, 0, 1, 1, 1, 0, 0])  # the last task has no sample
    statistics = torch.randn(T, C).double(), torch.rand(T, C).double() + 0.5
    options = Options(T, p.eps, p.gate, p.stacking, case["activation"] or "none", 0.2, case["fan_out"])
    given = (None, None) if case["training"] else statistics

    def ours(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        of_tasks = {"task_of_sample": index} if case["mixed"] else {"fan_out": case["fan_out"], "stacking": p.stacking}
        epilogue = {"activation": case["activation"], "negative_slope": 0.2}
        settings = {"num_tasks": T, "training": case["training"], "gate": p.gate, **epilogue, **of_tasks}
        return functional.task_batch_norm(x, weight, bias, *given, residual, **settings)

    def definition(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        if case["mixed"]:
            found = statistics
            if case["training"]:
                found = mixed_batch_norm.mixed_statistics(x, index, T)
            saved = reference.Saved(x, weight, bias, residual, *found)
            return mixed_batch_norm.mixed_forward_eval(saved, index, options)
        found = reference.statistics(x, options) if case["training"] else statistics
        return reference.forward_eval(reference.Saved(x, weight, bias, residual, *found), options)

    operands = x, p.weight, p.bias, torch.randn_like(p.dy)
    with on_backend(case["backend"]):
        found = by_autograd(ours, operands, p.dy)
    for got, wanted in zip(found, by_autograd(definition, operands, p.dy), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_streams_whose_tasks_take_turns() -> None:
    """Of tasks that no gradient comes from the second derivative is zero."""
    layer = FusedTSigmaBN2d(T, C, activation="silu").double()
    x = torch.randn(T * N, C, 3, 3, dtype=torch.float64)
    dy = torch.randn(2 * N, C, 3, 3, dtype=torch.float64)
    found = by_autograd(lambda x: torch.cat(layer.streams(x)[1:]), [x], dy)
    expected = by_autograd(lambda x: layer(x)[N:], [x], dy)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_the_first_derivative_is_that_of_the_kernels() -> None:
    p = problem(dtype=torch.bfloat16)
    operands = [t.requires_grad_() for t in (p.x, p.weight, p.bias) if t is not None]
    y = functional.task_batch_norm(*operands, num_tasks=p.num_tasks, activation="gelu")
    plain = torch.autograd.grad(y, operands, p.dy, retain_graph=True)
    for got, wanted in zip(torch.autograd.grad(y, operands, p.dy, create_graph=True), plain, strict=True):
        assert_same_bits(got.detach(), wanted)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_third_derivative(activation: str | None) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(*shape).double().requires_grad_() for shape in ((4, 2, 2), (2, 2), (2, 2), (4, 2, 2))]

    def slopes(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        y = functional.task_batch_norm(x, weight, bias, num_tasks=2, activation=activation)
        return torch.autograd.grad(y, (x, weight), dy, create_graph=True)

    assert torch.autograd.gradgradcheck(slopes, tensors, fast_mode=True)


# ---- the operators ---------------------------------------------------------------------------------------------------


# T, N, C, spatial: tails of every vector width, several blocks and chunks, and many groups.
SIZES = [(1, 1, 1, (2,)), (3, 7, 13, ()), (2, 3, 65, (7,)), (3, 2, 5, (31, 33)), (1, 2, 2, (4099,)), (1, 130, 17, (9,))]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernels(size: tuple[int, int, int, tuple[int, ...]], memory_format: str, dtype: torch.dtype) -> None:
    """Every instruction set, within the tolerances of the layer; no value is left out or written twice."""
    call = make_call(*size, dtype=dtype, memory_format=memory_format, stacking="sample_major")
    fill_cache_with_nan(call.x)
    for name in instruction_sets():
        cpu.set_instruction_set(name)
        try:
            assert_equals_definition(call, torch.ops.tsbn)
            assert [gradient.stride() for gradient in call.gradients(torch.ops.tsbn)] == [call.x.stride()] * 2
        finally:
            cpu.set_instruction_set("")


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("memory_format", FORMATS)
def test_operands_that_lie_apart(memory_format: str) -> None:
    for stacking in STACKINGS:
        call = make_call(3, 4, 5, (3, 3), memory_format=memory_format, stacking=stacking)
        assert_equals_definition(cut_out(call), torch.ops.tsbn)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("memory_format", FORMATS)
def test_results_that_are_written_past_the_caches(memory_format: str) -> None:
    """Large ones, whose rows begin anywhere in a cache line."""
    assert_equals_definition(make_call(2, 4, 64, (57, 73), memory_format=memory_format), torch.ops.tsbn)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("memory_format", FORMATS)
def test_same_bits_for_every_number_of_threads(memory_format: str) -> None:
    call = make_call(2, 16, 4, (60, 60), dtype=torch.bfloat16, memory_format=memory_format)
    assert_equals_definition(call, torch.ops.tsbn)  # several blocks in a chunk, several chunks in a group
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append((call.sums(torch.ops.tsbn), *call.gradients(torch.ops.tsbn)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("stacking", STACKINGS)
def test_opcheck(stacking: str) -> None:
    for memory_format in FORMATS:
        *read, factors, num_tasks, stacking = make_call(2, 2, 3, (2, 2), stacking=stacking, memory_format=memory_format)
        torch.library.opcheck(torch.ops.tsbn.double_backward_sums.default, (*read, num_tasks, stacking))
        torch.library.opcheck(torch.ops.tsbn.double_backward.default, (*read, factors, num_tasks, stacking))


@pytest.mark.usefixtures("native")
def test_errors_say_what_was_expected() -> None:
    call = call_of(problem())
    for factors in (call.factors[:6], call.factors.double(), call.factors.mT.contiguous().mT, call.factors[:, 1:]):
        with pytest.raises(RuntimeError, match=r"factors must be contiguous.* of shape \[7, 3, 5\]"):
            call._replace(factors=factors).gradients(torch.ops.tsbn)
    with pytest.raises(RuntimeError, match="ddx must have the shape of y"):
        call._replace(ddx=call.ddx[1:]).sums(torch.ops.tsbn)
    with pytest.raises(RuntimeError, match=r"mean must have shape \[3, 5\]"):
        call._replace(mean=call.mean[1:]).sums(torch.ops.tsbn)
    torch.full((5, 3, 5), torch.nan, dtype=torch.float64)  # memory of which what is not written is seen
    empty = call._replace(ddx=call.ddx[:0], dy=call.dy[:0], x=call.x[:0])
    assert torch.equal(empty.sums(torch.ops.tsbn), torch.zeros(5, 3, 5, dtype=torch.float64))


# ---- parts and memory ------------------------------------------------------------------------------------------------


def test_curvature_of_parts_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(1, 1e-5, "sigmoid", "task_major", "gelu")
    ddz, dy, z = torch.randn(3, 7, 5, 3, dtype=torch.bfloat16).unbind()
    whole = double_backward.through_curvature(ddz, dy, z.clone(), options)
    monkeypatch.setattr(double_backward, "_CHUNK", 32)
    assert torch.equal(double_backward.through_curvature(ddz, dy, z.clone(), options), whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fan_out", [False, True])
@pytest.mark.parametrize("stacking", STACKINGS)
def test_layer_norm_is_that_of_the_definition(
    stacking: str, fan_out: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton":
        from tsbn_kernels.backends.triton import ops as triton_ops

        monkeypatch.setattr(layer_ops.layer_norm, "dispatched", layer_ops.operators("triton"))
    shape = (N, 2, 5) if fan_out else (T, N, 2, 5)
    x, residual = torch.randn(2, *shape, dtype=torch.float64)
    x, residual = (t if fan_out else stack(t, stacking) for t in (x, residual))
    dy = stack(torch.randn(T, N, 2, 5, dtype=torch.float64), stacking)
    weight, bias = torch.randn(2, T, 5, dtype=torch.float64)
    for rms in (False, True):
        options = LayerOptions(T, 1e-5, "sigmoid", stacking, rms, fan_out)
        operands = (x, residual, weight) if rms else (x, residual, weight, bias)

        def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            y, s = functional.normalize_rows((x, weight, bias, residual), tuple(options))  # noqa: B023
            return y if fan_out else y + s

        def definition(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            y, s, *_ = layer_norm.layer_norm(x, weight, bias, residual, options)  # noqa: B023
            assert s is not None
            return y if fan_out else y + s

        with on_backend(backend):
            found = by_autograd(ours, operands, dy)
            if backend == "triton":
                assert any("layer_norm_double_backward" in key for key in triton_ops.backwards)
        for got, wanted in zip(found, by_autograd(definition, operands, dy), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


LAYER_SIZES = [((4,), (1,)), ((3, 5), (5,)), ((2, 3), (16,)), ((3,), (2, 33)), ((1,), (1500,)), ((150,), (500,))]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", LAYER_SIZES, ids=str)
def test_layer_norm_kernels(size: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype) -> None:
    """Every instruction set, stacking and form, on one thread and on three."""
    torch.manual_seed(0)
    for stacking, (rms, fan_out) in product(STACKINGS, ((False, False), (True, False), (False, True))):
        options = LayerOptions(T, 1e-5, "identity", stacking, rms, fan_out)
        call = layer_call(size, dtype, options)
        results = []
        for name in instruction_sets():
            cpu.set_instruction_set(name)
            try:
                results.append(layer_ops.operators(None).layer_norm_double_backward(*call))
            finally:
                cpu.set_instruction_set("")
        with threads(3):
            parallel = layer_ops.operators(None).layer_norm_double_backward(*call)
        for a, b in zip(parallel, results[0], strict=True):
            assert_same_bits(a, b)
        for found in results:
            assert_layer_matches_definition(found, call)


def test_layer_norm_opcheck() -> None:
    for stacking, rms, fan_out in (("task_major", False, False), ("sample_major", True, True)):
        options = LayerOptions(T, 1e-5, "identity", stacking, rms, fan_out)
        ddx, dy, (s, weight, mean, rstd), factors, _ = layer_call(((2, 3), (5,)), torch.float32, options)
        mean = rstd.new_empty(0) if mean is None else mean
        call = ddx, dy, s, weight, mean, rstd, factors, stacking, rms, fan_out
        torch.library.opcheck(torch.ops.tsbn.layer_norm_double_backward.default, call)


@pytest.mark.usefixtures("native")
def test_layer_norm_errors_say_what_was_expected() -> None:
    options = LayerOptions(T, 1e-5, "identity", "task_major")
    ddx, dy, saved, factors, _ = layer_call(((2, 3), (5,)), torch.float32, options)
    run = layer_ops.operators(None).layer_norm_double_backward
    for wrong in (factors[:2], factors.double(), factors.mT.contiguous().mT, factors.flatten(1)):
        with pytest.raises(RuntimeError, match=r"factors must be contiguous.* of shape \[3, \*weight.shape\]"):
            run(ddx, dy, saved, wrong, options)
    with pytest.raises(RuntimeError, match="ddx has the wrong dtype or number of elements"):
        run(ddx[1:], dy, saved, factors, options)
    empty = saved._replace(s=saved.s[:0], mean=None, rstd=saved.rstd[:0])
    *_, sums = run(ddx[:0], dy[:0], empty, factors, options._replace(rms=True))
    assert torch.equal(sums, torch.zeros(2, *saved.weight.shape, dtype=torch.float64))


class Peak(TorchDispatchMode):
    """The most bytes at a time of what operators allocate meanwhile, as far as it is as large as ``least``."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self._least, self._alive, self.bytes = least, dict[int, tuple[StorageWeakRef, int]](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() >= self._least:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in given:
                    self._alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: value for key, value in self._alive.items() if not value[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self._alive.values()))
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("layer", "temporaries"),
    [
        (lambda: FusedTSigmaBN2d(T, 16), 0),
        (lambda: FusedTSigmaBN2d(T, 16, activation="relu"), 2),
        (lambda: FusedTSigmaBN2d(T, 16, activation="silu"), 3),
        (lambda: FusedTSigmaLN(T, 32), 0),
    ],
    ids=["batch norm", "ReLU", "SiLU", "layer norm"],
)
def test_temporaries(layer: Callable[[], torch.nn.Module], temporaries: int, dtype: torch.dtype) -> None:
    """Beside the gradients of dy and x there are so many tensors of x's size at a time."""
    x, dy, ddx = torch.randn(3, T * 32, 16, 32, 32).to(dtype).unbind()
    x, dy, module = x.requires_grad_(), dy.requires_grad_(), layer()
    (dx,) = torch.autograd.grad(module(x), x, dy, create_graph=True)
    with Peak(x.nbytes // 8) as peak:
        torch.autograd.grad(dx, (x, dy), ddx)
    assert 2 * x.nbytes <= peak.bytes <= (2 + temporaries) * x.nbytes


def test_the_graph_of_the_first_derivative_keeps_no_more_than_its_operands() -> None:
    x, dy = (torch.randn(T * N, C, 8, 8, requires_grad=True) for _ in range(2))
    y = FusedTSigmaBN2d(T, C, activation="silu")(x)
    saved: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() >= x.numel():
            saved.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        torch.autograd.grad(y, x, dy, create_graph=True)
    assert saved <= {x.data_ptr(), dy.data_ptr()}
