"""What there is on this machine: the device, the versions, the backends, and whether a plain layer runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import warnings
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.timing import environment
from tsbn_kernels import FusedTSigmaBN2d, backends
from tsbn_kernels.backends import triton
from tsbn_kernels.backends.plan import devices

KERNELS = ("triton", "cuda", "cpu")  # backends with kernels of their own
SETTINGS = ("TSBN_", "TRITON_", "CUDA_", "PYTORCH_", "TORCH")  # variables that change what runs
SMI_FIELDS = (
    "name",
    "driver_version",
    "pstate",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "temperature.gpu",
    "power.draw",
    "power.limit",
    "memory.total",
    "memory.used",
    "utilization.gpu",
    "mig.mode.current",
)


def device(name: str) -> dict[str, Any]:
    """Name, properties, free memory; and what nvidia-smi knows.

    Raises:
        ValueError: it cannot be used.
    """
    where = environment.parse_device(name)
    facts: dict[str, Any] = {"name": environment.device_name(where), "cpu": environment.cpu_name()}
    facts["free GiB"] = round(environment.available_bytes(where) / 2**30, 2)
    if where.type != "cpu":
        properties = torch.get_device_module(where).get_device_properties(where)
        facts |= {"properties": asdict(devices.of(where)), "reported": str(properties)}
        facts["devices"] = torch.accelerator.device_count()
    if where.type == "cuda" and (smi := shutil.which("nvidia-smi")):
        which = f"--id=GPU-{properties.uuid}"  # its numbers are others where some devices are hidden
        answer = _output(smi, f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader", which)
        values = answer.split(", ")
        facts["nvidia-smi"] = dict(zip(SMI_FIELDS, values, strict=True)) if len(values) == len(SMI_FIELDS) else answer
    return facts


def versions(name: str) -> dict[str, Any]:
    """Gives the versions of everything that changes results, and the variables that do."""

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    found = {package: of(package) for package in ("tsbn-kernels", "torch", "triton", "numpy")}
    found["CUDA of PyTorch"] = str(torch.version.cuda or torch.version.hip or "none")
    if nvcc := shutil.which("nvcc"):
        found["nvcc"] = _output(nvcc, "--version").splitlines()[-1]
    return found | {name: value for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)}


def _output(*command: str) -> str:
    """What a program says, or why it says nothing."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return (answer.stdout.strip() or answer.stderr.strip()) or f"nothing; status {answer.returncode}"


def usable_backends(name: str) -> dict[str, Any]:
    """Which backends run on the device, and why not the others.

    Raises:
        AssertionError: there are no kernels for the device.
    """
    kind = torch.device(name).type
    found: dict[str, str] = {}
    missing: dict[str, str] = {}
    for backend in backends.backends():
        if not backend.runs_on(kind):
            continue
        (found if backend.available else missing)[backend.name] = backend.detail
    reasons = "; ".join(f"{backend}: {detail}" for backend, detail in missing.items())
    assert set(found) & set(KERNELS), f"no kernels for {kind}: {reasons}"
    return {"usable": found, "missing": missing, "default": backends.select(kind)}


def plain_layer(name: str) -> dict[str, Any]:
    """A training step with nothing forced: it must not have to do without Triton.

    Raises:
        AssertionError: it does.
    """
    layer = FusedTSigmaBN2d(2, 8).to(name)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        y = layer(torch.randn(8, 8, 6, 6, device=name))
        y.backward(torch.randn_like(y))
    assert not (trouble := triton.health.broken or triton.health.failures), trouble
    assert layer.weight.grad is not None
    assert all(tensor.isfinite().all() for tensor in (y, layer.weight.grad)), "a result is not finite"
    return {"runs on": backends.select(y.device.type), "warnings": [str(warning.message) for warning in heard]}


# Each by itself, so that one that cannot be had hides no other.
FACTS = {"device": device, "versions": versions, "backends": usable_backends, "a layer as users call it": plain_layer}
