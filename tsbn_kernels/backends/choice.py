"""Which GPU backend a call is planned for, where Triton and CUDA C++ are both at hand.

There is a function for each operator that has kernels in both, with the arguments of the operator; it names a backend.
What is remembered depends on x and the options alone: other activations are taken to lie as x does, all of them at
multiples of 16 bytes. See :mod:`tsbn_kernels.backends.plan.choice` for the rule.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from tsbn_kernels.backends import cuda, forced
from tsbn_kernels.backends.fallback import Operator, summary
from tsbn_kernels.backends.plan import choice as rule
from tsbn_kernels.backends.plan import layer_norm as layer_plan
from tsbn_kernels.backends.plan.work import work_of
from tsbn_kernels.definition.options import LayerNeeds, LayerOptions, LayerSaved, Needs, Options, Running, Saved


def planned(choose: Callable[..., str], orders: Mapping[str, Operator]) -> Operator:
    """The operator of the backend that ``choose`` names for a call.

    Where one is forced it makes the call. Where no plan fits the first of ``orders`` does; and where the choice itself
    fails, with one warning, unless that operator fails too: then the caller is at fault, or the device.
    """
    (preferred, first), *_ = orders.items()

    def call(*arguments: Any) -> Any:
        name = forced()
        try:
            operator = orders[choose(*arguments)] if name is None else orders.get(name, first)
        except ValueError:
            operator = first
        except Exception as error:
            result = first(*arguments)
            _warn(preferred, summary(error))
            return result
        return operator(*arguments)

    return call


@cache
def _warn(preferred: str, reason: str) -> None:
    warnings.warn(f"tsbn-kernels cannot plan which backend is faster, and takes {preferred}: {reason}", stacklevel=3)


# ---- the operators ---------------------------------------------------------------------------------------------------


def forward_training(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, options: Options) -> str:
    return _normalized(x, bias, residual, options, False)


def forward_tracked(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, running: Running, options: Options
) -> str:
    return _normalized(x, bias, residual, options, True)


def _normalized(x: Tensor, bias: Tensor | None, residual: Tensor | None, options: Options, tracks: bool) -> str:
    has = bias is not None, residual is not None
    return _batch_norm(x.shape, x.stride(), x.dtype, x.device, options, None, True, *has, tracks)


def forward_eval(saved: Saved, options: Options) -> str:
    x, _, bias, residual, *_ = saved
    has = bias is not None, residual is not None
    return _batch_norm(x.shape, x.stride(), x.dtype, x.device, options, None, False, *has, False)


def backward(dy: Tensor, saved: Saved, training: bool, needs: Needs, options: Options) -> str:
    x, _, bias, residual, *_ = saved
    has = bias is not None, residual is not None
    return _batch_norm(x.shape, x.stride(), x.dtype, x.device, options, needs, training, *has, False)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, options: LayerOptions) -> str:
    has = bias is not None, residual is not None
    return _layer_norm(x.shape, x.dtype, x.device, weight.shape, options, None, *has)


def layer_norm_backward(
    dy: Tensor, ds: Tensor | None, saved: LayerSaved, needs: LayerNeeds, options: LayerOptions
) -> str:
    x, weight, *_ = saved
    return _layer_norm(x.shape, x.dtype, x.device, weight.shape, options, needs, False, ds is not None)


@lru_cache(maxsize=4096)
def _batch_norm(
    shape: torch.Size,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    options: Options,
    needs: Needs | None,
    training: bool,
    bias: bool,
    residual: bool,
    tracks: bool,
) -> str:
    x = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    work = work_of(x, options, needs, training=training, bias=bias, residual=residual)
    on = cuda.launches.device_of(device)
    return rule.best(rule.offers(work, on, cuda.batch_norm.clusters(dtype, device), tracks)).backend


@lru_cache(maxsize=4096)
def _layer_norm(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    parameters: torch.Size,
    options: LayerOptions,
    needs: LayerNeeds | None,
    bias: bool,
    residual: bool,
) -> str:
    x, weight = (torch.empty(size, dtype=dtype, device="meta") for size in (shape, parameters))
    work = layer_plan.work_of(x, weight, options, needs, bias=bias, residual=residual)
    return rule.best(rule.offers(work, cuda.launches.device_of(device))).backend
