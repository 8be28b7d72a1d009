"""The wheel: one file for every Python and every PyTorch from 2.10 on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from support.processes import ROOT

import tsbn_kernels
from tsbn_kernels.backends import cpu


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    parts = ("csrc", "tsbn_kernels", "pyproject.toml", "setup.py", "README.md", "LICENSE")
    source.mkdir()
    for part in parts:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, source / part)
    if (built := source / "tsbn_kernels" / "_native.so").exists():
        # It is built once: the build finds it in its place, newer than its sources.
        place = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        (source / "build" / place / "tsbn_kernels").mkdir(parents=True)
        shutil.copy(built, source / "build" / place / "tsbn_kernels")
        built.unlink()
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir"]
    environment = {**os.environ, "TSBN_BUILD_CUDA": "0"}  # a minute, and nothing new
    subprocess.run([*command, str(folder), str(source)], check=True, env=environment)
    return next(folder.glob("*.whl"))


def test_tag_names_the_version_and_no_python(wheel: Path) -> None:
    _, version, python, abi, platform = wheel.stem.split("-")
    assert version == tsbn_kernels.__version__
    assert (python, abi) == ("py3", "none")
    assert platform != "any"


def test_library_has_no_python_symbols_and_is_inside(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "tsbn_kernels/_native.so" in names
    assert "tsbn_kernels/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "csrc"))]
    assert b"PyInit" not in zipfile.ZipFile(wheel).read("tsbn_kernels/_native.so")


@pytest.mark.skipif(not cpu.available, reason="no compiler")
def test_installed_wheel_passes_a_smoke_test(wheel: Path, tmp_path: Path) -> None:
    """Unpacked beside the PyTorch of this environment; other versions of PyTorch are tried by ``make wheel-check``."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    run = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "smoke.py")],
        check=False,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[1:] == [str(tmp_path / "tsbn_kernels" / "__init__.py"), "True"]
