"""The pool of blocks: reuse, bounds, giving back; and what a step costs at its peak."""

from __future__ import annotations

import functools
import gc
import os
import threading

import pytest
import torch
from support.backends import HAS_POOL, cache_limit
from support.problems import FORMATS, problem, run
from support.processes import python, python_output
from support.tolerances import assert_same_bits
from torch import Tensor

from tsbn_kernels import memory

MIB = 1 << 20
BLOCK = 2 * MIB  # sizes are rounded up to huge pages

pytestmark = [
    pytest.mark.usefixtures("native", "empty_pool"),
    pytest.mark.skipif(not HAS_POOL, reason="the pool is for Linux, and PyTorch 2.11 or later"),
]


@pytest.fixture
def empty_pool() -> None:
    gc.collect()
    memory.empty_cache()


def idle() -> int:
    """Idle bytes without the block that the operators' own vectors may use."""
    return memory.cached_bytes() // BLOCK * BLOCK - (memory.cached_bytes() > 0 and workspace()) * BLOCK


@functools.cache
def workspace() -> bool:
    """Whether operators take their vectors from the pool: asked of a fresh process."""
    program = """
import torch
from tsbn_kernels import memory
x, w = torch.ones(4, 3), torch.zeros(1, 3)
torch.ops.tsbn.forward_eval(x, w, None, w, w + 1, 1, 1e-5, "sigmoid", "task_major")
print(memory.cached_bytes())
"""
    return int(python_output(program)) > 0


def output(num_bytes: int) -> Tensor:
    """A fresh float32 output of the operator, full of 0.5."""
    x = torch.ones(num_bytes // 1024, 256)
    zeros = torch.zeros(1, 256)
    return torch.ops.tsbn.forward_eval(x, zeros, None, zeros, zeros + 1, 1, 0.0, "sigmoid", "task_major")


def test_a_freed_block_serves_the_next_output() -> None:
    first = output(8 * MIB)
    address = first.data_ptr()
    assert idle() == 0
    del first
    assert idle() == 8 * MIB
    second = output(8 * MIB)
    assert abs(second.data_ptr() - address) <= BLOCK  # an idle neighbour may have joined it
    assert idle() == 0


def test_small_outputs_do_not_enter_the_pool() -> None:
    del [output(MIB - 1024)][0]
    assert idle() == 0
    del [output(MIB)][0]
    assert idle() == BLOCK


def test_a_view_keeps_the_block() -> None:
    whole = output(4 * MIB)
    part = whole[5:7, 3]
    del whole
    assert idle() == 0
    other = output(4 * MIB)
    assert (part == 0.5).all()
    assert other.data_ptr() != part.data_ptr() - part.storage_offset() * 4
    del part, other
    assert idle() == 8 * MIB


def test_blocks_are_split_and_joined() -> None:
    del [output(16 * MIB)][0]
    halves = [output(8 * MIB), output(8 * MIB)]
    assert idle() == 0
    assert abs(halves[0].data_ptr() - halves[1].data_ptr()) <= 8 * MIB + BLOCK
    halves.clear()
    assert idle() == 16 * MIB
    whole = output(16 * MIB)
    assert idle() == 0
    assert (whole == 0.5).all()


def test_a_larger_output_replaces_idle_bytes() -> None:
    """What does not fit is not kept beside the new mapping: growing sizes do not pile up."""
    for size in (4, 8, 16, 32):
        del [output(size * MIB)][0]
        assert idle() <= size * MIB


def test_empty_cache_gives_everything_back() -> None:
    kept = output(4 * MIB)
    del [output(8 * MIB)][0]
    assert idle() == 8 * MIB
    assert memory.empty_cache() >= 8 * MIB
    assert memory.cached_bytes() == 0
    assert memory.empty_cache() == 0
    assert (kept == 0.5).all()


def test_limit_bounds_what_lies_idle() -> None:
    with cache_limit(6 * MIB):
        assert memory.cache_limit() == 6 * MIB
        outputs = [output(4 * MIB) for _ in range(4)]
        outputs.clear()
        assert memory.cached_bytes() == 6 * MIB
        memory.set_cache_limit(3 * MIB)  # not a multiple of a huge page
        assert memory.cached_bytes() <= 3 * MIB
    assert memory.cache_limit() > 6 * MIB


def test_limit_of_zero_turns_the_pool_off() -> None:
    p = problem(2, 4, 16, (65, 65))
    pooled = run(p)
    with cache_limit(0):
        plain = run(p)
        assert memory.cached_bytes() == 0
    for got, wanted in zip(plain, pooled, strict=True):
        assert_same_bits(got, wanted)
    alive = output(4 * MIB)
    with cache_limit(0):
        del alive  # a block from before
        assert memory.cached_bytes() == 0


def test_negative_limit_is_an_error() -> None:
    with pytest.raises(ValueError, match="num_bytes must be 0 or more, and below 2\\*\\*63, got -1"):
        memory.set_cache_limit(-1)


@pytest.mark.parametrize(("text", "limit"), [("64", 64 * MIB), ("0", 0), ("many", None), ("", None)])
def test_limit_from_the_environment(text: str, limit: int | None) -> None:
    program = "from tsbn_kernels import memory; print(memory.cache_limit())"
    default = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE") // 4
    got = int(python_output(program, TSBN_POOL_LIMIT_MB=text))
    assert 0 <= (default if limit is None else limit) - got < BLOCK


def test_threads_share_the_pool() -> None:
    """Outputs made and dropped by several threads at once never overlap."""
    failures: list[str] = []

    def work(seed: int) -> None:
        x = torch.full((2048, 256), float(seed))
        bias = torch.full((1, 256), float(seed))
        zeros = torch.zeros(1, 256)
        for _ in range(30):
            y = torch.ops.tsbn.forward_eval(x, zeros, bias, zeros, zeros + 1, 1, 0.0, "sigmoid", "task_major")
            if not (y == 1.5 * seed).all():
                failures.append(f"thread {seed}")

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    assert memory.cached_bytes() <= 4 * 3 * BLOCK  # for each thread: output, next output, workspace


def test_outputs_outlive_the_interpreter_and_a_fork() -> None:
    """A tensor that is alive at exit is freed late; a forked child uses its copy of the pool."""
    program = """
import os, torch, tsbn_kernels
x = torch.randn(8, 16, 64, 64)
alive = torch.ops.tsbn.forward_training(x, torch.zeros(2, 16), None, 2, 1e-5, "sigmoid", "task_major")
pid = os.fork()
if pid == 0:
    zeros = torch.zeros(1, 16)
    again = torch.ops.tsbn.forward_eval(x, zeros, None, zeros, zeros + 1, 1, 1e-5, "sigmoid", "task_major")
    os._exit(0 if again.isfinite().all() else 1)
print(os.waitpid(pid, 0)[1])
"""
    assert python_output(program, OMP_NUM_THREADS="1").strip() == "0"


PEAK = """
import re, sys, torch
from tsbn_kernels import memory
from tsbn_kernels.functional import task_batch_norm, task_layer_norm, task_rms_norm
torch.set_num_threads(2)
def status(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
def step(x, dy, weight):
    y = {"BN": task_batch_norm, "LN": task_layer_norm, "RMS": task_rms_norm}[sys.argv[3]](x, weight, num_tasks=8)
    return torch.autograd.grad(y, (x, weight), dy)[0]
dtype, memory_format = getattr(torch, sys.argv[1]), getattr(torch, sys.argv[2])
def inputs(N, C, side):
    samples = [torch.randn(C, side, side).to(dtype).expand(N, -1, -1, -1) for _ in range(2)]  # all alike: drawn soon
    x, dy = (sample.contiguous(memory_format=memory_format) for sample in samples)
    return x.requires_grad_(), dy, torch.zeros(8, C if sys.argv[3] == "BN" else side, requires_grad=True)
small = inputs(16, 16, 64)  # loads what the first call loads
step(*small)
del small
memory.empty_cache()
x, dy, weight = inputs(64, 64, 128 if dtype == torch.bfloat16 else 91)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again
before = status("VmRSS")
dx = step(x, dy, weight)
first = status("VmHWM") - before
del dx
dx = step(x, dy, weight)
second = status("VmHWM") - before
print(x.nbytes, first, second)
"""


@pytest.mark.parametrize(
    ("norm", "memory_format"), [*(("BN", name) for name in FORMATS), ("LN", "contiguous"), ("RMS", "contiguous")]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_input_output_and_gradients(dtype: str, norm: str, memory_format: str) -> None:
    """Within 2%: x and dy are there before; y and dx are all that comes, and a second step adds nothing."""
    name = {"contiguous": "contiguous_format"}.get(memory_format, memory_format)
    program = PEAK.replace("sys.argv[1]", repr(dtype)).replace("sys.argv[2]", repr(name))
    program = program.replace("sys.argv[3]", repr(norm))
    done = python(program)
    if "clear_refs" in done.stderr:
        pytest.skip("this system does not let the peak start again")
    assert done.returncode == 0, done.stderr
    size, first, second = map(int, done.stdout.split())
    assert size > 100 * MIB
    assert 2 * size + first <= 4 * size * 1.02
    assert second <= first + 0.01 * size
