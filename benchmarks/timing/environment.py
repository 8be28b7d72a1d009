"""The machine and the versions that a measurement was made with."""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
from pathlib import Path

import torch

import tsbn_kernels
from benchmarks.records.groups import BY_PLAN
from benchmarks.timing import host_memory
from tsbn_kernels import backends

DEFAULT_CACHE = 32 << 20  # where the system does not say


def device_name(device: torch.device) -> str:
    """``cpu``, or the accelerator's type and name."""
    if device.type == "cpu":
        return "cpu"
    module = torch.get_device_module(device)
    return f"{device.type}: {module.get_device_name(device)}" if hasattr(module, "get_device_name") else device.type


def cpu_name() -> str:
    """The processor as the system names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions(device: torch.device) -> dict[str, str | int]:
    """Everything that changes the numbers, by name."""
    return {
        "torch": torch.__version__,
        "tsbn_kernels": tsbn_kernels.__version__,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "backend": _backend(device.type),
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE", "0"),
        **({"freed_memory": host_memory.policy()} if device.type == "cpu" else {}),
    }


def _backend(device_type: str) -> str:
    """Name and detail of the backend; of both where the plan of each call decides."""
    details = {backend.name: backend.detail for backend in backends.backends()}
    if backends.plans_decide(device_type):
        return f"{BY_PLAN}: {details['triton']}, {details['cuda']}"
    chosen = backends.select(device_type)
    return f"{chosen}: {details[chosen]}"


def available_bytes(device: torch.device) -> int:
    """Memory that can be taken on the device now."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        if hasattr(module, "mem_get_info"):
            return int(module.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def cache_bytes(device: torch.device) -> int:
    """Size of the largest cache between the device's cores and its memory."""
    if device.type != "cpu":
        properties = getattr(torch.get_device_module(device), "get_device_properties", lambda _: None)(device)
        return int(getattr(properties, "L2_cache_size", 0) or DEFAULT_CACHE)
    found = []
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KMG]?)", size.read_text().strip()).groups()  # type: ignore[union-attr]
        found.append(int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit])
    return max(found, default=DEFAULT_CACHE)


def memory_in_use(device: torch.device) -> tuple[int, int]:
    """Bytes in use now, and the most so far."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        return int(module.memory_allocated(device)), int(module.max_memory_allocated(device))
    try:
        status = Path("/proc/self/status").read_text()
        now, peak = (int(re.findall(rf"{key}:\s+(\d+)", status)[0]) * 1024 for key in ("VmRSS", "VmHWM"))
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        now = peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return now, peak


def parse_device(name: str | None) -> torch.device:
    """The named device, or the accelerator if there is one, or the CPU.

    Raises:
        ValueError: there is no such device here.
    """
    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).add_(1).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here: {reason}") from None
    return device
