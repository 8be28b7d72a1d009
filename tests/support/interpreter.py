"""Runs the Triton backend's kernels in Triton's interpreter, in a process that can compile them, too.

``TRITON_INTERPRET=1`` would do this for a whole process. Here the kernel modules are loaded a second time as
interpreted functions, and ``triton.language`` is interpreted only while one of them runs. Where the interpreter of
Triton 3.8 does something else than a GPU, it is mended:

- a sum goes row by row, which costs float32 digits that a GPU's tree keeps: here it goes by halves;
- float32 is cut to bfloat16, where a GPU rounds to the nearest, and float64 to bfloat16 is nonsense;
- a function that a kernel calls patches ``triton.language`` again, slowly, and never restores it;
- a number may be an array of one axis, which NumPy 2.4 no longer takes for one (Triton 3.6);
- it looks for overflow, and for NumPy's name of a type, in a roundabout way that takes a third of the time.

What a GPU would not tell is an error: an address outside of the tensors that a kernel was given, a second write to an
address in one launch and, where asked for, a 32-bit integer that overflows.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import core  # noqa: F401  (patched, too: _patch_lang looks for it among this module's names)
from triton.runtime import JITFunction, interpreter

from support import interpreter_types
from tsbn_kernels.backends import triton as backend
from tsbn_kernels.backends.plan import Device
from tsbn_kernels.backends.triton import launch, ops
from tsbn_kernels.backends.triton import passes as backend_passes
from tsbn_kernels.backends.triton.passes import Pass
from tsbn_kernels.operator.ops import flat, operators

PACKAGE = "tsbn_kernels.backends.triton.kernels"


# ---- the interpreter -------------------------------------------------------------------------------------------------


class Function(interpreter.InterpretedFunction):
    """A kernel, or a function that kernels call."""

    def run(self, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        """Runs a kernel's programs one by one; the tensors are on the CPU, and none is copied."""
        annotations = self.fn.__annotations__
        given = {
            name: value if "constexpr" in str(annotations.get(name)) else interpreter._implicit_cvt(value)
            for name, value in zip(self.arg_names, args, strict=True)
        }
        with language(Builder(tensors(args))) as builder:
            builder.set_grid_dim(*grid)
            for program in range(grid[0]):
                builder.set_grid_idx(program, 0, 0)
                self(**given)
            builder.assert_written_once()

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.rewrite()(*args, **options)


def tensors(args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors among a kernel's arguments and in its tuples."""
    found = [tensor for arg in args if isinstance(arg, tuple) for tensor in tensors(arg)]
    return found + [arg for arg in args if isinstance(arg, Tensor)]


def extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first value to the end of its last one in memory."""
    last = sum(distance * (size - 1) for distance, size in zip(tensor.stride(), tensor.shape, strict=True))
    return (last + 1) * tensor.element_size()


class Builder(interpreter.InterpreterBuilder):
    """What Triton's functions compute with."""

    overflow = False  # whether to look for it

    def __init__(self, accessible: list[Tensor]) -> None:
        super().__init__()
        self.options = interpreter.InterpreterOptions(debug=self.overflow, sanitize_overflow=self.overflow)
        self.spans = [(t.data_ptr(), t.data_ptr() + extent(t)) for t in accessible]
        self.stored: list[Any] = []

    def create_masked_load(self, ptrs: Any, mask: Any, *options: Any) -> Any:
        self._check("read", ptrs, mask)
        return super().create_masked_load(ptrs, mask, *options)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *options: Any) -> Any:
        self.stored.append(self._check("written", ptrs, mask))
        return super().create_masked_store(ptrs, value, mask, *options)

    def _check(self, what: str, ptrs: Any, mask: Any) -> Any:
        addresses = np.broadcast_to(ptrs.data, mask.data.shape)[mask.data.astype(bool)]  # "and" makes integers of masks
        if not addresses.size:
            return addresses
        low, high = int(addresses.min()), int(addresses.max())
        if any(first <= low and high < last for first, last in self.spans):  # all in one tensor
            return addresses
        inside = np.zeros(addresses.shape, bool)
        for first, last in self.spans:
            inside |= (addresses >= first) & (addresses < last)
        assert inside.all(), f"{(~inside).sum()} addresses outside of all tensors are {what}"
        return addresses

    def assert_written_once(self) -> None:
        written = np.concatenate(self.stored) if self.stored else np.empty(0)
        assert len(np.unique(written)) == len(written), "an address is written twice"

    def cast_impl(self, source: Any, dtype: Any) -> Any:
        """Converts values; floats to the nearest, and to the even one of two."""
        data, old, new = source.data, source.dtype.scalar, dtype.scalar
        if old == tl.bfloat16:
            data = (data.astype(np.uint32) << 16).view(np.float32)
        if new == tl.bfloat16:
            data = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16).view(torch.uint16).numpy()
        return interpreter.TensorHandle(data.astype(interpreter._get_np_dtype(new)), new)


_RANGES = {f"{sign}int{bits}": np.iinfo(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32)}
_EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def assert_no_overflow(left: tl.tensor, right: tl.tensor, operation: Any) -> None:
    """Computes a sum, difference or product of narrow integers in 64 bits; wider ones are not looked at."""
    held = _RANGES.get(left.dtype.name)
    if interpreter.interpreter_builder.overflow and held is not None:
        exact = _EXACT[operation.__name__](*(operand.handle.data.astype(np.int64) for operand in (left, right)))
        assert ((exact >= held.min) & (exact <= held.max)).all(), f"{left.dtype} overflow in {operation.__name__}"


class NumpyTypes(dict[str, Any]):
    """NumPy's types by the names of Triton's; pointers are integers."""

    def __call__(self, dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in self:
            self[name] = _get_np_dtype(dtype)
        return self[name]


_get_np_dtype = interpreter._get_np_dtype
_numpy_types = NumpyTypes()


class Reduction(interpreter.ReduceOps):
    """Reduces by halves, as lanes that exchange values do."""

    def apply_impl(self, input: tuple[Any, ...]) -> list[Any]:
        axis = self.axis  # None: over all values
        arrays = [tensor.handle.data for tensor in input]
        arrays = [array.ravel() if axis is None else np.moveaxis(array, axis, 0) for array in arrays]
        dtypes = [tensor.dtype for tensor in input]
        while (half := len(arrays[0]) // 2) > 0:
            halves = (array[part] for part in (slice(half), slice(half, None)) for array in arrays)
            result = self.combine_fn(*(self.to_tensor(a, t) for a, t in zip(halves, 2 * dtypes, strict=True)))
            arrays = [tensor.handle.data for tensor in (result if isinstance(result, tuple) else (result,))]
        results = (np.moveaxis(a, 0, axis) if self.keep_dims else a[0] for a in arrays)
        return [self.to_tensor(a, t) for a, t in zip(results, dtypes, strict=True)]


@cache
def _standard() -> dict[str, Function]:
    """Triton's own functions, such as ``tl.sum``."""
    return {name: Function(f.fn) for name, f in vars(tl.standard).items() if isinstance(f, JITFunction)}


_patches: list[tuple[Any, str, Any]] = []


def _patch_language() -> Any:
    """Triton looks for all that is to be patched: once, and what it finds serves every launch."""
    if _patches:
        scope = interpreter._LangPatchScope()
        for patch in _patches:
            scope.set_attr(*patch)
    else:
        scope = interpreter._patch_lang(Function.run)
        scope.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.squeeze()))
        _patches.extend((owner, name, vars(owner)[name]) for owner, name, _ in scope._changes)
    return scope


@contextmanager
def language(builder: Builder) -> Iterator[Builder]:
    """Makes ``triton.language`` compute at once, on NumPy arrays, instead of building a program."""
    with pytest.MonkeyPatch.context() as patch, triton.knobs.runtime.scope(), np.errstate(all="ignore"):
        triton.knobs.runtime.interpret = True
        for name, function in _standard().items():
            patch.setattr(tl.standard, name, function)
            if hasattr(tl, name):
                patch.setattr(tl, name, function)
        patch.setattr(interpreter, "ReduceOps", Reduction)
        patch.setattr(interpreter, "_get_np_dtype", _numpy_types)
        interpreter_types.use(builder, patch)
        patch.setattr(interpreter.interpreter_semantic, "binary_op_sanitize_overflow_impl", assert_no_overflow)
        scope = _patch_language()
        try:
            yield builder
        finally:
            scope.restore()


# ---- the kernels -----------------------------------------------------------------------------------------------------


class Kernels(NamedTuple):
    """The kernel modules, interpreted."""

    tiles: Any
    activations: Any
    epilogue: Any
    statistics: Any
    running: Any
    forward: Any
    backward: Any
    cluster: Any
    double_backward: Any
    fan_out: Any
    layer_norm: Any
    mixed: Any
    mixed_layer_norm: Any


@cache
def kernels() -> Kernels:
    """Loads the kernel modules a second time; the package keeps its own."""
    names = [f"{PACKAGE}.{name}" for name in Kernels._fields]
    with pytest.MonkeyPatch.context() as patch, triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        patch.setattr(interpreter, "InterpretedFunction", Function)
        for name in Kernels._fields:
            patch.delitem(sys.modules, f"{PACKAGE}.{name}")
            patch.delattr(backend.kernels, name)
        return Kernels(*map(importlib.import_module, names))


def device(threads: int, multiprocessors: int = 4) -> Device:
    """A device so small that a slab of a few hundred values is too much for a block, or too little for the device."""
    sizes = multiprocessors, 1 << 16, 228 << 10, 227 << 10, threads, 32, 1 << 20
    return Device("toy", "sm_90", *sizes, bandwidth=1e12, block_threads=threads)


@contextmanager
def interpreted(device: Device, overflow: bool = False) -> Iterator[None]:
    """Lets the Triton backend run on CPU tensors, by the plans of a device."""
    loaded = kernels()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Builder, "overflow", overflow)
        patch.setattr(launch, "MODULES", loaded)
        patch.setattr(backend_passes, "activations", loaded.activations)
        patch.setattr(ops, "forwards", {})
        patch.setattr(ops, "backwards", {})
        patch.setattr(ops, "device_of", lambda _: device)
        yield


@contextmanager
def dispatched(device: Device, overflow: bool = False) -> Iterator[None]:
    """The same for every call of ``torch.ops.tsbn`` on CPU tensors."""
    library = torch.library.Library("tsbn", "IMPL")
    with interpreted(device, overflow):
        try:
            for name, operator in flat(operators("triton"))._asdict().items():
                library.impl(name, operator, "CPU", allow_override=True)
            yield
        finally:
            library._destroy()


def passes() -> list[Pass]:
    """What ran since :func:`interpreted` began, each kind once."""
    kept = (*ops.forwards.values(), *ops.backwards.values())
    return [one for run in kept for one in (run if isinstance(run, tuple) else (run,))]
