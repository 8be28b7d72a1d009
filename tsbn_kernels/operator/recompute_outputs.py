"""Training without the outputs of the fused layers kept for the operators that follow them.

A convolution saves its input for its backward pass: the output of the layer before it, of the same size as what that
layer saves itself. The output follows from that and the ``[T, C]`` vectors in one cheap pass, so it need not be kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tsbn_kernels.definition.options import Options, Saved
from tsbn_kernels.operator import direct
from tsbn_kernels.operator.coefficients import coefficients
from tsbn_kernels.operator.mixed_ops import operators as mixed_operators
from tsbn_kernels.operator.ops import operators


@dataclass(frozen=True)
class _Output:
    """An output that can be had again."""

    tensor: Callable[[], Tensor | None]  # the output itself, as long as anybody has it
    version: int
    again: Callable[[], Tensor]


_Outputs = dict[int, _Output]  # by the identity of their storage: those of meta tensors all have address 0
_outputs: ContextVar[_Outputs | None] = ContextVar("outputs", default=None)


@contextmanager
def recompute_outputs() -> Iterator[None]:
    """In a forward pass inside this context, no operator keeps the output of a fused layer for its backward pass.

    ``with recompute_outputs(): loss = model(x)`` and then ``loss.backward()``: what follows a layer (a convolution, a
    pooling) gets the layer's output computed anew from its input when its backward pass needs it: one read and one
    write of the activation more, half of the memory of a block of convolution, normalisation and activation less. First
    and higher derivatives are those of the output that was there, to rounding. An output that is changed in place is
    kept, as anything else is.

    It has no effect inside of ``torch.compile`` and ``torch.export``: the partitioner decides what is kept.
    """
    if torch.compiler.is_compiling():
        yield
        return
    outputs: _Outputs = {}

    def pack(tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        output = outputs.get(tensor.untyped_storage()._cdata)
        original = None if output is None else output.tensor()
        if output is None or original is None or not original._version == output.version == tensor._version:
            return tensor
        if tensor.dtype != original.dtype or tensor.is_neg():  # complex numbers, or values of another sign
            return tensor
        return partial(_view_of, output.again, tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept()

    token = _outputs.set(outputs)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _outputs.reset(token)


@torch.no_grad()
def _view_of(again: Callable[[], Tensor], size: Any, stride: Any, offset: Any) -> Tensor:
    return again().as_strided(size, stride, offset)


def wanted() -> bool:
    """Whether outputs are to be offered, outside of ``torch.compile``."""
    return _outputs.get() is not None


def offer(
    streams: Sequence[Tensor],
    compute: Callable[..., Tensor],
    parameters: Sequence[Tensor | None],
    activations: Sequence[Tensor | None],
) -> None:
    """Says how to compute an output again; what is saved of it from now on need not be kept.

    Args:
        streams: the output as one tensor, or views of one: the streams of its tasks.
        compute: takes what ``parameters`` and ``activations`` are, without a graph.
        parameters: those of the layer, which are copied: FSDP frees its own between the passes.
        activations: what the layer saves for its backward pass in any case.
    """
    outputs = _outputs.get()
    assert outputs is not None
    copies = [None if t is None else t.clone() for t in parameters]
    tensors = [None if t is None else t.detach() for t in (*copies, *activations)]
    versions = [None if t is None else t._version for t in tensors]

    def again() -> Tensor:
        if versions != [None if t is None else t._version for t in tensors]:
            raise RuntimeError(
                "an input of a fused layer was changed in place after the forward pass, and its output is to be "
                "computed again from it (recompute_outputs); change a copy, or after the backward pass"
            )
        return compute(*tensors)

    y = streams[0]
    if y.requires_grad:
        storage = y.untyped_storage()._cdata
        outputs[storage] = _Output(weakref.ref(y, lambda _: outputs.pop(storage, None)), y._version, again)


def offer_normalized(
    outputs: Sequence[Tensor],
    saved: Saved,
    task_of_sample: tuple[Tensor, ...],
    options: Options,
    group: Any,
    backend: str | None,
) -> None:
    """Offers to compute the outputs of batch normalisation; ``task_of_sample`` is that of a mixed batch, or empty."""
    if group is not None:
        saved, options = coefficients(saved, options)
    compute = partial(_again, options, backend)
    offer(outputs, compute, saved[1:3], (saved.x, *saved[3:], *task_of_sample))


def _again(options: Options, backend: str | None, weight: Tensor, bias: Tensor | None, x: Tensor, *more: Any) -> Tensor:
    residual, mean, var, *task_of_sample = more
    saved, backend = Saved(x, weight, bias, residual, mean, var), direct.of_later_pass(backend)
    if task_of_sample:
        return mixed_operators(backend).mixed_forward_eval(saved, task_of_sample[0], options)
    return operators(backend).forward_eval(saved, options)
