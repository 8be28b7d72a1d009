"""Which calls go straight to the kernels of a GPU, past PyTorch's dispatcher.

The dispatcher's way to an operator that is written in Python and back, with some twenty arguments, takes as long on the
host as all else of a call. Where it would find nothing on its way but the kernels, a call does without it. It is needed
for tensors that stand for others (fakes, subclasses, negated views), for what watches operators (modes, tracers, the
profiler, which shows their names), and for the CPU, whose kernels are registered in C++.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tsbn_kernels import backends
from tsbn_kernels.backends import triton

_keys_of = torch._C._dispatch_keys
_Key, _Keys = torch._C.DispatchKey, torch._C.DispatchKeySet


def _bits(*names: str) -> int:
    bits = 0
    for name in names:
        bits |= _Keys(getattr(_Key, name)).raw_repr()
    return bits


def own_keys(key: str) -> int:
    """All keys that a tensor may have that stands for itself alone, and whose kernels are those of ``key``."""
    return _bits(key, f"Autograd{key}", f"Autocast{key}", "ADInplaceOrView")


_OWN = {key: own_keys(key) for key in triton.DISPATCH_KEYS}  # of GPUs
_OF_EVERY_THREAD = _bits("ADInplaceOrView", "BackendSelect")


def backend_of(x: Tensor, *others: Tensor | None) -> str | None:
    """The backend that computes a call of some tensors.

    Returns:
        The name of one that was chosen, or a key of the dispatcher whose kernels are called directly. None: the
        dispatcher finds them, those of the chosen one too.

    Raises:
        RuntimeError: the chosen one does not run on the device of x.
    """
    if backends.forced() is not None:
        name = backends.override(x.device.type)
        return None if _reads_wrongly(name, x, *others) else name
    key = "CUDA" if x.is_cuda else "CPU" if x.is_cpu else x.device.type.upper()  # a device's name takes long
    return key if key in _OWN and _finds_kernels(key, x, *others) else None


def of_later_pass(backend: str | None, *gradients: Tensor | None) -> str | None:
    """The backend of a pass over what a forward pass saved: that of the forward pass.

    Where it is called directly this is for gradients that nobody will differentiate again, by whatever they then meet.
    """
    if backend in _OWN:
        return backend if not torch.is_grad_enabled() and _finds_kernels(backend, *gradients) else None
    return None if _reads_wrongly(backend, *gradients) else backend


def _reads_wrongly(name: str | None, *tensors: Tensor | None) -> bool:
    """Whether the kernels of a chosen backend would miss a sign; the dispatcher copies negated views for them."""
    if name in ("triton", "cuda") and not torch.compiler.is_compiling():
        for tensor in tensors:
            if tensor is not None and tensor.is_neg():
                return True
    return False


def _finds_kernels(key: str, *tensors: Tensor | None) -> bool:
    """Whether the dispatcher would hand these tensors to the kernels of a key, and to nobody else before."""
    if torch.compiler.is_compiling() or torch._C._autograd._profiler_enabled():
        return False
    if torch._C._dispatch_tls_local_include_set().raw_repr() & ~_OF_EVERY_THREAD:
        return False
    bits = 0
    for tensor in tensors:
        if tensor is not None:
            bits |= _keys_of(tensor).raw_repr()
    return not bits & ~_OWN[key]
