"""Triton's kernels compiled for GPUs that are not here, and what the compilers made of them. No driver is touched."""

from __future__ import annotations

import hashlib
import inspect
import re
import subprocess
import tempfile
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.compiler import compile as compile_source
from triton.runtime.jit import create_function_from_signature

from tsbn_kernels import backends
from tsbn_kernels.backends.triton.kernels import tiles
from tsbn_kernels.backends.triton.launch import Launch

COMPILER = f"Triton {triton.__version__}"
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Call(NamedTuple):
    """A launch that was asked for, and its arguments. Tensors may be on the meta device: nothing is allocated."""

    launch: Launch
    arguments: tuple[Any, ...]


class Specialization(NamedTuple):
    """A call as Triton's launcher sees it."""

    parameters: dict[str, Any]  # values, tuples of values, constants
    signature: dict[str, Any]  # of the parameters: a type, or "constexpr"
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: Any
    key: Hashable  # calls with the same key share a compiled kernel


@contextmanager
def triton_forced() -> Iterator[None]:
    """Sends tensors of any device to the Triton backend, as ``use_backend`` does those that it runs on."""
    with mock.patch.object(backends, "_override", backends.Availability("triton", (), True, "taken for usable")):
        yield


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Collects the launches that are asked for; none is made."""
    calls: list[Call] = []

    def note(launch: Launch, *arguments: Any) -> None:
        calls.append(Call(launch, arguments))

    with mock.patch.object(Launch, "__call__", note):
        yield calls


@cache
def _backend(target: str) -> tuple[GPUTarget, Any]:
    cuda = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if cuda else GPUTarget("hip", target, 64)
    return gpu, make_backend(gpu)


@cache
def _binder(function: Any, target: str) -> Any:
    return create_function_from_signature(function.signature, function.params, _backend(target)[1])


def specialize(call: Call, target: str) -> Specialization:
    """What Triton compiles for a call: it looks at dtypes, alignment, and at sizes and strides of 1 or 16 times n."""
    function, (_, backend) = call.launch.function, _backend(target)
    arguments = *call.arguments, *call.launch.constants
    bound, kinds, options = _binder(function, target)(*arguments, **_options(call, target))
    options["debug"] = False
    key = call.launch.kernel, str(_options(call, target)), str(kinds), target
    parsed, signature, constants, attributes = function._pack_args(backend, options, bound, kinds, options)
    return Specialization(bound, signature, constants, attributes, parsed, key)


def fingerprint(call: Call, target: str) -> str:
    """Tells what a call is compiled to: by source, with all that it calls, specialisation, options and compiler."""
    made = specialize(call, target)
    source = ASTSource(call.launch.function, made.signature, made.constants, made.attributes)
    options = {name: value for name, value in made.options.__dict__.items() if name != "extern_libs"}  # paths
    return hashlib.sha256(f"{COMPILER} {target} {source.hash()} {sorted(options.items())}".encode()).hexdigest()[:16]


def _options(call: Call, target: str) -> dict[str, int]:
    """The options of a launch, less those of another vendor: a plan may be for another GPU than the target."""
    return {name: value for name, value in call.launch.options.items() if name != "maxnreg" or target.startswith("sm_")}


def compile_call(call: Call, target: str) -> tuple[Any, list[Any]]:
    """The kernel that Triton compiles for a call, and the values that its parameters take: tuples are flat there."""
    made = specialize(call, target)
    source = ASTSource(call.launch.function, made.signature, made.constants, made.attributes)
    compiled = compile_source(source, target=_backend(target)[0], options=made.options.__dict__)
    kinds, values = _flat(made.signature.values()), _flat(made.parameters.values())
    return compiled, [value for kind, value in zip(kinds, values, strict=True) if kind != "constexpr"]


def _flat(values: Iterable[Any]) -> list[Any]:
    return [leaf for value in values for leaf in (_flat(value) if isinstance(value, tuple) else (value,))]


# ---- what the compilers made -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        registers: of a thread; on AMD the vector registers.
        shared: bytes of a program.
        spills: bytes of stack and local memory a thread, and spilled registers.
        loads, stores: the widths in bytes of the instructions that move activations, most first.
    """

    registers: int
    shared: int
    spills: int
    loads: tuple[int, ...]
    stores: tuple[int, ...]


def resources(compiled: Any) -> Resources:
    """Reads the machine code, but the widths of NVIDIA's accesses in the PTX.

    The assembler neither splits nor joins accesses. Its disassembler shows the same widths, and takes longer than all
    compilers together.
    """
    cuda = "cubin" in compiled.asm
    registers, spills = _used(compiled.asm["cubin"]) if cuda else _noted(compiled.asm["amdgcn"])
    text, access, size = (compiled.asm["ptx"], _PTX, _ptx_bytes) if cuda else (compiled.asm["amdgcn"], _AMD, _amd_bytes)
    widths: dict[str, set[int]] = {"load": set(), "store": set()}
    for file, line, found in _located(text, access):
        what = "load" if found[1] in ("load", "ld") else "store"
        if file.endswith("tiles.py") and line in lines(what):
            widths[what].add(size(found))
    loads, stores = (tuple(sorted(widths[what], reverse=True)) for what in ("load", "store"))
    return Resources(registers, compiled.metadata.shared, spills, loads, stores)


@cache
def lines(what: str) -> range:
    """The source lines where ``tiles.load`` or ``tiles.store`` moves activations."""
    text, first = inspect.getsourcelines(getattr(tiles, what).fn)
    # Before the instruction itself a load clears up to eight registers, and each counts as one more line of source.
    return range(first, first + len(text) + 8 * (what == "load"))


def _located(text: str, access: re.Pattern[str]) -> Iterator[tuple[str, int, re.Match[str]]]:
    """The accesses in assembly, with the file and line of their source."""
    files = dict(re.findall(r'\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]*)"', text))
    where = "", 0
    for line in text.splitlines():
        if place := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            where = files.get(place[1], ""), int(place[2])
        elif found := access.search(line):
            yield *where, found


_PTX = re.compile(r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bsuf](\d+)\b")


def _ptx_bytes(found: re.Match[str]) -> int:
    return int(found[2] or 1) * int(found[3]) // 8


def instructions(compiled: Any) -> int:
    """The machine instructions of a kernel for NVIDIA's GPUs, without what pads its end."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = str(_TOOLS / "nvdisasm"), "-c", file.name
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!NOP)\S", text, re.MULTILINE))


def _used(cubin: bytes) -> tuple[int, int]:
    """Registers a thread; bytes of stack and local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = str(_TOOLS / "cuobjdump"), "--dump-resource-usage", file.name
        used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", used)
    assert found is not None, used
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


_AMD = re.compile(r"^\s*(?:global|buffer|flat)_(load|store)_(byte|ubyte|sbyte|short|ushort|dword(?:x\d)?)")
_AMD_WIDTHS = {
    "byte": 1,
    "ubyte": 1,
    "sbyte": 1,
    "ushort": 2,
    "short": 2,
    "dword": 4,
    "dwordx2": 8,
    "dwordx3": 12,
    "dwordx4": 16,
}


def _amd_bytes(found: re.Match[str]) -> int:
    return _AMD_WIDTHS[found[2]]


def _noted(text: str) -> tuple[int, int]:
    """Vector registers a thread; spilled registers and bytes of stack."""

    def noted(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found is not None, name
        return int(found[1])

    return noted("vgpr_count"), sum(map(noted, ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")))
