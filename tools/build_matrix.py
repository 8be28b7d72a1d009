"""``make build-matrix``: do the host's sources compile against the headers of every supported PyTorch?

``python tools/build_matrix.py 2.10.0 installed`` fetches the headers of the versions named (from the wheel for macOS, a
tenth of the others' size, with the same headers) into build/headers, and checks csrc/ against each, without code.
Symbols are checked where a wheel is loaded: ``make wheel-check``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from os import cpu_count
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What includes the CUDA toolkit's headers includes none of PyTorch's.
SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*.cpp") if "cuda_runtime" not in path.read_text())
PLATFORMS = ("macosx_11_0_arm64", "macosx_14_0_arm64")


def folder_of(version: str) -> Path:
    """Where the headers of a version that is fetched lie."""
    return ROOT / "build" / "headers" / version


def headers(version: str) -> Path:
    """The include folder of a PyTorch: "installed", or one that is fetched unless it was before."""
    if version == "installed":
        import torch

        return Path(torch.__file__).parent / "include"
    folder = folder_of(version)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            chosen = [f"--platform={platform}" for platform in PLATFORMS]
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *chosen]
            command += ["--python-version=3.12", f"--dest={scratch}", f"torch=={version}"]
            subprocess.run(command, check=True)
            wheel = zipfile.ZipFile(next(Path(scratch).glob("*.whl")))
            unpacked = Path(scratch) / "unpacked"
            wheel.extractall(unpacked, [name for name in wheel.namelist() if name.startswith("torch/include/")])
            unpacked.rename(folder)
    return folder / "torch" / "include"


def problems(source: Path, include: Path) -> str:
    """What the compiler says of a source; nothing where it compiles."""
    command = ["g++", "-std=c++17", "-fsyntax-only", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += ["-isystem", str(include), "-I", str(ROOT / "csrc"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stderr + f"{source}: status {done.returncode}\n"


def main(versions: list[str]) -> int:
    """Prints a line a version and what does not compile; returns how many versions have something that does not."""
    failed = 0
    for version in versions:
        include = headers(version)
        with ThreadPoolExecutor(cpu_count()) as pool:
            found = list(filter(None, pool.map(partial(problems, include=include), SOURCES)))
        print(f"PyTorch {version}: {len(SOURCES) - len(found)} of {len(SOURCES)} sources compile")
        sys.stderr.writelines(found)
        failed += bool(found)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
