"""Random tensors: in any layout, with any content, and what is no proper operand at all."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "contiguous", "channels_last", "permuted", "window", "expanded", "misaligned", "negated")
CONTENTS = ("normal", "normal", "normal", "shifted", "constant", "zero", "denormal", "tiny", "huge", "nan", "inf")


class Labelled(Tensor):
    """A subclass as users write them: it passes through every operator."""


def normal(rng: random.Random, shape: tuple[int, ...], content: str = "normal") -> Tensor:
    """float64 values."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if content == "shifted":
        return values + rng.choice([-30.0, 10.0, 100.0])
    if content in ("constant", "zero"):
        return torch.full(shape, rng.uniform(-9, 9) if content == "constant" else 0.0, dtype=torch.float64)
    if content in ("denormal", "tiny", "huge"):
        return values * {"denormal": 1e-40, "tiny": 1e-6, "huge": 1e30}[content]
    if content in ("nan", "inf") and values.numel():
        values.view(-1)[rng.randrange(values.numel())] = float(content) * rng.choice([-1, 1])
    return values


def laid_out(rng: random.Random, values: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; an expanded one repeats its first samples."""
    if values.dim() < 2 or layout == "contiguous":
        result = values.clone()
    elif layout == "channels_last":
        result = values.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "permuted":
        axes = rng.sample(range(values.dim()), values.dim())
        result = values.permute(axes).contiguous().permute([axes.index(axis) for axis in range(values.dim())])
    elif layout == "window":
        room = torch.full([size + 2 for size in values.shape], float("nan")).to(values.dtype)
        result = room[tuple(slice(1, size + 1) for size in values.shape)].copy_(values)
    elif layout == "expanded":
        axis = rng.randrange(values.dim())
        result = values.narrow(axis, 0, min(1, values.shape[axis])).expand(values.shape)
    elif layout == "negated":  # in memory with the other sign
        result = torch._neg_view(-values)
    else:  # misaligned by a few elements
        memory = torch.full((values.numel() + 3,), float("nan")).to(values.dtype)
        result = memory[rng.randrange(1, 4) :][: values.numel()].view(values.shape).copy_(values)
    return result


def hostile_tensors(tensor: Any) -> dict[str, Callable[[], Any]]:
    """What may stand where ``tensor`` should: by a name that tells how to make it again."""
    t = tensor if isinstance(tensor, Tensor) else torch.ones(2, 3)
    return {
        "None": lambda: None,
        "'text'": lambda: "text",
        "3": lambda: 3,
        "object()": object,
        ".tolist()": lambda: t.float().tolist(),
        ".numpy()": lambda: t.float().numpy(),
        "np.flip": lambda: np.flip(t.float().numpy()),
        ".int()": lambda: t.nan_to_num(0).int(),
        ".bool()": t.bool,
        ".to(complex64)": lambda: t.to(torch.complex64),
        ".to(float8_e4m3fn)": lambda: t.to(torch.float8_e4m3fn),
        ".to_sparse()": t.to_sparse,
        "to_sparse_csr": lambda: torch.ones(2, 3).to_sparse_csr(),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]),
        "jagged": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged),
        "quantized": lambda: torch.quantize_per_tensor(t.float().nan_to_num(0), 0.1, 0, torch.quint8),
        ".to('meta')": lambda: t.to("meta"),
        ".to_mkldnn()": lambda: t.float().contiguous().to_mkldnn(),
        "0-d": lambda: torch.tensor(1.0),
        "1-d": lambda: torch.ones(6),
        "[None]": lambda: t[None],
        "[..., :0]": lambda: t[..., :0],
        "[:0]": lambda: t[:0],
        "transposed": lambda: t.transpose(0, -1) if t.dim() else t,
        "one more": lambda: torch.cat([t, t[:1]]) if t.dim() else t,
        "overlapping": lambda: (
            torch.arange(t.numel() + 9.0).as_strided(t.shape, [1] * t.dim()).to(t.dtype) if t.is_floating_point() else t
        ),
        "subclass": lambda: t.as_subclass(Labelled),
        "Parameter": lambda: torch.nn.Parameter(t),
        "inference": lambda: _inference(t),
        "9-d": lambda: torch.ones(2, 1, 2, 1, 2, 1, 2, 1, 2),
    }


def _inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


HOSTILE_SCALARS: dict[str, list[Any]] = {
    "int": [0, -1, 2, 7, 2**40, 2**70, 1.5, float("nan"), "3", None, True, np.int64(3), torch.tensor(3), [3], 1j],
    "float": [
        0.0, 0, -1.0, 1.0, 5.0, float("nan"), float("inf"), 10**400, "0.1", None, True, 1j, np.float32(0.1), [0.1],
        torch.tensor(0.1), torch.ones(2, 3, 4), 1e-30,
    ],
    "str": ["", "SIGMOID", "identity", "task_axis", "none", "relu", None, 7, b"sigmoid", [], {}, ("sigmoid",), True],
    "bool": [None, 0, 1, "no", 2, [], np.bool_(True), torch.tensor(True), "frozen", True],
}  # fmt: skip


def describe(value: Any) -> str:
    """Short, and enough to see what a call was given."""
    if isinstance(value, Tensor):
        try:
            strides = f", strides {tuple(value.stride())}"
        except RuntimeError:
            strides = f", {value.layout}"
        shape = "nested" if value.is_nested else tuple(value.shape)
        kind = type(value).__name__
        return f"<{kind} {shape} {str(value.dtype).removeprefix('torch.')}{strides}, {value.device}>"
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."
