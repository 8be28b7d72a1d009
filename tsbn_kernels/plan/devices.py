"""What a plan needs to know of a GPU, and the GPUs known on paper."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """A GPU. Sizes in bytes, bandwidth in bytes a second; registers are 32 bits wide.

    Attributes:
        target: ``"sm_90"`` and the like, or AMD's ``"gfx942"``, or the name of another kind of GPU.
        multiprocessors: streaming multiprocessors, or compute units.
        registers: of one multiprocessor.
        shared_memory: of one multiprocessor, as all its blocks together may use it.
        block_shared_memory: the most that one block may use, by opt-in.
        threads: the most that are resident on one multiprocessor.
        warp: threads of a warp.
        l2: the last cache.
        bandwidth: of the memory, as the data sheet gives it.
        block_threads: the most threads of one block.
    """

    name: str
    target: str
    multiprocessors: int
    registers: int
    shared_memory: int
    block_shared_memory: int
    threads: int
    warp: int
    l2: int
    bandwidth: float
    block_threads: int = 1024

    @property
    def clusters(self) -> bool:
        """Whether blocks of a cluster read one another's shared memory: NVIDIA's sm_90 and later."""
        return self.target.startswith("sm_") and int(self.target[3:]) >= 90


_KIB, _MIB = 1 << 10, 1 << 20

# From the vendors' data sheets and CUDA's and CDNA's programming guides.
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("A100", "sm_80", 108, 65536, 164 * _KIB, 163 * _KIB, 2048, 32, 40 * _MIB, 2.039e12),
        Device("H100", "sm_90", 132, 65536, 228 * _KIB, 227 * _KIB, 2048, 32, 50 * _MIB, 3.35e12),
        Device("B200", "sm_100", 148, 65536, 228 * _KIB, 227 * _KIB, 2048, 32, 126 * _MIB, 8.0e12),
        Device("RTX3090", "sm_86", 82, 65536, 100 * _KIB, 99 * _KIB, 1536, 32, 6 * _MIB, 0.936e12),
        Device("RTX4090", "sm_89", 128, 65536, 100 * _KIB, 99 * _KIB, 1536, 32, 72 * _MIB, 1.008e12),
        Device("RTX5090", "sm_120", 170, 65536, 100 * _KIB, 99 * _KIB, 1536, 32, 96 * _MIB, 1.792e12),
        Device("MI250X", "gfx90a", 110, 131072, 64 * _KIB, 64 * _KIB, 2048, 64, 8 * _MIB, 1.638e12),  # one of two dies
        Device("MI300X", "gfx942", 304, 131072, 64 * _KIB, 64 * _KIB, 2048, 64, 256 * _MIB, 5.3e12),
    )
}


def named(name: str) -> Device:
    """The device of a name such as ``"H100"`` or ``"rtx 4090"``.

    Raises:
        ValueError: it is not known on paper.
    """
    for device in DEVICES.values():
        if device.name.lower() == name.lower().replace(" ", "").replace("-", ""):
            return device
    raise ValueError(f"unknown device {name!r}; known are {', '.join(DEVICES)}")


def of(index: torch.device) -> Device:
    """The GPU of a tensor's device, as its driver describes it; what a driver does not tell is an H100's."""
    properties = torch.get_device_module(index.type).get_device_properties(index)
    paper = next((d for d in DEVICES.values() if d.name in properties.name.replace(" ", "")), DEVICES["H100"])

    def told(name: str, otherwise: int) -> int:
        return int(getattr(properties, name, 0) or otherwise)

    architecture = str(getattr(properties, "gcnArchName", "")).split(":")[0]
    capability = told("major", 9) * 10 + told("minor", 0)
    clock, width = told("memory_clock_rate", 0), told("memory_bus_width", 0)  # kHz, bits; two transfers a clock
    bandwidth = paper.bandwidth if paper.name in properties.name.replace(" ", "") else 2e3 * clock * width / 8
    return Device(
        name=properties.name,
        target=architecture or (f"sm_{capability}" if index.type == "cuda" else index.type),
        multiprocessors=told("multi_processor_count", told("gpu_subslice_count", paper.multiprocessors)),
        registers=told("regs_per_multiprocessor", paper.registers),
        shared_memory=told("shared_memory_per_multiprocessor", paper.shared_memory),
        block_shared_memory=told("shared_memory_per_block_optin", paper.block_shared_memory),
        threads=told("max_threads_per_multi_processor", paper.threads),
        warp=told("warp_size", paper.warp),
        l2=told("L2_cache_size", paper.l2),
        bandwidth=bandwidth or paper.bandwidth,
        block_threads=told("max_threads_per_block", paper.block_threads),
    )
