"""A call: what it says, what it does, what it must give."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tsbn_kernels

PACKAGE = str(Path(tsbn_kernels.__file__).parent)
DOCUMENTED = (TypeError, ValueError, RuntimeError, IndexError)
_PYTORCH = ("Inference tensors cannot be saved for backward", "can't allocate memory", "DefaultCPUAllocator")
_BINDING = ("unexpected keyword argument", "missing", "positional argument")  # Python's own words for a wrong signature


class Outcome(NamedTuple):
    kind: (
        str  # "equal", "refused: ValueError", or a failure: "wrong", "undocumented", "changed", "refused though valid"
    )
    detail: str = ""

    @property
    def failed(self) -> bool:
        return not self.kind.startswith(("equal", "refused: "))


@dataclass
class Call:
    """``run`` makes the call and returns what is wrong with the result, or None.

    Attributes:
        valid: no error is excused.
        inputs: tensors that the call must leave as they are.
    """

    text: str
    run: Callable[[], str | None]
    valid: bool
    inputs: Sequence[Any] = field(default_factory=list)


def _bytes(tensor: Any) -> Any:
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_nested:
        return None
    if tensor.device.type != "cpu" or tensor.is_quantized:
        return None
    storage = tensor.detach().untyped_storage()
    return bytes(storage) if storage.nbytes() < 1 << 24 else None


def _is_documented(error: Exception) -> str | None:
    """None, or what is wrong with an error: it must be raised by us on purpose, and say what came or was expected."""
    if not isinstance(error, DOCUMENTED):
        return "of an undocumented type"
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _PYTORCH):
        return None
    if not frames[-1].filename.startswith(PACKAGE):
        if "/torch/nn/" in frames[-1].filename:  # a module of the user's, such as a convolution
            return None
        if isinstance(error, TypeError) and any(words in str(error) for words in _BINDING):
            return None
        return f"not raised by the package, but in {frames[-1].filename}"
    line = linecache.getline(frames[-1].filename, frames[-1].lineno or 0).strip()
    if not line.startswith("raise ") and not any(words in str(error) for words in _BINDING):
        return f"raised by accident at {Path(frames[-1].filename).name}:{frames[-1].lineno}: {line}"
    return None


def judge(call: Call) -> Outcome:
    """Makes the call."""
    before = [_bytes(tensor) for tensor in call.inputs]
    try:
        problem = call.run()
        outcome = Outcome("equal") if problem is None else Outcome("wrong", problem)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        if (complaint := _is_documented(error)) is not None:
            trace = "".join(traceback.format_exception(error)[-4:])
            outcome = Outcome("undocumented", f"{complaint}: {message}\n{trace}")
        elif call.valid:
            outcome = Outcome("refused though valid", message)
        else:
            outcome = Outcome(f"refused: {type(error).__name__}", message)
    for tensor, was in zip(call.inputs, before, strict=True):
        if was is not None and was != _bytes(tensor):
            return Outcome("changed", f"an input of {tuple(tensor.shape)} was changed; {outcome}")
    return outcome
