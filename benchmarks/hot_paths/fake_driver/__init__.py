"""A GPU that is not there: Triton's own driver and launcher run as they are, on a library in the place of libcuda.so.1.

For a process of its own: what PyTorch says of CUDA is changed for good. Tensors are the CPU's.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

STREAM = 0x5EED0
COMPILER = shutil.which("cc") or shutil.which("gcc")
_LISTENER = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))


class Launched(NamedTuple):
    """What reached cuLaunchKernelEx; parameters as bytes, as many as the machine code reads."""

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    stream: int
    attributes: dict[int, tuple[int, int, int]]
    parameters: list[bytes]


class Driver:
    """The library, built into ``folder`` if it is not there; Triton uses it from then on.

    Args:
        folder: for the library.
        notes: whether launches are noted, beside being counted.
    """

    def __init__(self, folder: Path, notes: bool = True) -> None:
        import torch
        import triton

        torch.cuda.device_count()  # the CUDA runtime's own search ends before there is something to be found

        include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
        library = folder / "libcuda.so.1"
        command = [str(COMPILER), "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-isystem", str(include)]
        if not library.exists():
            subprocess.run([*command, str(Path(__file__).with_name("libcuda.c")), "-o", str(library)], check=True)
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        self.library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # for all who ask for one of this name
        self.launched: list[Launched] = []
        self._listener = _LISTENER(self._hear)
        if notes:
            listener = ctypes.c_void_p.in_dll(self.library, "fake_listener")
            listener.value = ctypes.cast(self._listener, ctypes.c_void_p).value
        self._sizes: dict[tuple[int, str], list[int]] = {}
        _pretend()

    @property
    def launches(self) -> int:
        """So many until now."""
        return ctypes.c_long.in_dll(self.library, "fake_launches").value

    def set(self, name: str, value: int) -> None:
        """One of the library's numbers: ``launch_error`` of CUDA's (0: none), ``shared`` bytes of a block.

        And how many blocks of a ``cluster`` the GPU takes.
        """
        ctypes.c_int.in_dll(self.library, f"fake_{name}").value = value

    def _hear(self, config: int, name: bytes, image: int, parameters: Any) -> None:
        *sizes, shared, stream, attributes, count = struct.unpack("7I4xQQI", ctypes.string_at(config, 52))
        kernel = name.decode()
        if (image, kernel) not in self._sizes:
            self._sizes[image, kernel] = parameter_sizes(_elf(image), kernel)
        values = [ctypes.string_at(parameters[k], size) for k, size in enumerate(self._sizes[image, kernel])]
        found = {}
        for k in range(count):
            which, *value = struct.unpack("I4x3I", ctypes.string_at(attributes + 72 * k, 20))
            found[which] = tuple(value)
        self.launched.append(Launched(kernel, tuple(sizes[:3]), tuple(sizes[3:]), shared, stream or 0, found, values))


def _elf(address: int) -> bytes:
    """The file that lies at an address: its table of sections comes last."""
    header = ctypes.string_at(address, 64)
    (table,) = struct.unpack_from("<Q", header, 40)
    size, count = struct.unpack_from("<HH", header, 58)
    return ctypes.string_at(address, table + size * count)


def sections(elf: bytes) -> dict[str, bytes]:
    """The parts of a file of machine code by their names."""
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<HHH", elf, 58)
    found = [struct.unpack_from("<IIQQQQ", elf, table + size * k) for k in range(count)]
    start = found[names][4]

    def name(offset: int) -> str:
        return elf[start + offset : elf.index(b"\0", start + offset)].decode()

    return {name(head[0]): elf[head[4] : head[4] + head[5]] for head in found}


def parameter_sizes(cubin: bytes, kernel: str) -> list[int]:
    """Bytes of each parameter, as the machine code of a kernel says: entries of the kind KPARAM_INFO."""
    info, sizes, at = sections(cubin)[f".nv.info.{kernel}"], {}, 0
    while at < len(info):
        form, kind, length = struct.unpack_from("<BBH", info, at)
        if form == 4 and kind == 0x17:
            _, ordinal, _, packed = struct.unpack_from("<IHHI", info, at + 4)
            sizes[ordinal] = packed >> 18
        at += 4 + (length if form == 4 else 0)
    assert sorted(sizes) == list(range(len(sizes))), "parameters are missing"
    return [sizes[k] for k in range(len(sizes))]


def _pretend() -> None:
    """Lets PyTorch say that there is a GPU."""
    import torch

    replaced: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_capability": lambda device=None: (9, 0),
    }
    for name, function in replaced.items():
        setattr(torch.cuda, name, function)
    torch._C._cuda_getCurrentRawStream = lambda device: STREAM
