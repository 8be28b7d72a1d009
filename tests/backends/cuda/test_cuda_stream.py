"""The library as it was built, up to the driver: what stands between a call and the CUDA runtime is found.

There is no GPU, so the guard of the device is a stand-in that is loaded first; the rest is the library's and PyTorch's.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from support.processes import python

from tsbn_kernels.backends import cuda

pytestmark = [
    pytest.mark.skipif(not cuda.available, reason="the CUDA library was not built, or this PyTorch has no CUDA"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]

GUARD = """
extern "C" int aoti_torch_create_device_guard(int, void** guard) { *guard = &guard; return 0; }
extern "C" int aoti_torch_delete_device_guard(void*) { return 0; }
"""
# As where libtorch_cuda.so was not loaded.
NOT_LOADED = """
#include <dlfcn.h>
extern "C" void* dlopen(const char* name, int flags) {
  if (flags & RTLD_NOLOAD) return nullptr;
  return reinterpret_cast<void* (*)(const char*, int)>(dlsym(RTLD_NEXT, "dlopen"))(name, flags);
}
"""
PROGRAM = """
import torch
from tsbn_kernels.backends import cuda
from tsbn_kernels.definition.options import Options
from tsbn_kernels.backends.plan import DEVICES
cuda.launches.device_of = lambda _: DEVICES["A100"]
cuda.forward_training(torch.ones(4, 3, 8), torch.ones(2, 3), None, None, Options(2, 1e-5, "sigmoid", "task_major"))
"""


def failure(folder: Path, stand_in: str) -> str:
    """What a launch fails with on a machine without a GPU, where `stand_in` was loaded before PyTorch."""
    library = folder / "stand_in.so"
    command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library), "-ldl"]
    subprocess.run(command, input=stand_in, text=True, check=True)
    done = python(PROGRAM, fresh=True, LD_PRELOAD=str(library), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1, done.stderr
    return done.stderr


def test_the_stream_is_found(tmp_path: Path) -> None:
    """PyTorch loads libtorch_cuda.so for itself alone, so a search among what all libraries see misses it."""
    error = failure(tmp_path, GUARD)
    assert "tsbn: " not in error
    assert "get(device, &stream) API call failed" in error
    assert "CUDA error" in error or "NVIDIA driver" in error


def test_without_cuda_a_launch_says_so(tmp_path: Path) -> None:
    assert "tsbn: this PyTorch has no CUDA" in failure(tmp_path, GUARD + NOT_LOADED)
