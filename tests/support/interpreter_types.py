"""Types and operands of Triton's interpreter, found once instead of for each operation: it then takes half the time.

The interpreter computes with NumPy on small arrays; nine tenths of its time go into describing them.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


class _Once(type):
    """Makes a type once for each type of elements, which keeps it, and shape: types of the same object are equal."""

    def __call__(cls, element_ty: Any, shape: Iterable[Any]) -> Any:
        sizes = tuple([size.value if isinstance(size, core.constexpr) else size for size in shape])
        made = vars(element_ty).setdefault("blocks", {})
        if sizes not in made:
            made[sizes] = super().__call__(element_ty, list(sizes))
        return made[sizes]


class Block(core.block_type, metaclass=_Once):  # type: ignore[misc]
    """The type of a tensor of one or more dimensions, with the sizes as the tensor gives them."""

    def __init__(self, element_ty: Any, shape: list[int]) -> None:
        super().__init__(element_ty, shape)
        self.sizes = tuple(shape)
        self.dimensions = core.tuple([core.constexpr(size) for size in shape])
        self.count = core.constexpr(self.numel)

    def with_element_ty(self, scalar_ty: Any) -> Any:
        return _block(scalar_ty, self.sizes)


def _block(element_ty: Any, sizes: tuple[int, ...]) -> Any:
    """The type of such a tensor, most often one that was made before."""
    return vars(element_ty).get("blocks", {}).get(sizes) or Block(element_ty, sizes)


_NO_DIMENSIONS, _ONE = core.tuple([]), core.constexpr(1)


def _describe(tensor: Any, handle: Any, type: Any) -> None:
    """What ``tl.tensor.__init__`` does."""
    tensor.handle, tensor.type, tensor.dtype = handle, type, type.scalar
    tensor.shape, tensor.numel = (type.dimensions, type.count) if isinstance(type, Block) else (_NO_DIMENSIONS, _ONE)


_NUMBERS, _HALVES = ("int32", "int64", "fp32", "fp64"), ("fp16", "bf16")
# Conversions in one step, all of them `Builder.cast_impl`.
_DIRECT = {
    *product(("int1", *_NUMBERS), _NUMBERS),
    *product(_HALVES, ("fp32",)),
    *product(("fp32",), _HALVES),
}


class Semantic(TritonSemantic):  # type: ignore[misc, type-arg]
    """What operators do with their operands."""

    def __init__(self, builder: Any) -> None:
        super().__init__(builder)
        self.common: dict[tuple[Any, ...], Any] = {}

    def binary_op_type_checking_impl(self, lhs: Any, rhs: Any, *flags: bool, **named: bool) -> Any:
        if named or not (isinstance(lhs, core.tensor) and isinstance(rhs, core.tensor)):
            return super().binary_op_type_checking_impl(lhs, rhs, *flags, **named)
        key = lhs.dtype.name, rhs.dtype.name, *flags
        if key not in self.common:
            self.common[key] = self._common_type(lhs.dtype, rhs.dtype, *flags)
        common = self.common[key]
        if common is not None:
            lhs, rhs = self.cast(lhs, common), self.cast(rhs, common)
        return self.broadcast_impl_value(lhs, rhs)

    def _common_type(
        self,
        left: Any,
        right: Any,
        pointer_left: bool = False,
        pointer_right: bool = False,
        arithmetic: bool = True,
        division: bool = False,
    ) -> Any:
        self.check_ptr_type_impl(left, right, pointer_left)
        self.check_ptr_type_impl(right, left, pointer_right)
        if not arithmetic or left.is_ptr() or right.is_ptr():
            return None
        return self.computation_type_impl(left, False, right, False, division)

    def broadcast_impl_value(self, lhs: Any, rhs: Any) -> Any:
        left, right = lhs.type, rhs.type
        if left.is_block() and not right.is_block():
            return lhs, self._splat(rhs, left)
        if right.is_block() and not left.is_block():
            return self._splat(lhs, right), rhs
        if left is right or not left.is_block() or left.sizes == right.sizes:
            return lhs, rhs
        return super().broadcast_impl_value(lhs, rhs)

    def _splat(self, scalar: Any, block: Any) -> Any:
        made = block.with_element_ty(scalar.dtype)
        return core.tensor(self.builder.create_splat(made, scalar.handle), made)

    def cast(self, input: Any, dst_ty: Any, fp_downcast_rounding: Any = None) -> Any:
        names = input.dtype.name, dst_ty.scalar.name
        if names[0] == names[1]:
            return input
        if fp_downcast_rounding is not None or names not in _DIRECT:
            return super().cast(input, dst_ty, fp_downcast_rounding)
        made = input.type.with_element_ty(dst_ty.scalar)
        return core.tensor(self.builder.cast_impl(input.handle, made), made)


_SEMANTIC = Semantic(interpreter.interpreter_builder)


# ---- operators without conversions, which most are -------------------------------------------------------------------

_HELD = {"int32": np.dtype("i4"), "int64": np.dtype("i8"), "fp32": np.dtype("f4"), "fp64": np.dtype("f8")}
_ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
_COMPARISONS = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}


def _tensor(data: Any, dtype: Any, scalar: Any, block: bool) -> Any:
    """A tensor of ``dtype`` with the values that an operator has made for operands of the type ``scalar``."""
    handle = interpreter.TensorHandle.__new__(interpreter.TensorHandle)
    handle.data, handle.dtype, handle.attr = data, scalar, {}
    return core.tensor(handle, _block(dtype, data.shape) if block else dtype)


def _values(tensor: Any, other: Any, compared: bool) -> tuple[Any, Any, Any, bool] | None:
    """The arrays of two operands, their common type, and whether the result has dimensions.

    None where there is more to do, which the language does: conversions, unsigned integers, narrow floats, masks.
    """
    dtype, block = tensor.dtype, isinstance(tensor.type, Block)
    held = _HELD.get(dtype.name)
    if held is None or tensor.handle.data.dtype is not held:
        return None
    if isinstance(other, core.tensor):
        values, name = other.handle.data, other.dtype.name
        if values.dtype is not _HELD.get(name) or (name != dtype.name and held.kind + values.dtype.kind != "ii"):
            return None
        if name == "int64":
            dtype = other.dtype
        block = block or isinstance(other.type, Block)
    else:
        number = other.value if isinstance(other, core.constexpr) else other
        if type(number) is not int and (compared or type(number) is not float or held.kind == "i"):
            return None
        if compared and held.kind == "f":
            return None
        values = np.array([number or 0], held)  # the language has no constant -0.0
    return tensor.handle.data, values, dtype, block


def _combined(operation: Any, tensor: Any, other: Any, reflected: bool) -> Any:
    """A sum, difference or product."""
    if (found := _values(tensor, other, False)) is None:
        return _moved(tensor, other) if operation is np.add and not reflected else None
    one, two, dtype, block = found
    if dtype.name == "int32" and _SEMANTIC.builder.overflow:
        return None
    return _tensor(operation(two, one) if reflected else operation(one, two), dtype, dtype, block)


def _moved(tensor: Any, other: Any) -> Any:
    """A pointer and an offset."""
    pointer = tensor.dtype
    if not pointer.is_ptr() or not isinstance(other, core.tensor) or other.dtype.name not in ("int32", "int64"):
        return None
    bytes_each = max(1, pointer.element_ty.primitive_bitwidth // 8)
    data = tensor.handle.data + bytes_each * other.handle.data.astype(np.uint64)
    return _tensor(data, pointer, pointer, isinstance(tensor.type, Block) or isinstance(other.type, Block))


def _compared(operation: Any, tensor: Any, other: Any, _: bool) -> Any:
    """A mask."""
    if (found := _values(tensor, other, True)) is None:
        return None
    one, two, dtype, block = found
    return _tensor(operation(one, two), core.int1, dtype, block)


def _converted(_: Any, tensor: Any, dtype: Any, __: bool) -> Any:
    """The values as another type, or the tensor itself where it has that."""
    return _SEMANTIC.cast(tensor, dtype) if isinstance(dtype, core.dtype) else None


_OPERATORS = (
    {f"__{name}__": (_combined, operation, False) for name, operation in _ARITHMETIC.items()}
    | {f"__r{name}__": (_combined, operation, True) for name, operation in _ARITHMETIC.items()}
    | {f"__{name}__": (_compared, operation, False) for name, operation in _COMPARISONS.items()}
    | {"to": (_converted, None, False)}
)


def _patch_attr(owner: Any, name: str, member: Any, _: Any, scope: Any) -> None:
    """Gives a function of the language, or a method of its tensors, what computes."""
    function = getattr(member, "__wrapped__", member)  # without a check that it was given that

    def compute(*args: Any, _semantic: Any = None, **options: Any) -> Any:
        return function(*args, **options, _semantic=_SEMANTIC)

    def operate(tensor: Any, other: Any, *more: Any, **options: Any) -> Any:
        made = None if more or options else shortly(operation, tensor, other, reflected)
        return function(tensor, other, *more, **options, _semantic=_SEMANTIC) if made is None else made

    shortly, operation, reflected = _OPERATORS.get(name, (None, None, False))
    scope.set_attr(owner, name, operate if shortly and owner is core.tensor else compute)


def use(builder: Any, patch: pytest.MonkeyPatch) -> None:
    """Lets the interpreter describe its values by these."""
    patch.setattr(_SEMANTIC, "builder", builder)
    patch.setattr(interpreter, "interpreter_builder", builder)
    patch.setattr(interpreter, "interpreter_semantic", _SEMANTIC)
    patch.setattr(interpreter, "_patch_attr", _patch_attr)
    patch.setattr(core.tensor, "__init__", _describe)
    for language in (core, tl):
        patch.setattr(language, "block_type", Block)
