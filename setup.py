"""Builds ``tsbn_kernels/_native.so`` from csrc/ through PyTorch's stable ABI.

The library has no Python symbols and uses only the stable ABI of PyTorch 2.10: one binary serves every Python and every
later PyTorch. Without a compiler or PyTorch at build time the package is installed without it.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp"))
HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))


def native_extension() -> list[Extension]:
    """The extension, or none where PyTorch is missing."""
    try:
        import torch
    except ImportError as error:
        print(f"tsbn-kernels: built without native kernels, the reference is used instead: {error}", file=sys.stderr)
        return []
    torch_root = Path(torch.__file__).parent
    extension = Extension(
        "tsbn_kernels._native",
        SOURCES,
        depends=HEADERS,
        include_dirs=["csrc"],
        library_dirs=[str(torch_root / "lib")],
        libraries=["torch_cpu", "c10"],
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        # PyTorch's headers are system headers: their warnings are not ours. sqrt without errno can be vectorised.
        extra_compile_args=[
            "-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra",
            "-isystem", str(torch_root / "include"),
        ],
        extra_link_args=["-s"],
        language="c++",
    )  # fmt: skip
    extension.optional = True  # a failed build is a warning
    return [extension]


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
        super().build_extension(ext)


class AnyPythonWheel(bdist_wheel):
    """Tags the wheel ``py3-none-<platform>``: see the module's docstring."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(ext_modules=native_extension(), cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel})
