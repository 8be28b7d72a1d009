"""Programs that nvcc compiled, and mutants of them: each mutant must be caught, at the right place."""

from __future__ import annotations

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tools.ptxvm import Out, Report, Violation, compile_cuda, find_nvcc, launch, launch_cuda, parse
from tools.ptxvm.tests.ptxvm_cuda import NEIGHBOURS, SOURCE

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc")

TARGETS = [80, 90, 100]
SCHEDULES = ["forward", "reversed", 1, 2]
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(3, 2, 1000).astype(np.float32)


@pytest.fixture(scope="module", params=TARGETS)
def ptx(request: pytest.FixtureRequest) -> str:
    return compile_cuda(SOURCE, target=request.param)


def zeros(*shape: int, kind: type = np.float32) -> np.ndarray:
    return np.zeros(shape, kind)


@pytest.mark.parametrize("schedule", SCHEDULES)
class TestPrograms:
    def test_vector_add(self, ptx: str, schedule: Any) -> None:
        c = zeros(1000)
        report = launch(ptx, "vector_add", 8, 128, [X, X[::-1].copy(), Out(c), 1000], schedule=schedule)
        assert (c == X + X[::-1]).all()
        assert (report.global_read.bytes, report.global_written.bytes) == (8000, 4000)
        assert report.global_read.sectors == 250

    def test_copy4(self, ptx: str, schedule: Any) -> None:
        y = zeros(1000)
        report = launch(ptx, "copy4", 2, 128, [X, Out(y), 250], schedule=schedule)
        assert (y == X).all()
        assert report.global_read.sectors == report.global_written.sectors == 125

    def test_tree_sum(self, ptx: str, schedule: Any) -> None:
        sums = zeros(3)
        launch(ptx, "tree_sum", 3, 128, [X, Out(sums), 1000], shared=512, schedule=schedule)
        np.testing.assert_allclose(sums.sum(), X.sum(), rtol=1e-6)

    def test_normalise_rows(self, ptx: str, schedule: Any) -> None:
        x = torch.from_numpy(X).view(4, 250).bfloat16()
        y, mean, variance = torch.empty_like(x), zeros(4), zeros(4)
        launch(ptx, "normalise_rows", 4, 96, [x, Out(y), Out(mean), Out(variance), 250], schedule=schedule)
        wide = x.double()
        np.testing.assert_allclose(mean, wide.mean(1), rtol=1e-6)
        np.testing.assert_allclose(variance, wide.var(1, unbiased=False), rtol=1e-5)
        want = (wide - wide.mean(1, keepdim=True)) / (wide.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        assert (y.double() - want).abs().max() < 2**-7

    def test_softmax_rows(self, ptx: str, schedule: Any) -> None:
        y = zeros(10, 100)
        launch(ptx, "softmax_rows", 10, 32, [X, Out(y), 100], schedule=schedule)
        np.testing.assert_allclose(y, torch.softmax(torch.from_numpy(X).view(10, 100), 1), rtol=1e-5)

    def test_last_block_sum(self, ptx: str, schedule: Any) -> None:
        part, count, total = zeros(7), zeros(1, kind=np.uint32), zeros(1)
        launch(ptx, "last_block_sum", 7, 32, [X, Out(part), count, Out(total), 1000], schedule=schedule)
        np.testing.assert_allclose(total[0], X.sum(), rtol=1e-6)
        assert count[0] == 7

    def test_grid_barrier(self, ptx: str, schedule: Any) -> None:
        x, y = zeros(256), zeros(256)
        launch(ptx, "reverse_through_grid_barrier", 4, 64, [Out(x), Out(y), 256], cooperative=True, schedule=schedule)
        assert (y == np.arange(256)[::-1]).all()

    def test_chain_of_flags(self, ptx: str, schedule: Any) -> None:
        values = zeros(9, kind=np.int32)
        launch(ptx, "chain", 9, 32, [zeros(9, kind=np.int32), Out(values)], cooperative=True, schedule=schedule)
        assert (values == np.cumsum(np.arange(9))).all()

    def test_divergent_loops(self, ptx: str, schedule: Any) -> None:
        x, steps = np.arange(1, 129, dtype=np.uint32), zeros(128, kind=np.uint32)
        report = launch(ptx, "collatz", 2, 64, [x, Out(steps)], schedule=schedule)

        def length(v: int) -> int:
            n = 0
            while v != 1:
                v, n = (3 * v + 1, n + 1) if v % 2 else (v // 2, n + 1)
            return n

        assert steps.tolist() == [length(v) for v in range(1, 129)]
        assert report.divergent_branches > 0

    def test_cluster_sum(self, ptx: str, schedule: Any) -> None:
        if ".target sm_80" in ptx:
            with pytest.raises(KeyError, match="no kernels match 'cluster_sum'"):
                launch(ptx, "cluster_sum", 8, 32, [X, X, 500])
            return
        sums = zeros(8)
        report = launch(ptx, "cluster_sum", 8, 32, [X, Out(sums), 500], schedule=schedule)
        np.testing.assert_allclose(sums, np.repeat(X.reshape(2, 500).sum(1), 4), rtol=1e-6)
        assert report.cluster == (4, 1, 1)


def kernel_text(ptx: str, name: str) -> str:
    start = ptx.index(f".entry {name}(")
    return ptx[start : ptx.index("\n}", start)]


def mutate(ptx: str, name: str, pattern: str, replacement: str, occurrence: int = 0) -> tuple[str, int]:
    """Replaces one match in the text of a kernel; returns the line where that happened."""
    body = kernel_text(ptx, name)
    found = list(re.finditer(pattern, body))
    match = found[occurrence]
    changed = body[: match.start()] + match.expand(replacement) + body[match.end() :]
    at = ptx.index(body)
    return ptx[:at] + changed + ptx[at + len(body) :], ptx[: at + match.start()].count("\n") + 1


def run(name: str, ptx: str, **options: Any) -> Report:
    arguments: dict[str, tuple[Any, ...]] = {
        "vector_add": (8, 128, [X, X, Out(zeros(1000)), 1000]),
        "copy4": (2, 128, [X, Out(zeros(1000)), 250]),
        "tree_sum": (3, 128, [X, Out(zeros(3)), 1000]),
        "normalise_rows": (
            4,
            96,
            [torch.from_numpy(X).bfloat16(), Out(torch.empty(1000).bfloat16()), Out(zeros(4)), Out(zeros(4)), 250],
        ),
        "last_block_sum": (7, 32, [X, Out(zeros(7)), zeros(1, kind=np.uint32), Out(zeros(1)), 1000]),
        "reverse_through_grid_barrier": (4, 64, [Out(zeros(256)), Out(zeros(256)), 256]),
        "cluster_sum": (8, 32, [X, Out(zeros(8)), 500]),
        "chain": (9, 32, [zeros(9, kind=np.int32), Out(zeros(9, kind=np.int32))]),
    }
    options.setdefault("shared", 512 if name == "tree_sum" else 0)
    options.setdefault("cooperative", name in ("reverse_through_grid_barrier", "chain"))
    return launch(ptx, name, *arguments[name], **options)


# Kernel, what is replaced, by what, which match; the kind of violation and what its message must say.
MUTANTS = {
    "no barrier before the tree": ("tree_sum", r"bar\.sync\s+0;", "", 0, "race|unwritten read", "ld.shared"),
    "no barrier in the tree": ("tree_sum", r"bar\.sync\s+0;", "", 1, "race", "shared memory"),
    "no barrier after the parts": ("normalise_rows", r"bar\.sync\s+0;", "", 0, "race|unwritten read", "ld.shared"),
    "no barrier before the total is read": ("normalise_rows", r"bar\.sync\s+0;", "", 1, "race|unwritten read", "ld.shared"),
    "a narrow member mask": ("normalise_rows", r"(shfl\.sync.*), (?:-1|%r\d+);", r"\1, 65535;", 0, "member mask", "shfl.sync"),
    "a tail that runs one too far": ("vector_add", r"setp\.ge\.s32", "setp.gt.s32", 0, "out of bounds", "ld.global"),
    "a tail that ends one too soon": ("vector_add", r"(setp\.ge\.s32\s+%p\d+, %r\d+), %r(\d+);", r"add.s32 %r\2, %r\2, -1; \1, %r\2;", 0,
                                      "write count", r"element \[999\]"),
    "a write shifted by one element": ("vector_add", r"(st\.global\.f32\s+\[%rd\d+)\]", r"\1+4]", 0, "out of bounds", "0 bytes past the end of argument 2"),
    "a write before the start": ("copy4", r"(st\.global\.v4\.[fu]32\s+\[%rd\d+)\]", r"\1-16]", 0, "out of bounds", "16 bytes before the start of argument 1"),
    "a misaligned vector": ("copy4", r"(ld\.global\.v4\.[fu]32.*\[%rd\d+)\]", r"\1+4]", 0, "misaligned", "16-byte access"),
    "a read of what nobody wrote": ("tree_sum", r"st\.shared\.f32.*;", "", 0, "unwritten read", "nobody has written"),
    "a store that is gone": ("normalise_rows", r"st\.global\.(u|b)16.*;", "", 0, "write count", "written 0 times, not 1"),
    "a store that happens twice": ("vector_add", r"(st\.global\.f32.*;)", r"\1 \1", 0, "write count", "written 2 times, not 1"),
    "no fence before the count": ("last_block_sum", r"(membar\.gl|fence\.\S+);", "", 0, "race", "argument 1"),
    "no fence after the count": ("last_block_sum", r"(membar\.gl|fence\.\S+);", "", 1, "race", "argument 1"),
    "a fence of the block only": ("last_block_sum", r"membar\.gl;", "membar.cta;", 0, "race", "argument 1"),
    "a count that is not atomic": ("last_block_sum", r"atom\.global\.add\.u32\s+(%r\d+), \[(%rd\d+)\], 1;",
                                   r"ld.global.u32 \1, [\2]; st.global.u32 [\2], 1;", 0, "race", "argument 2"),
    "no release at the grid barrier": ("reverse_through_grid_barrier", r"atom\.add\.release", "atom.add.relaxed", 0, "race", "argument 0"),
    "no acquire at the grid barrier": ("reverse_through_grid_barrier", r"ld\.acquire", "ld.relaxed", 0, "race", "argument 0"),
    "a grid barrier that nobody leaves": ("reverse_through_grid_barrier", r"atom\.add\.release\.gpu\.u32 (%r\d+),.*;", r"mov.u32 \1, 0;", 0,
                                          "deadlock", "no progress"),
    "a flag that is not fenced": ("chain", r"membar\.gl;", "", 1, "race", "argument 1"),
    "a barrier that one thread misses": ("tree_sum", r"bar\.sync\s+0;", r"{ .reg .pred z; setp.ne.u32 z, %tid.x, 5; @z bar.sync 0; }", 0,
                                         "deadlock|unwritten read|race", "bar.sync 0|ld.shared"),
    "a barrier for too few": ("tree_sum", r"bar\.sync\s+0;", "bar.sync 0, 256;", 0, "deadlock", "never come here"),
}  # fmt: skip
CLUSTER_MUTANTS = {
    "no cluster barrier before the exchange": ("cluster_sum", r"barrier\.cluster\.arrive;[^;]*?(\.loc[^\n]*\n\s*)*barrier\.cluster\.wait;", "", 0,
                                               ("race", "unwritten read"), "shared memory"),
    "no cluster barrier after the exchange": ("cluster_sum", r"barrier\.cluster\.arrive;[^;]*?(\.loc[^\n]*\n\s*)*barrier\.cluster\.wait;", "", 1,
                                              ("out of bounds",), "which has exited"),
    "an arrival that publishes nothing": ("cluster_sum", r"barrier\.cluster\.arrive;", "barrier.cluster.arrive.relaxed;", 0, ("race",), "shared memory"),
    "a wait without an arrival": ("cluster_sum", r"barrier\.cluster\.arrive;", "", 0, ("barrier",), "without having arrived"),
}  # fmt: skip


def test_the_programs_that_are_mutated_are_right(ptx: str) -> None:
    for name in {m[0] for m in MUTANTS.values()}:
        run(name, ptx)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(ptx: str, mutant: str) -> None:
    name, pattern, replacement, occurrence, kind, says = MUTANTS[mutant]
    changed, _ = mutate(ptx, name, pattern, replacement, occurrence)
    for schedule in ["forward", "reversed", 3]:
        with pytest.raises(Violation) as caught:
            run(name, changed, schedule=schedule, patience=200_000)
        message = str(caught.value)
        assert re.fullmatch(kind, caught.value.kind), message
        assert re.search(says, message)
        if kind != "write count":
            assert f"PTX line {caught.value.line}: " in message
            assert "".join(caught.value.instruction.split()) in "".join(
                changed.splitlines()[caught.value.line - 1].split()
            )
            assert re.search(r"\.cu:\d+|\.h:\d+", caught.value.source), "the source line"
            assert len(caught.value.block) == len(caught.value.thread) == 3


@pytest.mark.parametrize("mutant", CLUSTER_MUTANTS)
@pytest.mark.parametrize("target", [90, 100])
def test_cluster_mutants_are_caught(target: int, mutant: str) -> None:
    name, pattern, replacement, occurrence, kinds, says = CLUSTER_MUTANTS[mutant]
    changed, _ = mutate(compile_cuda(SOURCE, target=target), name, pattern, replacement, occurrence)
    for schedule in ["forward", "reversed", 3]:
        with pytest.raises(Violation) as caught:
            run(name, changed, schedule=schedule, patience=200_000)
        assert caught.value.kind in kinds and says in str(caught.value)


@pytest.mark.parametrize("target", [90, 100])
def test_a_rank_outside_the_cluster_is_caught(target: int) -> None:
    source = SOURCE.replace("map_shared_rank(&part, r)", "map_shared_rank(&part, r + 1)")
    with pytest.raises(Violation, match="out of bounds: address in the shared memory of a block outside the cluster"):
        run("cluster_sum", compile_cuda(source, target=target))


def test_swapped_vector_registers_show_in_the_result(ptx: str) -> None:
    changed, _ = mutate(ptx, "copy4", r"(st\.global\.v4\.[fu]32.*)\{(%[fr]\d+), (%[fr]\d+),", r"\1{\3, \2,")
    y = zeros(1000)
    launch(changed, "copy4", 2, 128, [X, Out(y), 250])
    with pytest.raises(AssertionError, match=r"Mismatched elements: 500 / 1000"):
        np.testing.assert_array_equal(y, X)


def test_templates_are_found_by_their_plain_name() -> None:
    source = (
        "template <int N> __global__ void fill(int* y) { y[threadIdx.x] = N; } template __global__ void fill<3>(int*);"
    )
    y = zeros(32, kind=np.int32)
    report = launch_cuda(source, "fill", 1, 32, [Out(y)], target=90)
    assert (y == 3).all() and "fill" in report.kernel


@pytest.fixture(scope="module", params=[90, 100])
def neighbours(request: pytest.FixtureRequest) -> str:
    return compile_cuda(NEIGHBOURS, target=request.param)


@pytest.mark.parametrize("schedule", ["forward", "reversed", 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_cluster_normalises_a_channel(neighbours: str, dtype: torch.dtype, schedule: Any) -> None:
    mangled = {torch.float32: "IfLi", torch.float16: "6__half", torch.bfloat16: "13__nv_bfloat16"}[dtype]
    (name,) = (k for k in parse(neighbours).kernels if mangled in k)
    x = torch.randn(8, 3, 512, generator=torch.manual_seed(1)).to(dtype)
    y, mean, variance, wide = torch.empty_like(x), torch.empty(3), torch.empty(3), x.double()
    arguments = [x, Out(mean), Out(variance), Out(y), 8, 3, 512]
    report = launch(neighbours, name, 12, 128, arguments, shared=40, schedule=schedule)
    assert (mean - wide.mean((0, 2))).abs().max() < 1e-6
    assert (variance - wide.var((0, 2), unbiased=False)).abs().max() < 1e-6
    want = (wide - wide.mean((0, 2), keepdim=True)) / (wide.var((0, 2), unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert (y.double() - want).abs().max() < 4 * torch.finfo(dtype).eps + 1e-5
    assert report.global_read.bytes == 2 * x.nbytes and report.global_read.sectors == 2 * x.nbytes // 32
    with pytest.raises(Violation, match="of shared memory, which has 32"):
        launch(neighbours, name, 12, 128, arguments, shared=32, schedule=schedule)


def test_hints_and_dependent_launches(neighbours: str) -> None:
    y = zeros(1000)
    report = launch(neighbours, "hints", 2, 128, [X, Out(y), 250])
    want = X.copy()
    want[::4] = ((X + X) + X + X + X + X)[::4]
    np.testing.assert_allclose(y, want, rtol=1e-6)
    assert report.global_written.bytes == 4000
    whole = zeros(1004)
    with pytest.raises(Violation, match="race: byte 16 of argument 1"):
        launch(neighbours, "hints", 2, 128, [whole[4:], whole[:-4], 250])


def test_large_shared_memory(neighbours: str) -> None:
    x = RANDOM.normal(size=(2, 50000)).astype(np.float32)
    y = zeros(2, 50000)
    launch(neighbours, "reverse_rows", 2, 512, [x, Out(y), 50000], shared=200000)
    assert (y == x[:, ::-1]).all()
    with pytest.raises(ValueError, match="at most 232448 bytes of shared memory, not 232452"):
        launch(neighbours, "reverse_rows", 2, 512, [x, Out(y), 50000], shared=232452)


def test_groups_doubles_and_halves(neighbours: str) -> None:
    y = zeros(64)
    launch(neighbours, "groups", 1, 64, [X[:64], Out(y)])
    want = X[:64].reshape(2, 32).sum(1).repeat(32) + X[:64].reshape(8, 8).max(1).repeat(8)
    np.testing.assert_allclose(y, want, rtol=1e-6)
    d, z = X.astype(np.float64), zeros(5, kind=np.float64)
    launch(neighbours, "doubles", 1, 32, [d, Out(z), 500])
    np.testing.assert_allclose(z, [d.mean(), d.var(), d.std(), 1 / d.std(), 1 / d.mean()], rtol=1e-13)
    h, b = torch.from_numpy(X[:64] - 3).half(), torch.from_numpy(X[:64] - 3).bfloat16()
    squares, folded = torch.empty_like(h), torch.empty_like(b)
    launch(neighbours, "halves", 1, 32, [h, b, Out(squares), Out(folded)])
    assert (squares == (h.double() ** 2 - h.double().abs()).half().clamp(min=0)).all()
    assert (folded[::2] == b[::2] * 2).all() and (folded[1::2] == b[1::2].abs()).all()


def test_the_wheels_have_an_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    # A cache of its own: the text must come from this nvcc, with the headers of the wheels.
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("the wheels of nvcc are not installed")
    assert "nvidia" in nvcc
    source = (
        "#include <cooperative_groups.h>\n#include <cuda_bf16.h>\n#include <cuda/std/limits>\n"
        + r"""
    extern "C" __global__ void halve(const __nv_bfloat16* x, float* y) {
      const unsigned k = cooperative_groups::this_grid().thread_rank();
      y[k] = __bfloat162float(x[k]) / 2 + cuda::std::numeric_limits<float>::min();
    }"""
    )
    x, y = torch.arange(64).bfloat16(), zeros(64)
    launch_cuda(f"// {nvcc}\n{source}", "halve", 2, 32, [x, Out(y)], target=90)
    assert (y == np.arange(64) / 2 + np.finfo(np.float32).tiny).all()


def test_local_memory_and_constants() -> None:
    source = r"""
    __constant__ int table[4] = {10, 20, 30, 40};
    extern "C" __global__ void pick(int* y, int n) {
      int stack[8];
      for (int k = 0; k < n; ++k) stack[(k * 5) % 8] = k * table[k % 4];
      y[threadIdx.x] = stack[threadIdx.x % n];
    }"""
    y = zeros(32, kind=np.int32)
    launch_cuda(source, "pick", 1, 32, [Out(y), 8])
    stack = {k * 5 % 8: k * 10 * (k % 4 + 1) for k in range(8)}
    assert y.tolist() == [stack[t % 8] for t in range(32)]
    with pytest.raises(Violation, match=r"unwritten read: .* of local memory"):
        launch_cuda(source.replace("% n]", "% 8]"), "pick", 1, 32, [Out(y), 7])


def test_a_source_that_does_not_compile_says_why() -> None:
    with pytest.raises(RuntimeError, match='identifier "oops" is undefined'):
        compile_cuda("__global__ void f() { oops(); }")


def test_what_two_ask_for_at_once_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "nvcc"
    compiler.write_text(
        '#!/bin/sh\nfor made; do :; done\n[ "$1" = --version ] || { echo >> calls; sleep 0.2; echo ptx > "$made"; }\n'
    )
    compiler.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PTXVM_CACHE", str(tmp_path))
    monkeypatch.setattr("tools.ptxvm.compilers.find_nvcc", lambda: str(compiler))
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(compile_cuda, ["a", "a", "b"])) == ["ptx\n"] * 3
    assert len((tmp_path / "calls").read_text().splitlines()) == 2
