"""The operators of :class:`tsbn_kernels.definition.options.LayerBackend` by the CUDA C++ kernels."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from tsbn_kernels.backends.cuda import launches
from tsbn_kernels.backends.cuda.launches import Operands
from tsbn_kernels.backends.plan import layer_norm_cuda as rules
from tsbn_kernels.backends.plan.layer_norm import work_of
from tsbn_kernels.backends.plan.slots import PASSES
from tsbn_kernels.definition import layer_norm as reference
from tsbn_kernels.definition.layout import contiguous
from tsbn_kernels.definition.options import (
    LayerGradients,
    LayerNeeds,
    LayerNormalized,
    LayerOptions,
    LayerSaved,
)

# Passes of csrc/cuda/launch.h, behind those of batch normalisation.
FORWARD, BACKWARD, PARAMETERS = range(len(PASSES), len(PASSES) + 3)
NAMES = {FORWARD: "layer_norm_forward", BACKWARD: "layer_norm_backward", PARAMETERS: "layer_norm_parameters"}


class _Call(NamedTuple):
    """All that the plans of a pass depend on; ``needs`` in a backward pass.

    Attributes:
        residual: whether something is added: to x, or backward to its gradient.
        aligned: whether all activations begin at multiples of 16 bytes.
    """

    shape: torch.Size
    dtype: torch.dtype
    parameters: torch.Size
    weight: torch.dtype
    bias: torch.dtype | None
    options: LayerOptions
    needs: LayerNeeds | None
    residual: bool
    aligned: bool


class _Pass(NamedTuple):
    """One plan: its kernels with their numbers, the bytes left between them, and which gradients they give."""

    kernels: list[list[int]]
    numbers: list[int]
    partial_bytes: int
    needs: LayerNeeds


@lru_cache(maxsize=4096)
def _prepare(call: _Call, device: torch.device) -> list[_Pass]:
    options, on = call.options, launches.device_of(device)
    if options.gate not in ("sigmoid", "identity"):
        raise ValueError(f"unknown gate {options.gate!r}")
    x = torch.empty(call.shape, dtype=call.dtype, device="meta")
    weight = torch.empty(call.parameters, dtype=call.weight, device="meta")
    work = work_of(x, weight, options, call.needs, bias=call.bias is not None, residual=call.residual)
    found = []
    for plan in rules.plans(work, on, call.aligned):
        part, which = plan.work, (launches.code(call.dtype), 0 if plan.vector > 1 else 2)
        vectors = [(0, 0, 0) if d is None else (launches.code(d), part.channels, 1) for d in (call.weight, call.bias)]
        rows = BACKWARD if part.backward else FORWARD
        kernels = [[*which, rows, plan.programs, plan.threads, 1, plan.shared_bytes, 0]]
        if plan.merges:
            kernels.append([*which, PARAMETERS, plan.merging_programs, rules.THREADS, 1, 0, 0])
        numbers = list(rules.numbers(plan, options.gate == "sigmoid", tuple(n for v in vectors for n in v)))
        needs = LayerNeeds(part.needs_dx, part.needs_dweight, part.needs_dbias)
        found.append(_Pass(kernels, numbers, plan.partial_bytes, needs))
    return found


def _call(options: LayerOptions, needs: LayerNeeds | None, operands: Operands) -> list[_Pass]:
    x, dy, residual, out, added, weight, bias, *_ = operands
    assert weight is not None
    aligned = all(t is None or t.data_ptr() % 16 == 0 for t in (x, dy, residual, out, added))
    vectors = weight.shape, weight.dtype, None if bias is None else bias.dtype
    call = _Call(x.shape, x.dtype, *vectors, options, needs, residual is not None, aligned)
    return _prepare(call, x.device)


def _run(one: _Pass, eps: float, operands: Operands) -> None:
    partial = operands.x.new_empty(one.partial_bytes, dtype=torch.uint8) if one.partial_bytes else None
    assert operands.weight is not None
    slope = operands.weight.size(0) / operands.weight.numel()  # 1 / D
    for kernel in one.kernels:
        launches.launch(NAMES[kernel[2]], kernel, one.numbers, eps, slope, operands._replace(partial=partial))


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, options: LayerOptions
) -> LayerNormalized:
    """Raises ValueError where a row is longer than a block holds."""
    if x.numel() == 0:
        return reference.layer_norm(x, weight, bias, residual, options)
    x, weight = x.contiguous(), weight.contiguous()
    bias, residual = contiguous(bias), contiguous(residual)
    y, s, mean, rstd = found = reference.empty_outputs(x, weight, residual, options)
    operands = Operands(x, None, residual, y, s, weight, bias, first=mean, second=rstd)
    for one in _call(options, None, operands):
        _run(one, options.eps, operands)
    return found


def layer_norm_backward(
    dy: Tensor, ds: Tensor | None, saved: LayerSaved, needs: LayerNeeds, options: LayerOptions
) -> LayerGradients:
    """Raises ValueError where a row is longer than a block holds, and the gradient of x is needed."""
    if saved.s.numel() == 0:
        return reference.layer_norm_backward(dy, ds, saved, needs, options)
    if not any(needs):
        return LayerGradients()
    x, weight, mean, rstd = saved.contiguous()
    dy, ds = dy.contiguous(), contiguous(ds) if needs.dx else None
    dx, dweight, dbias = found = reference.empty_gradients(x, weight, needs)
    operands = Operands(x, dy, ds, dx, None, weight, None, mean, rstd, dweight, dbias)
    for one in _call(options, needs, operands):
        own = operands._replace(
            residual=ds if one.needs.dx else None,
            out=dx if one.needs.dx else None,
            first=dweight if one.needs.dweight else None,
            second=dbias if one.needs.dbias else None,
        )
        _run(one, options.eps, own)
    return found
