"""What setup.py does where a tool is missing or fails, and the headers that csrc/ compiles against."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.processes import ROOT

from tools import build_matrix

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a failed build is a warning")
CUDA = torch.version.cuda
OLDEST = build_matrix.folder_of("2.10.0")


def tool(folder: Path, name: str, script: str) -> Path:
    """A program that stands in for a compiler."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Builds into ``folder``, never over the libraries in use."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder / "objects"]
    variables = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=240, check=False)


def test_a_missing_compiler_is_one_line(tmp_path: Path) -> None:
    done = build(tmp_path, CXX="no-such-compiler -m64")
    assert done.returncode == 0, done.stderr
    assert "built without native kernels: no C++ compiler (no-such-compiler -m64)" in done.stderr
    assert "built without CUDA C++ kernels: no C++ compiler" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_was_left_out_is_one_line(tmp_path: Path) -> None:
    done = build(tmp_path, TSBN_BUILD_CPU="0", TSBN_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        "tsbn-kernels: built without native kernels: TSBN_BUILD_CPU is 0",
        "tsbn-kernels: built without CUDA C++ kernels: TSBN_BUILD_CUDA is 0",
    ]


def test_a_failed_compiler_is_an_error(tmp_path: Path) -> None:
    done = build(tmp_path, CXX=str(tool(tmp_path, "broken", "echo a mistake >&2; exit 1")), TSBN_BUILD_CUDA="0")
    assert done.returncode != 0
    assert "a mistake" in done.stderr
    assert "tsbn_kernels._native does not build, see above; TSBN_BUILD_CPU=0 leaves it out" in done.stderr


@pytest.mark.skipif(CUDA is None or shutil.which("g++") is None, reason="no CUDA build of PyTorch, or no g++")
def test_a_failed_nvcc_is_an_error(tmp_path: Path) -> None:
    """This nvcc knows the older architectures alone: the newer ones are not asked of it."""
    script = f"""case $1 in
    --version) echo "Cuda compilation tools, release {CUDA}, V{CUDA}.1";;
    --list-gpu-arch) echo compute_80; echo compute_90;;
    *) echo "$@" >&2; exit 1;;
    esac"""
    path = f"{tool(tmp_path, 'nvcc', script).parent}{os.pathsep}{os.environ['PATH']}"
    done = build(tmp_path, PATH=path, TSBN_BUILD_CPU="0", TORCH_CUDA_ARCH_LIST="")
    assert done.returncode != 0
    assert "code=sm_80 -gencode=arch=compute_90,code=sm_90 -gencode=arch=compute_90,code=compute_90 -c" in done.stderr
    assert "tsbn_kernels._cuda does not build, see above; TSBN_BUILD_CUDA=0 leaves it out" in done.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_the_matrix_sees_what_does_not_compile(tmp_path: Path) -> None:
    source = tmp_path / "source.cpp"
    source.write_text("#include <torch/csrc/stable/tensor.h>\nint f() { NO_SUCH_MACRO(0); return 0; }\n")
    assert "NO_SUCH_MACRO" in build_matrix.problems(source, build_matrix.headers("installed"))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.skipif(not OLDEST.exists(), reason="`make build-matrix` has not fetched the headers")
@pytest.mark.parametrize("source", ["cuda/launch.cpp", "cpu/allocate.cpp"])
def test_the_oldest_headers_do(source: str) -> None:
    assert not build_matrix.problems(ROOT / "csrc" / source, build_matrix.headers("2.10.0"))


def test_the_matrix_has_every_source_that_includes_pytorch() -> None:
    with_torch = {path for path in (ROOT / "csrc").rglob("*.cpp") if "<torch/" in path.read_text()}
    assert with_torch and with_torch <= set(build_matrix.SOURCES)
    assert len(build_matrix.SOURCES) > len(with_torch)  # others include it by a header of ours
