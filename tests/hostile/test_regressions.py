"""Defects of other packages, each with a test that would have found it here."""

from __future__ import annotations

import inspect
import mmap
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.graphs import GraphCounter
from support.problems import (
    DTYPES,
    FORMATS,
    assert_matches_definition,
    definition,
    fill_cache_with_nan,
    in_memory_format,
    problem,
    run,
)
from support.processes import ROOT, python_output
from support.tolerances import BACKWARD, FORWARD, STATISTICS, assert_relative, assert_within
from torch import Tensor, nn

from tsbn_kernels import (
    FusedTSigmaBN2d,
    backends,
)
from tsbn_kernels.functional import task_batch_norm

ops = torch.ops.tsbn


# ---- evaluation and training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", FORMATS)
def test_attorch_eval_backward_uses_the_running_statistics(memory_format: str, backend: str) -> None:
    """In attorch: the backward of evaluation read batch statistics that its forward had never stored."""
    layer = FusedTSigmaBN2d(3, 5, bias=True)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    layer.eval()
    p = problem(memory_format=memory_format)
    x = p.x.requires_grad_()
    got = torch.autograd.grad(layer(x), (x, *layer.parameters()), p.dy)
    for t in range(3):
        plain = layer.task(t)
        stream = x[4 * t : 4 * t + 4].detach().requires_grad_()
        dx, dscale, dbias = torch.autograd.grad(plain(stream), (stream, *plain.parameters()), p.dy[4 * t : 4 * t + 4])
        torch.testing.assert_close(got[0][4 * t : 4 * t + 4], dx)
        torch.testing.assert_close(got[1][t], dscale / 4, rtol=1e-5, atol=1e-5)  # the slope of sigmoid at 0
        torch.testing.assert_close(got[2][t], dbias, rtol=1e-5, atol=1e-5)


def test_flaggems_backward_knows_training_from_evaluation(backend: str) -> None:
    """FlagGems: ``train`` was ignored in the backward pass, which always gave the gradient of training."""
    p = problem()
    mean, var = ops.forward_training(p.x, p.weight, p.bias, *p.options)[1:]
    training, evaluation = (
        ops.backward(p.dy, p.x, p.weight, mean, var, *p.options, flag, True, True, True) for flag in (True, False)
    )
    scale = torch.sigmoid(p.weight) * torch.rsqrt(var + p.eps)
    expected = p.dy * scale.repeat_interleave(4, dim=0)[..., None, None]
    torch.testing.assert_close(evaluation[0], expected)
    assert (training[0] - evaluation[0]).abs().max() > 0.1
    assert torch.equal(training[1], evaluation[1])


def test_flaggems_input_survives_without_running_statistics(backend: str) -> None:
    """FlagGems: without running statistics x itself was taken for a buffer and overwritten."""
    layer = FusedTSigmaBN2d(3, 5, track_running_stats=False)
    p = problem()
    x = p.x.clone()
    layer(x)
    layer.eval()(x)
    assert torch.equal(x, p.x)


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_attorch_unbiased_variance_of_one_value(backend: str) -> None:
    """In attorch: n / (n - 1) was not guarded: one value a channel wrote infinity into the running variance."""
    layer = FusedTSigmaBN2d(3, 5)
    with pytest.raises(ValueError, match="more than 1 value"):
        layer(torch.randn(3, 5, 1, 1))
    layer(torch.randn(0, 5, 4, 4))
    assert layer.running_var is not None
    assert torch.equal(layer.running_var, torch.ones(3, 5))
    layer(torch.randn(3, 5, 1, 2))
    assert layer.running_var.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_attorch_lanes_past_the_end_do_not_count(memory_format: str, dtype: torch.dtype, backend: str) -> None:
    """In attorch: masked loads without a fill value fed a sum. Here NaN lies behind every row and every channel."""
    wide = problem(2, 3, 40, (6, 40), dtype=dtype, memory_format=memory_format)
    for size in (2, 3, 15, 17, 33) if backend == "native" else (17,):
        x, dy = (
            in_memory_format(torch.full_like(tensor, float("nan")), "task_major", memory_format)
            for tensor in (wide.x, wide.dy)
        )
        window = (
            (slice(None), slice(0, size)) if memory_format == "channels_last" else (..., slice(0, 1), slice(0, size))
        )
        for target, source in ((x, wide.x), (dy, wide.dy)):
            target[window] = source[window]
        channels = x[window].shape[1]
        p = wide._replace(x=x[window], dy=dy[window], weight=wide.weight[:, :channels], bias=None)
        assert p.x.data_ptr() == x.data_ptr()
        assert_matches_definition(p, run(p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_liger_and_batchensemble_variance_is_not_a_difference_of_squares(
    memory_format: str, dtype: torch.dtype, backend: str
) -> None:
    """Liger, BatchEnsemble: E[x^2] - E[x]^2 loses every digit, or is negative, where |mean| is large."""
    p = problem(2, 8, 5, (9, 9), dtype=dtype, memory_format=memory_format)
    p = p._replace(x=(p.x.double() + 1000).to(dtype))
    expected = definition(p)
    var = ops.forward_training(p.x, p.weight, p.bias, *p.options)[2]
    assert_relative(var, expected.var, STATISTICS[dtype])
    constant = ops.forward_training(torch.full_like(p.x, 12345.678), p.weight, p.bias, *p.options)[2]
    assert (constant == 0).all()


# ---- compiled graphs and functional kernels --------------------------------------------------------------------------


def test_liger_1358_no_float64_in_a_float32_graph() -> None:
    """Liger #1358: eps, a Python float, became float64 inside a compiled graph and made it four times slower."""
    torch._dynamo.reset()
    layer = FusedTSigmaBN2d(3, 8, momentum=None)
    counter = GraphCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    compiled(torch.randn(12, 8, 3, 3, requires_grad=True)).square().sum().backward()
    assert torch.float32 in counter.dtypes
    assert torch.float64 not in counter.dtypes


def test_triton_781_operators_have_no_side_effects(backend: str) -> None:
    """In triton #781: autotuning ran kernels with side effects several times. No operator may change an argument."""
    for op in (ops.forward_training, ops.forward_eval, ops.backward):
        assert not op.default._schema.is_mutable
    p = problem()
    first = run(p)
    for got, wanted in zip(run(p), first, strict=True):
        assert torch.equal(got, wanted)


def test_fla_533_and_1147_new_shapes_cost_no_tuning() -> None:
    """In flash-linear-attention #533, #1147: each new shape was tuned anew. Here the first call costs no more."""
    first, second = [], []
    for size in range(40, 100):
        p = problem(2, 3, 16, (size,))
        for times in (first, second):
            start = time.perf_counter()
            ops.forward_training(p.x, p.weight, p.bias, *p.options)
            times.append(time.perf_counter() - start)
    assert statistics.median(first) < 5 * statistics.median(second)


# ---- layouts and gradients -------------------------------------------------------------------------------------------

GUARDED = """
import ctypes, itertools, mmap, torch
from support.problems import Problem, definition, problem, run, assert_matches_definition

libc = ctypes.CDLL(None, use_errno=True)
maps = []

def at_the_end_of_a_page(tensor):
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(address + pages * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
    maps.append(memory)
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages * mmap.PAGESIZE - size)
    return flat.as_strided(tensor.shape, tensor.stride(), flat.storage_offset()).copy_(tensor)

dtypes = torch.float32, torch.float64, torch.float16, torch.bfloat16
for dtype, memory_format, spatial in itertools.product(
    dtypes, ("contiguous", "channels_last"), ((), (7,), (3, 5), (2, 3, 3))
):
    p = problem(2, 3, 19, spatial, dtype=dtype, memory_format=memory_format)
    guarded = Problem(*(at_the_end_of_a_page(tensor) for tensor in p[:4]), *p[4:])
    assert_matches_definition(p, run(guarded))
print("read in bounds")
"""


@pytest.mark.usefixtures("native")
def test_liger_1375_reads_stay_in_bounds() -> None:
    """Liger #1375: 4-D input, tested only as 3-D, was read out of bounds. Here a forbidden page follows each input."""
    assert python_output(GUARDED).strip() == "read in bounds"


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quack_88_expanded_gradients(dtype: torch.dtype, memory_format: str, backend: str) -> None:
    """In quack #88: the gradient of ``sum()`` has strides of zero and was read as if it were dense."""
    p = problem(dtype=dtype, memory_format=memory_format)
    layer_bias = torch.zeros(3, 5, requires_grad=True)
    y = task_batch_norm(p.x.requires_grad_(), p.weight.requires_grad_(), layer_bias, num_tasks=3)
    y.sum().backward()
    assert layer_bias.grad is not None
    assert torch.equal(layer_bias.grad, torch.full((3, 5), 4.0 * 6 * 7))
    assert p.x.grad is not None
    assert p.x.grad.abs().max() < 1e-2


@pytest.mark.parametrize("other", FORMATS)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_pytorch_107199_gradients_in_another_memory_format(memory_format: str, other: str, backend: str) -> None:
    """In pytorch #107199: a gradient in another memory format than the input's gave wrong numbers."""
    p = problem(memory_format=memory_format)
    x = p.x.requires_grad_()
    y = task_batch_norm(x, p.weight, p.bias, num_tasks=3)
    dx = torch.autograd.grad(y, x, in_memory_format(p.dy, "task_major", other))[0]
    assert_within(dx, definition(p).dx, BACKWARD[torch.float32])
    assert dx.stride() == x.stride()


def test_fla_a_constant_gradient_proves_nothing() -> None:
    """flash-linear-attention's norm tests: the loss was ``sum()``, whose dx is zero whatever the kernel does."""
    p = problem()
    assert p.dy.std() > 0.5
    assert definition(p).dx.abs().mean() > 0.1
    assert definition(p._replace(dy=torch.ones_like(p.dy))).dx.abs().max() < 1e-12


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", FORMATS)
def test_liger_803_and_pytorch_181555_offsets_beyond_32_bits(memory_format: str, backend: str) -> None:
    """Liger #803, #1483, pytorch #181555: offsets of 2^31 elements overflowed 32 bits.

    The samples lie 2^31 elements apart in memory that is reserved and hardly used.
    """
    p = problem(2, 2, 3, (4, 5), dtype=torch.bfloat16, memory_format=memory_format)
    distance = (1 << 31) + 64

    def spread(tensor: Tensor) -> Tensor:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        try:
            memory = mmap.mmap(-1, 2 * (3 * distance + tensor.numel()), flags=flags)
        except (OSError, OverflowError):
            pytest.skip("this system reserves no 12 GiB")
        flat = torch.frombuffer(memory, dtype=torch.bfloat16)
        return flat.as_strided(tensor.shape, (distance, *tensor.stride()[1:])).copy_(tensor)

    assert_matches_definition(p, run(p._replace(x=spread(p.x), dy=spread(p.dy))))


@pytest.mark.parametrize("size", [(7, 2, 10007, (2,)), (2, 70001, 2, ()), (70001, 2, 1, ())], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_pytorch_16998_and_19911_more_than_65535_of_each(
    memory_format: str, size: tuple[int, int, int, tuple[int, ...]]
) -> None:
    """In pytorch #16998, #19911: grids of more than 65,535 blocks in y or z could not be launched."""
    p = problem(*size, memory_format=memory_format, bias=False)
    y, mean, _ = ops.forward_training(p.x, p.weight, p.bias, *p.options)
    expected = definition(p)
    well_spread = expected.var > 1e-2  # two values may lie close together: y is then ill-conditioned
    view = y.view(size[0], size[1], size[2], -1), expected.y.view(size[0], size[1], size[2], -1)
    got, wanted = (v.permute(0, 2, 1, 3)[well_spread] for v in view)
    assert_within(got, wanted, FORWARD[torch.float32], scale=4)
    torch.testing.assert_close(mean.double(), expected.mean, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("native")
def test_attorch_7_few_channels_still_use_the_machine() -> None:
    """In attorch #7: one block for each channel: a long input with few channels ran 25 times slower than eager."""
    x = torch.randn(8, 2, 1 << 17)
    weight, scale = torch.zeros(1, 2), torch.full((2,), 0.5)

    def fused() -> Tensor:
        return ops.forward_training(x, weight, None, 1, 1e-5, "sigmoid", "task_major")[0]

    def eager() -> Tensor:
        return nn.functional.batch_norm(x, None, None, scale, training=True)

    def best(function: Callable[[], Tensor]) -> float:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return min(times)

    assert best(fused) < 2 * best(eager)


def test_unwritten_outputs_are_seen() -> None:
    """In flash-linear-attention's habit: what a kernel does not write is NaN in tests. This is the proof that it is."""
    x = torch.randn(8, 16, 64, 64)
    fill_cache_with_nan(x)
    y = ops.forward_training(x, torch.zeros(2, 16), None, 2, 1e-5, "sigmoid", "task_major")[0]
    assert y.isfinite().all()
    assert torch.empty(100).isnan().all()


# ---- missing parts ---------------------------------------------------------------------------------------------------

WITHOUT = """
import torch, tsbn_kernels
from tsbn_kernels import backends, memory
layer = tsbn_kernels.FusedTSigmaBN2d(2, 3, bias=True)
x = torch.randn(8, 3, 5, 5, requires_grad=True)
y = layer(x)
y.backward(torch.randn_like(y))
torch.testing.assert_close(y[:4], layer.task(0)(x[:4]), rtol=1e-4, atol=1e-5)
assert x.grad.isfinite().all() and layer.weight.grad.shape == (2, 3)
layer.eval()(x)
memory.empty_cache(), memory.cached_bytes(), memory.cache_limit(), memory.set_cache_limit(0)
for backend in backends.backends():
    print(f"{backend.name}|{backend.available}|{backend.detail}")
print(backends.select("cpu"))
"""


def copy_of_the_package(path: Path) -> Path:
    shutil.copytree(ROOT / "tsbn_kernels", path / "tsbn_kernels", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return path


def test_apex_161_without_the_compiled_part(tmp_path: Path) -> None:
    """In apex #161, #954, #1755: no import without the compiled part. Here the reference serves; a line says so."""
    lines = python_output(WITHOUT, path=copy_of_the_package(tmp_path)).splitlines()
    assert lines[-1] == "reference"
    assert [line for line in lines if line.startswith("cpu|False|the native library was not built")]
    assert len(lines) == len(backends.backends()) + 1


def test_apex_954_with_a_broken_compiled_part(tmp_path: Path) -> None:
    """In apex #954: the same for a part that does not load."""
    (copy_of_the_package(tmp_path) / "tsbn_kernels" / "_native.so").write_bytes(b"not a library")
    lines = python_output(WITHOUT, path=tmp_path).splitlines()
    assert lines[-1] == "reference"
    assert [line for line in lines if line.startswith("cpu|False|the native library does not load")]
    assert len(lines) == len(backends.backends()) + 1


def test_flash_attn_import_asks_no_driver() -> None:
    """In flash-attn: a driver was queried at import. Here import needs no GPU, Triton, compiler or NumPy."""
    program = """
import sys
for name in ("triton", "setuptools", "ninja", "rich", "matplotlib"):
    sys.modules[name] = None
import torch
sys.modules.setdefault("numpy", None)
torch.cuda._lazy_init = torch._C._cuda_getDeviceCount = None
before = set(sys.modules)
import tsbn_kernels
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(name for name in new if name in ("numpy", "triton", "torchvision", "scipy")))
tsbn_kernels.FusedTSigmaBN2d(2, 3)(torch.ones(4, 3, 2, 2))
"""
    assert python_output(program, fresh=True, PATH="", CUDA_VISIBLE_DEVICES="").strip() == "[]"


def test_options_are_documented() -> None:
    """Every parameter of the functional form is in its docstring."""
    doc = inspect.getdoc(task_batch_norm) or ""
    assert all(name in doc for name in inspect.signature(task_batch_norm).parameters)
