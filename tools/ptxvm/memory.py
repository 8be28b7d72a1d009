"""Arrays as a kernel's memory: allocations with guard gaps, and what of them is accessible and written."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

_FIRST, _SPACING = 1 << 44, 1 << 37  # addresses of allocations: far from each other and from null
_ALIGNMENT = 512  # of an allocation, as the CUDA allocator gives
_FORBIDDEN, _UNWRITTEN, _WRITTEN = 0, 1, 2


@dataclass
class Out:
    """An argument that the kernel fills: unwritten at first (and poisoned), each element to be written `writes` times.

    `writes=None` does not check the number.
    """

    array: Any
    writes: int | None = 1


@dataclass
class ArrayView:
    """Where the elements of a numpy array or torch tensor lie in this process."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes
    itemsize: int
    owner: int  # address of the whole array that this is a view of
    label: str
    writable: bool = True
    out: Out | None = None

    @property
    def span(self) -> tuple[int, int]:
        """The first byte and the end."""
        if 0 in self.shape:
            return self.address, self.address
        reach = [(n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)]
        before, after = sum(r for r in reach if r < 0), sum(r for r in reach if r > 0)
        return self.address + before, self.address + after + self.itemsize

    def select(self, data: Bytes, start: int) -> Bytes:
        """The bytes of the elements, [*shape, itemsize], in `data`, which begins at address `start`."""
        shape = (*self.shape, self.itemsize)
        if 0 in self.shape:
            return np.empty(shape, np.uint8)
        elements: Bytes = np.ndarray(shape, np.uint8, data.data, self.address - start, (*self.strides, 1))
        return elements


def is_array(value: object) -> bool:
    """Whether this is a numpy array or a torch tensor, or an Out."""
    return isinstance(value, (Out, np.ndarray)) or hasattr(value, "untyped_storage")


def view(array: Any, label: str) -> ArrayView:
    """Describes an array, or that of an Out; torch tensors must be on the CPU."""
    if isinstance(array, Out):
        described = replace(view(array.array, label), out=array)
        if not described.writable:
            raise ValueError(f"{label} is an output, but the array is read-only")
        return described
    if isinstance(array, np.ndarray):
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        label = f"{label} ({array.dtype}{list(array.shape)})"
        start, writable = array.ctypes.data, array.flags.writeable
        return ArrayView(start, array.shape, array.strides, array.itemsize, owner.ctypes.data, label, writable)
    if array.device.type != "cpu":
        raise TypeError(f"{label} is on {array.device}; the machine runs on CPU tensors")
    size = array.element_size()
    label = f"{label} ({str(array.dtype).removeprefix('torch.')}{list(array.shape)})"
    strides = tuple(s * size for s in array.stride())
    return ArrayView(array.data_ptr(), tuple(array.shape), strides, size, array.untyped_storage().data_ptr(), label)


@dataclass
class Allocation:
    """A span of memory that the kernel may touch; views of one array share it."""

    start: int  # in this process
    base: int  # in the kernel's address space
    label: str
    state: Bytes
    data: Bytes
    readonly: bool = False
    counts: Bytes | None = None
    outputs: list[ArrayView] = field(default_factory=list)

    def argument(self) -> tuple[str, int, int, int, int, bool, int]:
        """The region as the core takes it."""
        data, state = self.data.ctypes.data, self.state.ctypes.data
        counts = 0 if self.counts is None else self.counts.ctypes.data
        return self.label, self.base, self.data.size, data, state, self.readonly, counts

    def miscounts(self) -> str:
        """Describes the first element that was not written as often as it should be, if any."""
        for output in self.outputs:
            assert self.counts is not None and output.out is not None and output.out.writes is not None
            counts = output.select(self.counts, self.start)
            wrong = np.argwhere((counts != min(output.out.writes, 255)).any(-1))
            if len(wrong):
                index = tuple(int(k) for k in wrong[0])
                return (
                    f"element {list(index)} of {output.label} was written {int(counts[index].max())} times, not "
                    f"{output.out.writes}; {len(wrong)} of {max(1, int(np.prod(output.shape)))} elements are wrong"
                )
        return ""


class Memory:
    """The allocations of one launch."""

    def __init__(self) -> None:
        self._views: list[ArrayView] = []
        self._owners: dict[int, int] = {}
        self.allocations: list[Allocation] = []

    def add(self, array: Any, label: str) -> int:
        """Adds an array or an Out, and returns the address of its first element in the kernel's eyes.

        It is aligned there as it is within its owner. Call `allocate` when all are there.
        """
        described = view(array, label)
        self._views.append(described)
        base = self._owners.setdefault(described.owner, _FIRST + len(self._owners) * _SPACING)
        return base + described.address - described.owner

    def allocate(self) -> None:
        """Makes the allocations: views whose spans overlap share one."""
        groups: list[list[ArrayView]] = []
        end = 0
        for described in sorted(self._views, key=lambda v: v.span):
            low, high = described.span
            if low == high:
                continue
            if low < end:
                groups[-1].append(described)
            else:
                groups.append([described])
            end = max(end, high)
        for views in groups:
            first, high = views[0], max(v.span[1] for v in views)
            # Begin where vectors can begin; the bytes before stay forbidden.
            low = first.span[0] - (first.span[0] - first.owner) % 16
            base = self._owners[first.owner] + low - first.owner
            data: Bytes = np.ctypeslib.as_array((ctypes.c_uint8 * (high - low)).from_address(low))
            allocation = Allocation(low, base, first.label, np.zeros(high - low, np.uint8), data)
            allocation.readonly = not any(v.writable for v in views)
            for described in views:
                described.select(allocation.state, low)[...] = _UNWRITTEN if described.out else _WRITTEN
                if described.out:
                    described.select(data, low)[...] = 0xFF  # NaN as a float
                if described.out and described.out.writes is not None:
                    allocation.counts = np.zeros(high - low, np.uint8)
                    allocation.outputs.append(described)
            self.allocations.append(allocation)

    def reserve(self, data: Bytes, base: int, label: str, readonly: bool = False) -> None:
        """Adds memory at a given address of the kernel's address space: module variables, workspaces."""
        state = np.full(data.size, _WRITTEN, np.uint8)
        self.allocations.append(Allocation(data.ctypes.data, base, label, state, data, readonly))
