"""Loud uninitialised memory in every test, and the fixtures that several files use."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections import Counter
from collections.abc import Generator, Iterator

import pytest
import torch
from hypothesis import settings
from support.backends import BACKENDS, instruction_sets, on_backend, streaming_from
from support.descendants import end_with_this_process

from tsbn_kernels.backends import cpu

# The same examples on every run: what fails on one machine fails on all.
settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("tests")

pytest_plugins = ["gpu_check"]
M_PERTURB = -6
# Files of fewer than 120 tests that take 8 s or more, the longest first: among those of few tests they would come last.
FIRST = (
    "test_cuda_together.py",
    "test_cuda_running.py",
    "test_cuda_compile.py",  # two minutes, where the CUDA library is older than its sources
    "test_compile.py",
    "test_gpu_day.py",
    "test_gpu_check.py",
    "test_convert.py",
    "test_triton_kernels.py",
    "test_triton_layer_norm.py",
    "test_benchmarks_cli.py",
    "test_examples.py",
    "test_fuzz.py",
    "test_triton_fan_out.py",
    "test_parting.py",
    "test_regressions.py",
    "test_triton_epilogue.py",
    "test_multitask.py",
    "test_train_cli.py",
    "test_dense_train.py",
    "test_dense_networks.py",
    "test_studies.py",
    "test_on_models.py",
    "test_mixing.py",
    "test_report.py",
    "test_autograd_synchronized.py",
    "test_sharding.py",
    "test_distributed.py",
    "test_transforms.py",
    "test_descendants.py",
    "test_torch_export.py",
    "test_triton_compiled.py",
    "test_triton_gate.py",
    "test_build.py",
    "test_wheel.py",
)


def pytest_configure() -> None:
    """Lets no rank, worker or command that a test has started outlive the tests, and gives each of them one thread.

    With a thread for each core, of which other workers need one, the kernels' tests take twice the time of a processor.
    Those of threads ask for as many as they want: they show that no number of them changes a bit. Where
    OMP_NUM_THREADS is set, all others have so many. Inductor, which has little to compile here, starts no processes for
    that, which would import PyTorch again, and takes the processor's word for its vector instructions, without five
    programs that try the compiler's.
    """
    end_with_this_process()
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"  # of workers that start after this, and all that tests start
        torch.set_num_threads(1)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # else threads that wait spin for a while
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Looks for no garbage while the test files are imported: it would take a third of the time, and find none."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """One more than there are cores: a test that waits for a program, or for a time, leaves its core to another."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ or not hasattr(os, "sched_getaffinity"):
        return None  # as xdist says
    return len(os.sched_getaffinity(0)) + 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what "avx512_bf16" would repeat: it has kernels of its own for bfloat16 alone.

    The files that take long come first, then those with many tests: else one process ends with them, alone.
    """
    repeated = [item for item in items if _repeats_avx512(**getattr(getattr(item, "callspec", None), "params", {}))]
    config.hook.pytest_deselected(items=repeated)
    items[:] = [item for item in items if item not in repeated]
    tests_of = Counter(item.path for item in items)
    ranks = {name: rank for rank, name in enumerate(FIRST)}
    items.sort(key=lambda item: (ranks.get(item.path.name, len(FIRST)), -tests_of[item.path], item.path))


def _repeats_avx512(
    kernels: str = "", instruction_set: str = "", dtype: torch.dtype = torch.bfloat16, **_: object
) -> bool:
    return "avx512_bf16" in (kernels, instruction_set) and dtype != torch.bfloat16


@pytest.fixture(autouse=True, scope="module")
def _settled_objects() -> None:
    """Garbage is not looked for in what earlier files left: a benchmark asks for it dozens of times, a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _loud_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fresh memory from malloc holds 0x7f in each byte: 3e38 in float32 and bfloat16, NaN in float16.

    Blocks of the pool are filled with NaN where a test says so, by ``support.fill_cache_with_nan``; PyTorch's own empty
    tensors hold NaN by ``fill_uninitialized_memory``, which does not reach the native outputs.
    """
    if (request.config.option.device or "cpu") != "cpu":  # its tests do so for their calls: on_gpu.calls.run
        yield  # not all that PyTorch does there can be deterministic
        return
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):
        libc.mallopt(M_PERTURB, 0x80)
    yield
    if libc is not None and hasattr(libc, "mallopt"):
        libc.mallopt(M_PERTURB, 0)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Without a GPU not by ``torch.manual_seed``, which formats a stack for each kind of device that is not there."""
    (torch.manual_seed if request.config.option.device else torch.default_generator.manual_seed)(0)


@pytest.fixture
def native() -> None:
    """For tests of the native library itself."""
    if not cpu.available:
        pytest.skip("the native library was not built")


@pytest.fixture
def streamed() -> Iterator[int]:
    """The bytes from which on outputs are written by streaming stores in a test: fewer than the 8 MiB of all others."""
    if not cpu.available:
        yield 1 << 20
        return
    with streaming_from(1 << 20):
        yield 1 << 20


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """For tests that run on every backend that takes CPU tensors; see :func:`support.on_backend`."""
    with on_backend(request.param):
        yield request.param


@pytest.fixture(params=[*(instruction_sets() or ["native"]), *BACKENDS[1:]])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend; the native one once for each instruction set."""
    if request.param in instruction_sets():
        cpu.set_instruction_set(request.param)
        try:
            yield "native"
        finally:
            cpu.set_instruction_set("")
    else:
        with on_backend(request.param):
            yield request.param
