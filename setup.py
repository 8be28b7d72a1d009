"""Builds ``tsbn_kernels/_native.so`` and ``tsbn_kernels/_cuda.so`` from csrc/ through PyTorch's stable ABI.

The libraries have no Python symbols and use only the stable ABI of PyTorch 2.10: one binary serves every Python and
every later PyTorch. A library whose tools are missing (no PyTorch, no compiler, no nvcc) is left out, and a line says
so. One whose tools are there and that does not compile is an error, on Linux: as pip shows no warnings, nobody would
know why the slow reference runs. ``TSBN_BUILD_CPU=0`` and ``TSBN_BUILD_CUDA=0`` leave a library out.

The CUDA library needs an nvcc and a CUDA build of PyTorch of the same major version, and no GPU.
``TORCH_CUDA_ARCH_LIST`` chooses its architectures. ``TSBN_SANITIZE`` (``address`` or ``thread``) instruments the CPU
library, for tools/sanitize.py.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
SANITIZERS: dict[str | None, list[str]] = {
    None: ["-O3", "-g0"],
    # Without the checks of each pointer for null and its object's size, which are most of the compiler's work.
    "address": [
        "-O1",
        "-g1",
        "-fsanitize=address,undefined",
        "-fno-sanitize=null,object-size,vptr,return",
        "-fno-sanitize-recover=all",
        "--param",
        "asan-stack=0",
    ],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
}
ARCHITECTURES = ("7.5", "8.0", "8.6", "9.0", "10.0", "12.0")


def files(*patterns: str) -> list[str]:
    """Files under csrc/, relative to the root."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


def extensions() -> list[Extension]:
    """The libraries that can be built here."""
    try:
        import torch
    except ImportError as error:
        print(f"tsbn-kernels: built without native kernels, the reference is used instead: {error}", file=sys.stderr)
        return []
    torch_root = Path(torch.__file__).parent
    found = []
    nvcc, no_nvcc = find_nvcc(torch.version.cuda)
    if reason := left_out("CPU") or no_compiler():
        print(f"tsbn-kernels: built without native kernels: {reason}", file=sys.stderr)
    else:
        found.append(library("_native", torch_root, files("*.cpp", "cpu/*.cpp"), files("*.h", "cpu/*.h")))
    if reason := left_out("CUDA") or no_compiler() or no_nvcc:
        print(f"tsbn-kernels: built without CUDA C++ kernels: {reason}", file=sys.stderr)
    else:
        cuda = library("_cuda", torch_root, files("cuda/*.cpp"), files("*.h", "cuda/*"))
        cuda.nvcc = nvcc
        found.append(cuda)
    return found


def left_out(name: str) -> str:
    """Why a library is not wanted, or nothing."""
    variable = f"TSBN_BUILD_{name}"
    return f"{variable} is 0" if os.environ.get(variable) == "0" else ""


def no_compiler() -> str:
    """Why there is no C++ compiler, or nothing."""
    command = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    return "" if shutil.which(command.split()[0]) else f"no C++ compiler ({command})"


def library(name: str, torch_root: Path, sources: list[str], headers: list[str]) -> Extension:
    """A library of operators."""
    sanitizer = os.environ.get("TSBN_SANITIZE")
    instrumented = SANITIZERS[sanitizer]
    extension = Extension(
        f"tsbn_kernels.{name}",
        sources,
        depends=headers,
        include_dirs=["csrc"],
        library_dirs=[str(torch_root / "lib")],
        libraries=["torch_cpu", "c10"],
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        # PyTorch's headers are system headers: their warnings are not ours. sqrt without errno can be vectorised.
        extra_compile_args=[
            "-std=c++17",
            *instrumented,
            "-fno-math-errno",
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            "-isystem",
            str(torch_root / "include"),
        ],
        extra_link_args=["-s"] if sanitizer is None else instrumented,
        language="c++",
    )
    extension.optional = sys.platform != "linux"  # elsewhere nobody has built it: a failure is a warning
    return extension


def find_nvcc(torch_cuda: str | None) -> tuple[str | None, str]:
    """nvcc, or why there is none for this PyTorch."""
    if torch_cuda is None:
        return None, "this PyTorch has no CUDA"
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    homes += sorted(map(str, (Path(sysconfig.get_path("purelib")) / "nvidia").glob("cu*")), reverse=True)
    candidates = [shutil.which("nvcc"), *(str(Path(home) / "bin" / "nvcc") for home in homes if home)]
    nvcc = next((path for path in candidates if path and Path(path).exists()), None)
    if nvcc is None:
        return None, "no nvcc on the PATH, in CUDA_HOME, or in a wheel"
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    version = re.search(r"release (\d+)\.", done.stdout)
    if version is None or version[1] != torch_cuda.split(".")[0]:
        return None, f"{nvcc} is of CUDA {version[1] if version else '?'}, PyTorch of {torch_cuda}"
    return nvcc, ""


def default_architectures(nvcc: str) -> str:
    """Those of ours that this nvcc knows, the last also as PTX, for what comes later."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    return ";".join(number for number in ARCHITECTURES if f"compute_{number.replace('.', '')}" in known) + "+PTX"


def gencode(architectures: str) -> list[str]:
    """Nvcc's flags for a list such as ``8.0;9.0+PTX``."""
    flags = []
    for entry in re.split(r"[;,\s]+", architectures.strip()):
        number = re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", entry)
        if number is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST: {entry!r} is not like 9.0 or 9.0+PTX")
        name = number[1] + number[2] + number[3]
        flags.append(f"-gencode=arch=compute_{name},code=sm_{name}")
        if number[4]:
            flags.append(f"-gencode=arch=compute_{name},code=compute_{name}")
    return flags


class BuildNative(build_ext):
    """Names the library without a Python version, and compiles its files in parallel."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        compile_one = self.compiler.compile

        def compile_all(sources: list[str], **options: object) -> list[str]:
            with ThreadPoolExecutor(cpu_count()) as pool:
                objects = pool.map(lambda source: compile_one([source], **options), sources)
                return [name for names in objects for name in names]

        self.compiler.compile = compile_all
        try:
            if hasattr(ext, "nvcc"):
                self.compile_kernels(ext)
            super().build_extension(ext)
        except Exception:
            variable = "TSBN_BUILD_CUDA" if hasattr(ext, "nvcc") else "TSBN_BUILD_CPU"
            print(f"tsbn-kernels: {ext.name} does not build, see above; {variable}=0 leaves it out", file=sys.stderr)
            raise
        finally:
            self.compiler.compile = compile_one

    def compile_kernels(self, ext: Extension) -> None:
        """Nvcc's part of the CUDA library; the runtime is linked statically, so no version of it must be found."""
        command = [
            ext.nvcc,
            "-std=c++17",
            "-O3",
            "-Xcompiler",
            "-fPIC,-fvisibility=hidden",
            "--threads",
            str(cpu_count()),
            *gencode(os.environ.get("TORCH_CUDA_ARCH_LIST") or default_architectures(ext.nvcc)),
        ]
        try:
            ext.extra_objects = []
            for source in files("cuda/*.cu"):
                target = Path(self.build_temp) / Path(source).with_suffix(".o")
                target.parent.mkdir(parents=True, exist_ok=True)
                self.spawn([*command, "-c", source, "-o", str(target)])
                ext.extra_objects.append(str(target))
            ext.extra_objects += self.static_runtime(ext.nvcc)
            for folder in self.toolkit(ext.nvcc, "-I", "include"):
                ext.extra_compile_args += ["-isystem", folder]
        except Exception as error:
            raise CompileError(str(error)) from error

    def static_runtime(self, nvcc: str) -> list[str]:
        """libcudart_static.a of the toolkit that nvcc belongs to, and what it needs."""
        folders = self.toolkit(nvcc, "-L", "lib")
        for folder in folders:
            runtime = Path(folder) / "libcudart_static.a"
            if runtime.exists():
                return [str(runtime), "-ldl", "-lrt", "-lpthread"]
        raise CompileError(f"no libcudart_static.a in {', '.join(folders)}")

    def toolkit(self, nvcc: str, flag: str, otherwise: str) -> list[str]:
        """The folders that nvcc gives to the host's compiler with a flag; the last is where one would look."""
        dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=False)
        return [*re.findall(flag + r'"?([^"\s]+)', dry.stderr), str(Path(nvcc).resolve().parents[1] / otherwise)]


class AnyPythonWheel(bdist_wheel):
    """Tags the wheel ``py3-none-<platform>``: see the module's docstring."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel})
