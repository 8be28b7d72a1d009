"""Compiling the C++ core once, into a cache of the user."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

_SOURCES = Path(__file__).parent / "core"
# The core's results are IEEE's: no contraction to fma, no assumption about the rounding mode.
_FLAGS = [
    "-std=c++20",
    "-O2",
    "-ftree-vectorize",
    "-march=native",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-ffp-contract=off",
    "-frounding-math",
    "-fno-math-errno",
]


def cache_directory() -> Path:
    """Where compiled things are kept: $PTXVM_CACHE, or ptxvm in the user's cache."""
    root = os.environ.get("PTXVM_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ptxvm"


def digest(*parts: str | bytes) -> str:
    """A key for the cache."""
    return hashlib.sha256(b"\0".join(p.encode() if isinstance(p, str) else p for p in parts)).hexdigest()[:20]


@contextmanager
def missing(made: Path, lock: Path) -> Iterator[bool]:
    """Says whether a file of the cache is to be made; of several processes that ask, one makes it, the others wait."""
    if made.exists():
        yield False
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield not made.exists()


@cache
def core() -> ModuleType:
    """The compiled core; the first call on a machine compiles it."""
    compiler = os.environ.get("CXX", "g++")
    sources = [path.read_bytes() for path in sorted(_SOURCES.glob("*.[ch]pp"))]
    directory = cache_directory() / f"core-{digest(*sources, _resolved(compiler), sys.version, platform.machine())}"
    library = directory / f"ptxvm_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    with missing(library, directory.with_suffix(".lock")) as needed:
        if needed:
            with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
                _compile(Path(scratch), compiler, library.name)
                directory.mkdir(exist_ok=True)
                os.replace(Path(scratch) / library.name, library)
    loader = ExtensionFileLoader("ptxvm_core", str(library))
    module = module_from_spec(ModuleSpec(loader.name, loader, origin=loader.path))
    loader.exec_module(module)
    return module


def _resolved(compiler: str) -> str:
    """What the compiler makes of the flags on this processor: -march=native must not be shared between machines."""
    command = [compiler, *_FLAGS, "-Q", "--help=target"]
    return " ".join(command) + subprocess.run(command, check=False, capture_output=True, text=True).stdout


def _compile(directory: Path, compiler: str, library: str) -> None:
    import pybind11

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    objects = {source: f"{source.stem}.o" for source in sorted(_SOURCES.glob("*.cpp"))}
    (directory / "build.ninja").write_text(
        f"flags = {' '.join(_FLAGS + includes)}\n"
        f"rule compile\n  command = {compiler} $flags -c $in -o $out\n"
        f"rule link\n  command = {compiler} -shared $in -o $out\n"
        + "".join(f"build {name}: compile {source}\n" for source, name in objects.items())
        + f"build {library}: link {' '.join(objects.values())}\n"
    )
    beside = Path(sys.executable).with_name("ninja")
    ninja = shutil.which("ninja") or (str(beside) if beside.exists() else None)
    if ninja is None:
        raise RuntimeError("the core of ptxvm needs ninja to build: pip install ninja")
    done = subprocess.run([ninja, "-C", str(directory)], check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the core of ptxvm does not compile:\n{done.stdout}{done.stderr}")
