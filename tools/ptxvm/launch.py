"""Launching a kernel of a PTX text on arrays, with every check."""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np

from .build import core
from .encode import Encoded, encode
from .memory import Memory, is_array
from .ptx import Instruction, Kernel, Module, Variable, parse
from .report import Report, Row

Dim = int | Sequence[int]

_WORKSPACE = 1 << 42  # address of a cooperative launch's grid barrier
_MOST_SHARED = {"sm_80": 163, "sm_86": 99, "sm_87": 163, "sm_89": 99}  # KiB that a block can opt in to; later 227
_FLOATS = {2: "<e", 4: "<f", 8: "<d"}


class Violation(Exception):
    """A rule that a kernel broke, and where."""

    def __init__(
        self,
        kind: str,
        message: str,
        at: Instruction | None = None,
        source: str = "",
        block: tuple[int, ...] = (),
        thread: tuple[int, ...] = (),
        address: int = 0,
    ) -> None:
        super().__init__(message)
        self.kind, self.block, self.thread, self.address, self.source = kind, block, thread, address, source
        self.instruction, self.line = (at.text, at.line) if at else ("", 0)


class Struct:
    """A parameter passed by value: a format of the struct module with native alignment, and its values.

    An array among the values stands for its address (format "P").
    """

    def __init__(self, form: str, *values: Any) -> None:
        self.form, self.values = form, values


@lru_cache(maxsize=256)
def _encoded(text: str, name: str) -> Encoded:
    return encode(parse(text), parse(text).kernel(name))


def launch(
    ptx: str,
    name: str,
    grid: Dim,
    block: Dim,
    args: Sequence[Any],
    *,
    cluster: Dim | None = None,
    shared: int = 0,
    cooperative: bool = False,
    resident: int | None = None,
    schedule: str | int = "forward",
    stores_may_collide: bool = False,
    names: Sequence[str] | None = None,
    patience: int = 50_000_000,
) -> Report:
    """Runs a kernel and returns what it did; a broken rule raises Violation.

    args: numpy arrays and CPU tensors (memory that is written already), Out, numbers, None (null), bytes, Struct.
    shared: bytes of dynamic shared memory. resident: blocks that run at a time, where the device has room for no more;
    None: one cluster, or all of a cooperative launch, which is refused where they do not fit.
    schedule: "forward", "reversed", or the seed of a shuffle.
    stores_may_collide: whether threads may store different values to the same place in shared memory by one
    instruction; one of them stays. names: of the arguments, for messages. patience: warp instructions without progress
    before a launch counts as stuck.
    """
    module, encoded = parse(ptx), _encoded(ptx, name)
    kernel = encoded.kernel
    grid3, block3 = _dim(grid, "grid"), _dim(block, "block")
    required = kernel.attributes.get("reqnctapercluster")
    cluster3 = _dim(cluster if cluster is not None else required or 1, "cluster")
    _check_shape(kernel, grid3, block3, cluster3)
    if len(args) != len(encoded.params):
        raise TypeError(f"{kernel.name} takes {len(encoded.params)} arguments, not {len(args)}")
    blocks = math.prod(grid3)
    if cooperative and resident is not None and resident < blocks:
        raise ValueError(f"a cooperative launch of {blocks} blocks on a device that runs {resident} at a time")
    memory = Memory()
    labels = names or [f"argument {k}" for k in range(len(args))]
    params = bytearray(encoded.param_size)
    for (param, offset), arg, label in zip(encoded.params, args, labels, strict=True):
        params[offset : offset + param.size] = _pack(param, arg, label, memory)
    memory.allocate()
    for variable, address in encoded.globals:
        initial = np.frombuffer(bytearray(variable.data or bytes(variable.size)), np.uint8)
        memory.reserve(initial, address, f"variable {variable.name}", readonly=variable.space == "const")
    if cooperative or resident:
        memory.reserve(np.zeros(64, np.uint8), _WORKSPACE, "the grid barrier")
    if schedule not in ("forward", "reversed") and not isinstance(schedule, int):
        raise ValueError(f"schedule is 'forward', 'reversed' or a seed, not {schedule!r}")
    order, seed = (2, schedule) if isinstance(schedule, int) else (["forward", "reversed"].index(schedule), 0)
    size, most = encoded.layout["shared_size"] + shared, _MOST_SHARED.get(module.target, 227) << 10
    if size > most:
        raise ValueError(f"a block of {module.target} has at most {most} bytes of shared memory, not {size}")
    options = encoded.layout | {
        "shared_size": size,
        "dynamic_shared": shared,
        "resident": resident or (blocks if cooperative else 1),
        "explicit_cluster": cluster3 != (1, 1, 1),
        "stores_may_collide": stores_may_collide,
        "order": order,
        "seed": seed,
        "patience": patience,
        "grid_workspace": _WORKSPACE,
    }
    allocations = sorted(memory.allocations, key=lambda a: a.base)
    start = time.perf_counter()
    regions = [a.argument() for a in allocations]
    result = core().run(encoded.code, grid3, block3, cluster3, options, regions, bytes(params))
    seconds = time.perf_counter() - start
    if "violation" in result:
        raise _explain(module, kernel, block3, grid3, *result["violation"])
    for allocation in allocations:
        if wrong := allocation.miscounts():
            raise Violation("write count", f"write count: {wrong}")
    made = partial(_rows, encoded, result["counters"])
    return Report(kernel.name, module.target.rstrip(","), grid3, block3, cluster3, str(schedule), seconds, made)


def _rows(encoded: Encoded, counters: bytes) -> list[Row]:
    counts = np.frombuffer(counters, np.uint64).reshape(len(encoded.code), -1).tolist()
    rows = [Row(*head, *numbers) for head, numbers in zip(encoded.heads, counts, strict=False)]
    return [row if row.space else row._replace(space="global" if row.sectors else "shared") for row in rows]


def _dim(sizes: Dim, what: str) -> tuple[int, int, int]:
    values = (sizes,) if isinstance(sizes, int) else tuple(int(s) for s in sizes)
    limits = {"grid": (2**31 - 1, 65535, 65535), "block": (1024, 1024, 64), "cluster": (16, 16, 16)}[what]
    padded = (*values, 1, 1)[:3]
    if not 1 <= len(values) <= 3 or any(not 1 <= v <= limit for v, limit in zip(padded, limits, strict=True)):
        raise ValueError(f"{what} {values} is not within {limits}")
    return padded[0], padded[1], padded[2]


def _check_shape(kernel: Kernel, grid: Sequence[int], block: Sequence[int], cluster: Sequence[int]) -> None:
    threads, blocks = math.prod(block), math.prod(cluster)
    compiled = {name: (*sizes, 1, 1)[:3] for name, sizes in kernel.attributes.items() if sizes}
    most = math.prod(compiled.get("maxntid", (1024,)))
    for what, sizes, name in (("blocks", block, "reqntid"), ("clusters", cluster, "reqnctapercluster")):
        if sizes != compiled.get(name, sizes):
            raise ValueError(f"{kernel.name} was compiled for {what} of {compiled[name]}")
    if threads > 1024:
        raise ValueError(f"a block has at most 1024 threads, not {threads}")
    if threads > most:
        raise ValueError(f"{kernel.name} was compiled for at most {most} threads a block, not {threads}")
    if any(g % c for g, c in zip(grid, cluster, strict=True)):
        raise ValueError(f"grid {grid} is not a multiple of cluster {cluster}")
    if blocks > 16:
        raise ValueError(f"a cluster has at most 16 blocks, not {blocks}")


def _pack(param: Variable, arg: Any, label: str, memory: Memory) -> bytes:
    """The bytes of an argument as its parameter takes them; its arrays become memory."""
    if isinstance(arg, Struct):
        values = [memory.add(value, label) if is_array(value) else value for value in arg.values]
        data = struct.pack("@" + arg.form, *values).ljust(param.size, b"\0")
    elif isinstance(arg, bytes):
        data = arg
    elif is_array(arg) or arg is None:
        data = (0 if arg is None else memory.add(arg, label)).to_bytes(8, "little")
    elif isinstance(arg, float) or (param.type in ("f16", "f32", "f64") and isinstance(arg, (int, np.number))):
        data = struct.pack(_FLOATS[param.size], float(arg))
    elif isinstance(arg, (int, np.integer)):
        low, high = -(1 << 8 * param.size - 1), (1 << 8 * param.size) - 1
        if not low <= int(arg) <= high:
            raise ValueError(f"{label} = {arg} does not fit a parameter of type {param.type}")
        data = (int(arg) & high).to_bytes(param.size, "little")
    else:
        raise TypeError(f"{label} is a {type(arg).__name__}, which no parameter takes")
    if len(data) != param.size:
        raise ValueError(f"{label} has {len(data)} bytes; parameter {param.name} has {param.size}")
    return data


def _explain(
    module: Module,
    kernel: Kernel,
    block: Sequence[int],
    grid: Sequence[int],
    kind: str,
    message: str,
    inst: int,
    other: int,
    block_number: int,
    thread_number: int,
    address: int,
) -> Violation:
    def place(number: int, sizes: Sequence[int]) -> tuple[int, int, int]:
        return number % sizes[0], number // sizes[0] % sizes[1], number // sizes[0] // sizes[1]

    def cite(i: Instruction) -> str:
        source = module.describe(i.location)
        return f"PTX line {i.line}: {i.text}" + (f"   [{source}]" if source else "")

    at, block_at, thread_at = kernel.instructions[inst], place(block_number, grid), place(thread_number, block)
    lines = [f"{kind}: {message}", f"  at {cite(at)}"]
    if other >= 0:
        lines.append(f"  and {cite(kernel.instructions[other])}")
    lines.append(f"  block {block_at}, thread {thread_at}" + (f", address {address:#x}" if address else ""))
    return Violation(kind, "\n".join(lines), at, module.describe(at.location), block_at, thread_at, address)
