"""What is asked of the CUDA runtime, with one that notes it and refuses what a test wants it to refuse."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_source import CSRC

from tools.ptxvm import find_nvcc

NVCC = find_nvcc()
pytestmark = pytest.mark.skipif(NVCC is None or shutil.which("g++") is None, reason="no nvcc or no g++")

# Attributes of a kernel, in the order in which the runtime numbers them.
SHARED, CARVEOUT, CLUSTERS = 8, 9, 14
INVALID, NOT_SUPPORTED, TOO_LARGE = 1, 801, 701
OPTIN = 232448

RUNTIME = r"""
#include <cuda_runtime_api.h>
#include <vector>
#include "launch.h"

extern "C" {
int refused[16], launch_error, occupancy_error, last_error, device, asked[16], launches, clusters_told, cooperates;
cudaLaunchConfig_t configuration;
cudaLaunchAttribute attribute;
const void* launched;

static cudaError_t answer(int error) {
  if (error) last_error = error;
  return cudaError_t(error);
}
cudaError_t cudaGetDevice(int* to) { *to = device; return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* to, cudaDeviceAttr which, int) {
  *to = which == cudaDevAttrCooperativeLaunch ? cooperates : which == cudaDevAttrMultiProcessorCount ? 132 : 232448;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* to, const void*, int threads, size_t shared) {
  *to = threads == 256 && shared == 1 << 16 ? clusters_told : -1;
  return answer(occupancy_error);
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute which, int value) {
  asked[which] = value;
  ++asked[0];
  return answer(refused[which]);
}
cudaError_t cudaGetLastError() { const int error = last_error; last_error = 0; return cudaError_t(error); }
const char* cudaGetErrorString(cudaError_t error) { return error == 701 ? "too many resources" : "something else"; }
static void note(const cudaLaunchConfig_t* c) {
  configuration = *c;
  if (c->numAttrs) attribute = c->attrs[0];
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* kernel, void**) {
  note(c);
  launched = kernel;
  ++launches;
  return answer(launch_error);
}
cudaError_t cudaOccupancyMaxActiveClusters(int* to, const void*, const cudaLaunchConfig_t* c) {
  note(c);
  *to = clusters_told;
  return answer(occupancy_error);
}
const char* call_launch(const int64_t* numbers) {
  tsbn::cuda::Params params{};
  return tsbn::cuda::launch(*reinterpret_cast<const tsbn::cuda::Launch*>(numbers), &params, (void*)7);
}
int call_active_clusters(const int64_t* numbers) {
  return tsbn::cuda::active_clusters(*reinterpret_cast<const tsbn::cuda::Launch*>(numbers));
}
unsigned grid() { return configuration.gridDim.x; }
unsigned block() { return configuration.blockDim.x; }
size_t shared() { return configuration.dynamicSmemBytes; }
size_t stream() { return size_t(configuration.stream); }
unsigned cluster() {
  const bool one = configuration.numAttrs == 1 && attribute.id == cudaLaunchAttributeClusterDimension;
  return configuration.numAttrs == 0 ? 1 : one ? attribute.val.clusterDim.x : 0;
}
int together() {
  const bool one = configuration.numAttrs == 1 && attribute.id == cudaLaunchAttributeCooperative;
  return one && attribute.val.cooperative == 1;
}
}
namespace tsbn::cuda {
const void* kernel_of(const Launch& l) {
  return reinterpret_cast<const void*>(1 + l.dtype + 4 * l.access + 12 * l.pass);
}
const void* row_kernel_of(const Launch& l) { return kernel_of(l); }
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runtime")
    (folder / "fake.cpp").write_text(RUNTIME)
    built, sources = folder / "runtime.so", [CSRC / "runtime.cpp", folder / "fake.cpp"]
    compiler = [NVCC, "-x", "c++", "-std=c++17", "-I", CSRC, "-Xcompiler", "-fPIC"]
    linker = ["-shared", "-cudart", "none", "-Xlinker", "-Bsymbolic", "-o", built]
    subprocess.run([*compiler, *linker, *sources], check=True)
    return built


@pytest.fixture
def runtime(library: Path, tmp_path: Path) -> ctypes.CDLL:
    """A copy of its own: kernels are prepared once in a process."""
    fresh = ctypes.CDLL(shutil.copy(library, tmp_path / "fresh.so"))
    fresh.call_launch.restype = ctypes.c_char_p
    fresh.shared.restype = fresh.stream.restype = ctypes.c_size_t
    return fresh


def numbers(cluster: int = 1, blocks: int = 64, shared: int = 1 << 16, pass_: int = 0, together: int = 0) -> Any:
    return (ctypes.c_int64 * 8)(0, 1, pass_, blocks, 256, cluster, shared, together)


def get(runtime: ctypes.CDLL, name: str) -> int:
    return ctypes.c_int.in_dll(runtime, name).value


def put(runtime: ctypes.CDLL, name: str, value: int) -> None:
    ctypes.c_int.in_dll(runtime, name).value = value


def test_a_launch(runtime: ctypes.CDLL) -> None:
    for count, cluster in enumerate((1, 8), 1):
        assert runtime.call_launch(numbers(cluster)) is None
        assert (runtime.grid(), runtime.block(), runtime.shared(), runtime.stream()) == (64, 256, 1 << 16, 7)
        assert runtime.cluster() == cluster
        assert get(runtime, "launches") == count
        assert not runtime.together()
    assert runtime.call_launch(numbers(together=1)) is None
    assert runtime.together()


def test_a_kernel_is_prepared_once_for_each_device(runtime: ctypes.CDLL) -> None:
    asked = (ctypes.c_int * 16).in_dll(runtime, "asked")
    counts = []
    for device, pass_ in ((0, 0), (0, 0), (1, 0), (1, 0), (0, 1), (0, 0)):
        put(runtime, "device", device)
        runtime.call_launch(numbers(pass_=pass_))
        counts.append(asked[0])
    assert counts == [3, 3, 6, 6, 9, 9]
    assert (asked[SHARED], asked[CARVEOUT], asked[CLUSTERS]) == (OPTIN, 100, 1)


@pytest.mark.parametrize("which", [SHARED, CARVEOUT, CLUSTERS])
@pytest.mark.parametrize("call", ["launch", "active_clusters"])
def test_what_is_refused_is_not_fatal(runtime: ctypes.CDLL, which: int, call: str) -> None:
    """Clusters of 16 do not exist on sm_120, and a kernel without clusters needs none."""
    (ctypes.c_int * 16).in_dll(runtime, "refused")[which] = NOT_SUPPORTED
    put(runtime, "clusters_told", 5)
    for _ in range(2):
        made = runtime.call_launch(numbers()) is None if call == "launch" else runtime.call_active_clusters(numbers(4))
        assert made
        assert get(runtime, "last_error") == 0
    assert (ctypes.c_int * 16).in_dll(runtime, "asked")[CLUSTERS] == 1  # the others are asked for all the same


def test_a_launch_that_fails(runtime: ctypes.CDLL) -> None:
    """It is told, and nobody else finds the error."""
    put(runtime, "launch_error", TOO_LARGE)
    assert runtime.call_launch(numbers()) == b"too many resources"
    assert get(runtime, "last_error") == 0
    put(runtime, "launch_error", 0)
    assert runtime.call_launch(numbers()) is None


def test_clusters_at_a_time(runtime: ctypes.CDLL) -> None:
    put(runtime, "clusters_told", 7)
    assert runtime.call_active_clusters(numbers(16)) == 7
    assert (runtime.cluster(), runtime.block(), runtime.shared()) == (16, 256, 1 << 16)
    put(runtime, "occupancy_error", INVALID)
    assert runtime.call_active_clusters(numbers(16)) == 0
    assert get(runtime, "last_error") == 0


def test_blocks_that_run_together(runtime: ctypes.CDLL) -> None:
    """Those of all multiprocessors, on a device that launches them so; else none."""
    put(runtime, "clusters_told", 2)
    assert runtime.call_active_clusters(numbers(together=1)) == 0
    put(runtime, "cooperates", 1)
    assert runtime.call_active_clusters(numbers(together=1)) == 264
    put(runtime, "occupancy_error", INVALID)
    assert runtime.call_active_clusters(numbers(together=1)) == 0
    assert get(runtime, "last_error") == 0


def test_the_backend_asks_for_what_it_would_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    from tsbn_kernels.backends import cuda
    from tsbn_kernels.backends.plan import DEVICES, Work
    from tsbn_kernels.backends.plan import cuda as rules

    def choice(answer: Callable[..., int]) -> rules.CudaPlan:
        monkeypatch.setattr(torch.ops.tsbn, "_cuda_active_clusters", answer, raising=False)
        clusters = cuda.batch_norm.clusters(torch.bfloat16, torch.device("cuda", 3))
        return rules.plan.__wrapped__(Work(40, 256, 128, 1024, 2), DEVICES["H100"], clusters)

    asked = []
    assert choice(lambda numbers, index: asked.append((*numbers, index)) or 132 // numbers[5]).cluster > 1
    assert {numbers[5] for numbers in asked} == {2, 4, 8, 16}
    assert all(numbers[3] % numbers[5] == 0 and numbers[-1] == 3 for numbers in asked)
    assert choice(lambda *_: 0).cluster == 1
