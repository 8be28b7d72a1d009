"""What a plan needs to know of a GPU, and the GPUs known on paper."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

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
        memory: as the data sheet gives it.
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
    memory: float = 0.0
    block_threads: int = 1024

    @property
    def clusters(self) -> tuple[int, ...]:
        """Blocks that a cluster may have, which read one another's shared memory: on NVIDIA's sm_90 and later."""
        if not self.target.startswith("sm_") or int(self.target[3:]) < 90:
            return ()
        return (2, 4, 8, 16) if self.target in ("sm_90", "sm_100", "sm_103") else (2, 4, 8)  # data centres have 16


_KIB, _MIB = 1 << 10, 1 << 20

# From the vendors' data sheets and CUDA's and CDNA's programming guides; of each architecture the usual one first.
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("A100", "sm_80", 108, 65536, 164 * _KIB, 163 * _KIB, 2048, 32, 40 * _MIB, 2.039e12, 80e9),
        Device("A100 40GB", "sm_80", 108, 65536, 164 * _KIB, 163 * _KIB, 2048, 32, 40 * _MIB, 1.555e12, 40e9),
        Device("H100", "sm_90", 132, 65536, 228 * _KIB, 227 * _KIB, 2048, 32, 50 * _MIB, 3.35e12, 80e9),  # SXM
        Device("H100 PCIe", "sm_90", 114, 65536, 228 * _KIB, 227 * _KIB, 2048, 32, 50 * _MIB, 2.039e12, 80e9),
        Device("H100 NVL", "sm_90", 132, 65536, 228 * _KIB, 227 * _KIB, 2048, 32, 50 * _MIB, 3.938e12, 94e9),
        Device("H200", "sm_90", 132, 65536, 228 * _KIB, 227 * _KIB, 2048, 32, 50 * _MIB, 4.8e12, 141e9),
        Device("B200", "sm_100", 148, 65536, 228 * _KIB, 227 * _KIB, 2048, 32, 126 * _MIB, 8.0e12, 180e9),
        Device("RTX3090", "sm_86", 82, 65536, 100 * _KIB, 99 * _KIB, 1536, 32, 6 * _MIB, 0.936e12, 24e9),
        Device("RTX4090", "sm_89", 128, 65536, 100 * _KIB, 99 * _KIB, 1536, 32, 72 * _MIB, 1.008e12, 24e9),
        Device("RTX5090", "sm_120", 170, 65536, 100 * _KIB, 99 * _KIB, 1536, 32, 96 * _MIB, 1.792e12, 32e9),
        # One of two dies.
        Device("MI250X", "gfx90a", 110, 131072, 64 * _KIB, 64 * _KIB, 2048, 64, 8 * _MIB, 1.638e12, 64e9),
        Device("MI300X", "gfx942", 304, 131072, 64 * _KIB, 64 * _KIB, 2048, 64, 256 * _MIB, 5.3e12, 192e9),
    )
}
_OTHERS = {"ti", "super", "laptop", "d"}  # words that make of a name that of another product


def named(name: str) -> Device:
    """The device of a name such as ``"H100"`` or ``"rtx 4090"``.

    Raises:
        ValueError: it is not known on paper.
    """

    def plain(text: str) -> str:
        return text.lower().replace(" ", "").replace("-", "")

    for device in DEVICES.values():
        if plain(device.name) == plain(name):
            return device
    raise ValueError(f"unknown device {name!r}; known are {', '.join(DEVICES)}")


def by_driver(name: str) -> Device | None:
    """The device on paper that a driver calls ``name``, such as ``"NVIDIA H100 80GB HBM3"``.

    None for those that are not known, for parts of a GPU (MIG), and for other products of nearly the same name.
    """
    words = set(re.split(r"\W+", name.lower().replace("rtx ", "rtx")))
    if words & {"mig", *_OTHERS}:
        return None
    found = [device for device in DEVICES.values() if words.issuperset(device.name.lower().split())]
    return max(found, key=lambda device: len(device.name.split()), default=None)


def akin(target: str) -> Device:
    """The device on paper of the same architecture, or of the last one before it; an H100 for other kinds of GPUs."""

    def age(architecture: str) -> tuple[str, int]:
        kind = architecture.rstrip("0123456789abcdef")
        return kind, int(architecture[len(kind) :] or "0", 16)

    older = [d for d in DEVICES.values() if age(d.target)[0] == age(target)[0] and age(d.target) <= age(target)]
    return max(older, key=lambda device: age(device.target), default=DEVICES["H100"])


def of(index: torch.device) -> Device:
    """The GPU of a tensor's device as its driver describes it; what a driver does not tell is that of its kin."""
    properties = torch.get_device_module(index.type).get_device_properties(index)

    def told(*names: str) -> int:
        return next((int(value) for name in names if (value := getattr(properties, name, 0))), 0)

    target = str(getattr(properties, "gcnArchName", "")).split(":")[0]  # in PyTorch for CUDA that is the name
    if not target.startswith("gfx"):
        target = f"sm_{told('major') * 10 + told('minor')}" if index.type == "cuda" else index.type
    kin = by_driver(properties.name.partition(" MIG ")[0]) or akin(target)
    multiprocessors = told("multi_processor_count", "gpu_subslice_count") or kin.multiprocessors
    return Device(
        name=properties.name,
        target=target,
        multiprocessors=multiprocessors,
        registers=told("regs_per_multiprocessor") or kin.registers,
        shared_memory=told("shared_memory_per_multiprocessor", "local_mem_size") or kin.shared_memory,
        block_shared_memory=told("shared_memory_per_block_optin", "local_mem_size") or kin.block_shared_memory,
        threads=told("max_threads_per_multi_processor") or kin.threads,
        warp=told("warp_size") or kin.warp,
        l2=told("L2_cache_size", "last_level_cache_size") or kin.l2,
        bandwidth=_bandwidth(properties, kin, multiprocessors),
        memory=told("total_memory") or kin.memory,
        block_threads=told("max_threads_per_block", "max_work_group_size") or kin.block_threads,
    )


def _bandwidth(properties: Any, kin: Device, multiprocessors: int) -> float:
    """Bytes a second of the memory, from its clock and width. A part of a GPU gets the eighths that it has of it.

    AMD's drivers tell of HBM3 half of what it transfers, so data sheets come first there.
    """
    memory = getattr(properties, "total_memory", 0)
    if " MIG " in properties.name and memory and kin.memory:
        return kin.bandwidth * max(1, round(8 * memory / kin.memory)) / 8
    clock, width = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)
    hertz = clock * (1e6 if hasattr(properties, "gpu_subslice_count") else 1e3)  # XPU: MHz, others: kHz
    on_paper = kin.bandwidth * multiprocessors / kin.multiprocessors
    known = kin.target.startswith("gfx") and by_driver(properties.name) is kin
    return on_paper if known or not clock * width else 2 * hertz * width / 8
