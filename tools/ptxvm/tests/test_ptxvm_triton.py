"""Programs that Triton compiled, for three generations of GPUs, and mutants of them."""

from __future__ import annotations

import re
import time
from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from tools.ptxvm import Out, Violation, compile_triton, launch, launch_triton  # noqa: E402

TARGETS = [80, 90, 100]
SCHEDULES: list[Any] = ["forward", "reversed", 1]


@triton.jit
def softmax(x, y, n, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    k = tl.arange(0, WIDTH)
    v = tl.load(x + row * n + k, mask=k < n, other=float("-inf")).to(tl.float32)
    v = tl.exp(v - tl.max(v, 0))
    tl.store(y + row * n + k, v / tl.sum(v, 0), mask=k < n)


@triton.jit
def gated_tile(x, gate, y, rows, columns, stride, BM: tl.constexpr, BN: tl.constexpr):
    i = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    j = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    inside = (i < rows) & (j < columns)
    v = tl.load(x + i * stride + j, mask=inside, other=0.0).to(tl.float32)
    g = tl.sigmoid(tl.load(gate + j, mask=j < columns, other=0.0).to(tl.float32))
    tl.store(y + i * stride + j, v * g + tl.sum(v * v, 1)[:, None], mask=inside)


@triton.jit
def merge(mean_a, m2_a, n_a, mean_b, m2_b, n_b):
    n = n_a + n_b
    share = tl.where(n > 0, n_b / n, 0.0)
    delta = mean_b - mean_a
    return mean_a + delta * share, m2_a + m2_b + delta * delta * n_a * share, n


@triton.jit
def moments(x, mean, variance, N, C, S, BN: tl.constexpr, BS: tl.constexpr, FLAT: tl.constexpr):
    """Welford's mean and variance of a channel of [N, C, S], merged over the tile at the end."""
    c = tl.program_id(0)
    m = tl.zeros((BN, BS), tl.float32)
    q = tl.zeros((BN, BS), tl.float32)
    count = tl.zeros((BN, BS), tl.float32)
    for n0 in range(0, N, BN):
        for s0 in range(0, S, BS):
            n = n0 + tl.arange(0, BN)[:, None]
            s = s0 + tl.arange(0, BS)[None, :]
            inside = (n < N) & (s < S)
            v = tl.load(x + (n * C + c) * S + s, mask=inside, other=0.0).to(tl.float32)
            count += tl.where(inside, 1.0, 0.0)
            delta = v - m
            m += tl.where(inside, delta / count, 0.0)
            q += tl.where(inside, delta * (v - m), 0.0)
    if FLAT:
        m, q, count = tl.reduce(
            (tl.reshape(m, (BN * BS,)), tl.reshape(q, (BN * BS,)), tl.reshape(count, (BN * BS,))), 0, merge
        )
    else:
        m, q, count = tl.reduce((m, q, count), 1, merge)
        m, q, count = tl.reduce((m, q, count), 0, merge)
    tl.store(mean + c, m)
    tl.store(variance + c, q / count)


@triton.jit
def add_pairs(s_a, q_a, s_b, q_b):
    return s_a + s_b, q_a + q_b


@triton.jit
def batch_norm(x, weight, y, mean, N, C, S, eps, BN: tl.constexpr, BS: tl.constexpr, WIDE: tl.constexpr):
    """Normalises a channel of [N, C, S] that fits one tile."""
    c = tl.program_id(0)
    n = tl.arange(0, BN)[:, None]
    s = tl.arange(0, BS)[None, :]
    inside = (n < N) & (s < S)
    v = tl.load(x + (n * C + c) * S + s, mask=inside, other=0.0).to(WIDE)
    total, squares = tl.reduce(tl.reduce((v, v * v), 1, add_pairs), 0, add_pairs)
    m = total / (N * S)
    r = tl.load(weight + c).to(WIDE) / tl.sqrt(squares / (N * S) - m * m + eps)
    tl.store(y + (n * C + c) * S + s, ((v - m) * r).to(y.dtype.element_ty), mask=inside)
    tl.store(mean + c, m)


@triton.jit
def transpose(x, y, rows, columns, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    j = tl.program_id(1) * B + tl.arange(0, B)
    v = tl.load(x + i[:, None] * columns + j[None, :], mask=(i < rows)[:, None] & (j < columns)[None, :])
    tl.store(y + j[:, None] * rows + i[None, :], tl.trans(v), mask=(j < columns)[:, None] & (i < rows)[None, :])


@triton.jit
def count_above(x, total, limit, n, B: tl.constexpr):
    k = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + k, mask=k < n, other=0.0)
    tl.atomic_add(total, tl.sum((v > limit).to(tl.int32), 0))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("n", [33, 1000, 1024])
def test_softmax(n: int, dtype: torch.dtype, target: int) -> None:
    x = torch.randn(3, n, generator=torch.manual_seed(0)).to(dtype)
    want = torch.softmax(x.double(), 1)
    for schedule in SCHEDULES:
        y = torch.empty_like(x)
        report = launch_triton(
            softmax, (3,), x, Out(y), n, WIDTH=triton.next_power_of_2(n), target=target, schedule=schedule
        )
        tolerance = max(1e-7, torch.finfo(dtype).eps / 2) * want.max()
        assert (y.double() - want).abs().max() <= tolerance
        assert report.global_written.bytes == x.nbytes
        assert n < 128 or report.global_read.bytes == x.nbytes  # threads without an element of their own read another's


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_tiles_on_a_strided_view(dtype: torch.dtype, target: int) -> None:
    whole = torch.randn(37, 160, generator=torch.manual_seed(1)).to(dtype)
    x, gate = whole[:, :77], torch.randn(77)
    for schedule in SCHEDULES:
        y = torch.empty_like(whole)[:, :77]
        arguments = x, gate, Out(y), 37, 77, 160
        launch_triton(gated_tile, (triton.cdiv(37, 16), 1), *arguments, BM=16, BN=128, target=target, schedule=schedule)
        wide = x.double()
        want = wide * torch.sigmoid(gate.double()) + (wide * wide).sum(1, keepdim=True)
        assert ((y.double() - want).abs() <= 2 * torch.finfo(dtype).eps * want.abs().max()).all()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_welford_by_axis_is_right_and_the_flat_form_is_caught(dtype: torch.dtype, target: int) -> None:
    x = (torch.randn(6, 3, 304, generator=torch.manual_seed(2)) * 2 + 3).to(dtype)
    wide = x.double()
    errors = {}
    for flat in (False, True):
        mean, variance = torch.empty(3), torch.empty(3)
        launch_triton(
            moments, (3,), x, Out(mean), Out(variance), 6, 3, 304, BN=4, BS=256, FLAT=flat, num_warps=8, target=target
        )
        errors[flat] = (
            float((mean - wide.mean((0, 2))).abs().max()),
            float((variance - wide.var((0, 2), unbiased=False)).abs().max()),
        )
    assert max(errors[False]) < 1e-6
    if tuple(int(v) for v in triton.__version__.split(".")[:2]) <= (3, 8):
        assert errors[True][0] > 1e-3, "this compiler pairs reshaped operands of a reduction rightly: celebrate"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_batch_norm(dtype: torch.dtype, target: int) -> None:
    x = torch.randn(5, 3, 208, generator=torch.manual_seed(8)).to(dtype)
    weight, wide = torch.tensor([1.0, 2.0, -1.0], dtype=dtype), x.double()
    y, double = torch.empty_like(x), dtype == torch.float64
    mean = torch.empty(3, dtype=torch.float64 if double else torch.float32)
    options = {"BN": 8, "BS": 256, "WIDE": tl.float64 if double else tl.float32, "target": target}
    report = launch_triton(batch_norm, (3,), x, weight, Out(y), Out(mean), 5, 3, 208, 2.0**-17, **options)
    want = (wide - wide.mean((0, 2), keepdim=True)) * weight.double()[:, None]
    want /= (wide.var((0, 2), unbiased=False, keepdim=True) + 2.0**-17).sqrt()
    assert (mean - wide.mean((0, 2))).abs().max() < (1e-15 if double else 1e-6)
    allowed = 4 * torch.finfo(dtype).eps * want.abs().max() + (0 if double else 1e-5)
    assert (y.double() - want).abs().max() < allowed
    assert report.global_written.sectors == x.nbytes // 32 + 3, "whole vectors"


def test_warps_that_store_copies_of_a_sum() -> None:
    # Two or more of the eight warps hold each sum, and contraction makes some of the copies differ.
    x = torch.randn(48, 16, 1024, generator=torch.manual_seed(7))
    mean, variance = torch.empty(16), torch.empty(16)
    options: dict[str, Any] = {"BN": 32, "BS": 32, "FLAT": False, "num_warps": 8, "target": 90}
    report = launch_triton(moments, (16,), x, Out(mean), Out(variance), 48, 16, 1024, **options)
    assert report.collisions > 0 and (mean - x.double().mean((0, 2))).abs().max() < 1e-6
    compiled, _ = compile_triton(moments, [x, Out(mean), Out(variance), 48, 16, 1024], **options)
    arguments = [x, Out(mean), Out(variance), 48, 16, 1024, None, None]
    with pytest.raises(Violation, match=r"race: byte .* of shared memory was written"):
        launch(compiled.asm["ptx"], "moments", 16, 256, arguments, shared=compiled.metadata.shared)


def test_a_layer_of_three_tasks_runs_in_seconds() -> None:
    x = torch.randn(3 * 16, 64, 32 * 32, generator=torch.manual_seed(6)) * 2 + 3
    mean, variance = torch.empty(64), torch.empty(64)
    options = {"BN": 4, "BS": 256, "FLAT": False, "num_warps": 8, "target": 90}
    compile_triton(moments, [x, Out(mean), Out(variance), 48, 64, 1024], **options)
    start = time.process_time()
    report = launch_triton(moments, (64,), x, Out(mean), Out(variance), 48, 64, 1024, **options)
    seconds = time.process_time() - start
    assert (mean - x.double().mean((0, 2))).abs().max() < 1e-6
    assert report.global_read.bytes == x.nbytes and report.global_read.sectors == x.nbytes // 32
    assert report.thread_instructions / seconds > 20e6


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_transpose_through_shared_memory(dtype: torch.dtype, target: int) -> None:
    x = torch.randn(70, 90, generator=torch.manual_seed(3)).to(dtype)
    for schedule in SCHEDULES:
        y = torch.empty(90, 70, dtype=dtype)
        launch_triton(transpose, (2, 2), x, Out(y), 70, 90, B=64, target=target, schedule=schedule)
        assert (y == x.T).all()


@pytest.mark.parametrize("target", TARGETS)
def test_atomics(target: int) -> None:
    x, total = torch.randn(1000, generator=torch.manual_seed(4)), torch.zeros(1, dtype=torch.int32)
    launch_triton(count_above, (4,), x, total, 0.5, 1000, B=256, target=target, schedule=7)
    assert int(total) == int((x > 0.5).sum())


def test_arguments_are_specialised_as_the_launcher_does() -> None:
    x, y = torch.zeros(2048), torch.zeros(2048)
    aligned, values = compile_triton(softmax, [x, Out(y), 1024], WIDTH=1024)
    assert list(values) == ["x", "y", "n"] and "ld.global.v4.b32" in aligned.asm["ptx"]
    shifted, _ = compile_triton(softmax, [x[1:], Out(y), 1024], WIDTH=1024)
    assert "ld.global.v4.b32" not in shifted.asm["ptx"]
    _, values = compile_triton(softmax, [x, Out(y), 1], WIDTH=1024)
    assert list(values) == ["x", "y"]


def compiled_softmax(target: int) -> tuple[str, int]:
    x = torch.zeros(2, 1008)
    kernel, _ = compile_triton(softmax, [x, Out(x), 1008], WIDTH=1024, target=target)
    return kernel.asm["ptx"], kernel.metadata.shared


def run(ptx: str, shared: int, schedule: Any) -> np.ndarray:
    x = np.random.default_rng(5).normal(size=(2, 1008)).astype(np.float32)
    y = np.zeros_like(x)
    launch(ptx, "softmax", 2, 128, [x, Out(y), 1008, None, None], shared=shared, schedule=schedule)
    np.testing.assert_allclose(y, torch.softmax(torch.from_numpy(x), 1), rtol=1e-5)
    return y


MUTANTS = {
    "no barrier between store and load": (r"bar\.sync\s+0;", "", 0, "race|unwritten read", "shared"),
    "no barrier between uses of the memory": (r"bar\.sync\s+0;", "", 1, "race|unwritten read", "shared"),
    "a narrow member mask": (r"(shfl\.sync\.bfly.*), -1;", r"\1, 0xffff;", 0, "member mask", "shfl"),
    "a shuffle across half of the distance": (r"(shfl\.sync\.bfly.*), 2, 31, -1;", r"\1, 1, 31, -1;", -1, "wrong", ""),
    "a mask that lets one element too many in": (r"setp\.lt\.s32|setp\.gt\.s32", "setp.le.s32", -1, "out of bounds|wrong|race|write count", ""),
    "a store shifted by one vector": (r"(st\.global\.\S+ \[ %rd\d+ \+) 0 \]", r"\1 16 ]", -1, "out of bounds|race|write count", "argument 1"),
    "swapped registers of a vector": (r"(st\.global\.v\d\.b32 .*)\{ (%r\d+), (%r\d+)", r"\1{ \3, \2", 0, "wrong", "Mismatched elements"),
}  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant: str, target: int) -> None:
    pattern, replacement, occurrence, kind, says = MUTANTS[mutant]
    ptx, shared = compiled_softmax(target)
    run(ptx, shared, "forward")
    match = list(re.finditer(pattern, ptx))[occurrence]
    changed = ptx[: match.start()] + match.expand(replacement) + ptx[match.end() :]
    for schedule in SCHEDULES:
        with pytest.raises((Violation, AssertionError)) as caught:
            run(changed, shared, schedule)
        found = caught.value.kind if isinstance(caught.value, Violation) else "wrong"
        assert re.fullmatch(kind, found), str(caught.value)
        assert says in str(caught.value)
        if isinstance(caught.value, Violation) and found != "write count":
            assert f"PTX line {caught.value.line}" in str(caught.value)
            assert "test_ptxvm_triton.py:" in caught.value.source
