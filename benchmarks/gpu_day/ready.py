"""Step: what must be there before anything is measured: the libraries for this device, and Triton's kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu_day.sources import ROOT
from benchmarks.gpu_day.step_api import Measurement, Setting, SkippedError

LIBRARIES = ("_native", "_cuda")
# In a process of its own: one that has loaded a library does not survive that another takes its place.
LOADS = """
from tsbn_kernels.backends import cpu, cuda
for name, backend in {"_native": cpu, "_cuda": cuda}.items():
    print(f"{name}: {'loads' if backend.available else backend.detail()}")
"""


def cases(setting: Setting) -> list[Measurement]:
    """The libraries, Triton's kernels, and a program that asks how many clusters the device holds."""
    found = {"libraries": build, "Triton's kernels": compile_kernels, "clusters": clusters}
    return [Measurement(name, partial(run, setting)) for name, run in found.items()]


def build(setting: Setting) -> dict[str, Any]:
    """Builds those that are not there, and those that were carried and do not load, for the architecture of the device.

    Raises:
        AssertionError: one is still missing; the log has the compilers' output.
    """
    wanted = LIBRARIES if setting.device != "cpu" else LIBRARIES[:1]
    missing = _missing(wanted)
    if not missing:
        return {"carried": wanted}
    for name in missing:  # else it may be newer than its sources, and left as it is
        (ROOT / "tsbn_kernels" / f"{name}.so").unlink(missing_ok=True)
    wants = {"TSBN_BUILD_CPU": "_native", "TSBN_BUILD_CUDA": "_cuda"}
    variables = {**os.environ, **{variable: str(int(name in missing)) for variable, name in wants.items()}}
    if setting.device != "cpu":
        variables["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*capability(setting.device))
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    status = subprocess.run(command, cwd=ROOT, env=variables, check=False).returncode
    still = _missing(wanted)
    assert not still, f"not built: {', '.join(still)} (status {status}); what needs it is left out: see the output"
    return {"built": missing}


def _missing(names: tuple[str, ...]) -> list[str]:
    """Names the libraries that do not load; what they say is in the log."""
    said = subprocess.run(
        [sys.executable, "-c", LOADS], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    ).stdout
    print(said, flush=True)
    return [name for name in names if f"{name}: loads" not in said.splitlines()]


def capability(device: str) -> tuple[int, int]:
    """Major and minor number of a CUDA device."""
    import torch

    return torch.cuda.get_device_capability(torch.device(device))


def sweep(setting: Setting) -> list[Measurement]:
    """The kernels of the sweep's plans, which are many."""
    return [Measurement("Triton's kernels", partial(compile_kernels, setting, "swept"))]


def compile_kernels(setting: Setting, which: str = "planned") -> dict[str, Any]:
    """All of Triton's kernels that other steps launch, in as many processes as there are cores.

    Raises:
        SkippedError: there is no GPU.
        AssertionError: some do not compile; the others have.
    """
    if setting.device == "cpu":
        raise SkippedError("Triton compiles for GPUs; `--compile-only sm_90` does so without one")
    import torch

    from benchmarks.gpu_day import kernels
    from tsbn_kernels.backends.plan import devices

    made = kernels.compile_all(getattr(kernels, which), devices.of(torch.device(setting.device)), launchers=True)
    print("\n".join(made.errors), flush=True)
    assert not made.errors, f"{len(made.errors)} of {made.count} failed, such as {made.errors[0]}"
    return {"kernels": made.count, "seconds": made.seconds}


def clusters(setting: Setting) -> dict[str, Any]:
    """How many clusters of each size the device holds.

    Raises:
        SkippedError: there is no GPU, or no compiler.
    """
    if setting.device == "cpu":
        raise SkippedError("a CPU has no clusters")
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise SkippedError("nvcc is not on the PATH")
    program = Path(setting.folder) / "clusters"
    source = Path(__file__).with_name("clusters.cu")
    target = "-arch=sm_{}{}".format(*capability(setting.device))
    subprocess.run([nvcc, target, "-o", str(program), str(source)], check=True)
    said = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout
    program.unlink()
    print(said)
    return {"clusters": {int(line.split()[0]): int(line.split()[1]) for line in said.splitlines()}, "output": said}
