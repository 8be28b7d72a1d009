"""Calls of layer normalisation and of its RMS form, with and without the addition before it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from support.tolerances import BACKWARD, FORWARD, Tolerance, unit_in_last_place
from torch import Tensor

from fuzz.calls import Call
from fuzz.definition import LARGEST, compare, in_streams, restacked
from fuzz.layers import SIZES, call_text, draw_index, draw_tensor, draw_way, spoil
from fuzz.tensors import CONTENTS, DTYPES, normal
from fuzz.ways import differentiate, upstream
from tsbn_kernels.functional import add_task_layer_norm, add_task_rms_norm, task_layer_norm, task_rms_norm

FUNCTIONS: tuple[Callable[..., Any], ...] = (task_layer_norm, task_rms_norm, add_task_layer_norm, add_task_rms_norm)
LEAVES = ("x", "residual", "weight", "bias")


def row_arguments(rng: random.Random, rms: bool, adds: bool) -> dict[str, Any]:
    """Those of a valid call; a row has more than one value, so that its deviations say something."""
    T, N = rng.randint(1, 4), rng.choice([0, 1, 2, 2, 3])
    tokens = [rng.choice([1, 2, 3, 7]) for _ in range(rng.randint(0, 2))]
    shape = [rng.choice(SIZES[1:]) for _ in range(rng.choice([1, 1, 2]))]
    dtype, parameter_dtype = rng.choice(DTYPES), rng.choice(DTYPES)
    stacking, fan_out = rng.choice(["task_major", "sample_major", "task_axis"]), rng.random() < 0.25
    index = draw_index(rng, T, N) if fan_out and rng.random() < 0.5 else None  # one input, of samples of any tasks

    def drawn() -> Tensor:
        streams = normal(rng, (1 if fan_out else T, N, *tokens, *shape), rng.choice(CONTENTS))
        return draw_tensor(rng, restacked(streams, "task_major" if fan_out else stacking), dtype)

    def vector(content: str = "normal") -> Tensor:
        return draw_tensor(rng, normal(rng, (T, *shape), content), parameter_dtype)

    return {
        "x": drawn(),
        **({"residual": drawn()} if adds else {}),
        "weight": vector(rng.choice(["normal", "normal", "shifted", "nan"])),
        **({} if rms or rng.random() < 0.5 else {"bias": vector()}),
        "num_tasks": T,
        "eps": rng.choice([1e-5, 1e-3, 1.0]),
        "gate": rng.choice(["sigmoid", "identity"]),
        "stacking": stacking if index is None else "task_major",
        "fan_out": fan_out and index is None,
        **({} if index is None else {"task_of_sample": index}),
    }


def row_call(rng: random.Random) -> Call:
    """One of the functions, forward and backward."""
    function = rng.choice(FUNCTIONS)
    rms, adds = "rms" in function.__name__, "add" in function.__name__
    arguments = row_arguments(rng, rms, adds)
    notes: list[str] = []
    if rng.random() < 0.5:
        for _ in range(rng.choice([1, 1, 2])):
            spoil(rng, arguments, notes)
    for name in LEAVES if rng.random() < 0.7 else ():
        tensor = arguments.get(name)
        floating = isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.is_inference()
        if floating and tensor.is_leaf and rng.random() < 0.8:
            tensor.requires_grad_()
    seed = rng.getrandbits(32)
    inputs = [value for value in arguments.values() if isinstance(value, Tensor)]
    way = "backward" if notes or adds else draw_way(rng, arguments["x"], True)

    def run() -> str | None:
        needed = [name for name in LEAVES if isinstance(v := arguments.get(name), Tensor) and v.requires_grad]

        def called(*tensors: Tensor) -> Any:
            return function(**{**arguments, **dict(zip(needed, tensors, strict=True))})

        passes, rng = None, random.Random(seed)
        if needed and way != "backward" and arguments["x"].numel():
            y, *passes = differentiate(way, called, [arguments[name] for name in needed], rng)
            s = None
        else:
            y, s = function(**arguments) if adds else (function(**arguments), None)
        return check(arguments, rms, y, s, passes, rng)

    return Call(call_text(function.__name__, arguments) + f", {way}", run, not notes, inputs)


def check(given: dict[str, Any], rms: bool, y: Tensor, s: Tensor | None, passes: Any, rng: random.Random) -> str | None:
    """What is wrong with the results of a call, or with its gradients: ``passes`` are dy and those of y."""
    x, residual, fan_out, index = given["x"], given.get("residual"), bool(given["fan_out"]), given.get("task_of_sample")
    if y.device.type != "cpu":
        return None if y.device == x.device else f"y is on {y.device}, x on {x.device}"
    added = (x if residual is None else x + residual).detach().as_subclass(Tensor)
    if s is not None and not torch.equal(s.detach().nan_to_num(7), added.nan_to_num(7)):
        return "s is not x + residual"
    dtype, stacking = added.dtype, given["stacking"]
    T = int(given["num_tasks"]) if index is None else len(index)  # of a mixed batch each sample is a task
    if T == 0:
        return None if y.shape == x.shape and y.dtype == dtype else f"y is {y.dtype} {tuple(y.shape)}"
    place, count = ("task_major", 1) if fan_out else (stacking, T)
    wide = {"s": added, "weight": given["weight"], "bias": given.get("bias")}
    leaves = {
        name: v.detach().as_subclass(Tensor).double().clone().requires_grad_()
        for name, v in wide.items()
        if v is not None
    }
    streams = in_streams(leaves["s"], count, place)  # [T, N, *tokens, *shape]
    shape = leaves["weight"].shape[1:]
    axes = tuple(range(-len(shape), 0))
    over_rows = T, *[1] * (streams.dim() - 1 - len(shape)), *shape
    mean = torch.zeros(()) if rms else streams.mean(axes, keepdim=True)
    eps = (
        torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        if given["eps"] is None
        else given["eps"]
    )
    rstd = ((streams - mean).square().mean(axes, keepdim=True) + float(eps)).rsqrt()
    vectors = {name: v if index is None else v[index] for name, v in leaves.items() if name != "s"}
    gates = torch.sigmoid(vectors["weight"]) if given["gate"] == "sigmoid" else vectors["weight"]
    wanted = (streams - mean) * rstd * gates.view(over_rows)
    if "bias" in vectors:
        wanted = wanted + vectors["bias"].view(over_rows)
    stacked = restacked(wanted, stacking)
    if y.shape != stacked.shape or y.dtype != dtype:
        return f"y is {y.dtype} {tuple(y.shape)}, expected {dtype} {tuple(stacked.shape)}"
    if y.numel() == 0:
        return None
    with torch.no_grad():
        largest = streams.abs().amax(axes, keepdim=True)
        condition = (rstd * (mean.abs() + largest + 1) * gates.abs().nan_to_num(1).amax().clamp_min(1)).clamp_min(1)
        loose = ~(condition < (1e9 if dtype == torch.float64 else 1e4)) | ~(largest < LARGEST[dtype])
        of_y = wanted.detach()
        limit = restacked(_size(of_y, axes, 4) / 4 * condition.expand_as(wanted), stacking)
        ignored = restacked(loose.expand_as(wanted), stacking)
    if problem := _near("y", y.detach(), stacked.detach(), FORWARD[dtype], limit, ignored):
        return problem
    needed = [name for name in LEAVES if isinstance(given.get(name), Tensor) and given[name].requires_grad]
    if not needed:
        return None
    if passes is None:
        pairs = [
            (one, exact) for one, exact in ((y, stacked), (s, leaves["s"])) if one is not None and one.requires_grad
        ]
        of_outputs = [upstream(one, rng) for one, _ in pairs]
        found = torch.autograd.grad([one for one, _ in pairs], [given[name] for name in needed], of_outputs)
    else:
        pairs, of_outputs, found = [(y, stacked)], [passes[0]], passes[1]
    exact = torch.autograd.grad(
        [exact for _, exact in pairs], list(leaves.values()), [dy.double() for dy in of_outputs], allow_unused=True
    )
    gradients = dict(zip(leaves, exact, strict=True))
    terms = condition.nan_to_num(1, 1, 1).masked_fill(loose, 1).amax() * T * max(1.0, float(of_outputs[0].abs().max()))
    for name, gradient in zip(needed, found, strict=True):
        want = gradients[{"x": "s", "residual": "s"}.get(name, name)]
        if name in ("x", "residual"):
            got, want = (in_streams(tensor, count, place) for tensor in (gradient, want))
            limit = _size(want, axes, 1) * condition * T * streams[0, 0].numel() ** 0.5
            ignored = loose.expand_as(want)
        else:
            got, lost = gradient, loose.any().expand(T) if fan_out else loose.flatten(1).any(1)
            if index is not None:
                lost = torch.zeros(len(want)).index_add(0, index, lost.float()) > 0
            limit = _size(want, tuple(range(want.dim())), 1) * terms * (wanted.numel() / want.numel()) ** 0.5 * 4
            ignored = lost.view(len(want), *[1] * len(shape)).expand_as(want)
        if problem := _near(f"gradient of {name}", got, want, BACKWARD[dtype], limit, ignored):
            return problem
    return None


def _size(tensor: Tensor, axes: tuple[int, ...], least: float) -> Tensor:
    """The largest absolute value along some axes, at least so much."""
    return tensor.abs().nan_to_num(0, 0, 0).amax(axes, keepdim=True).clamp_min(least)


def _near(name: str, got: Tensor, want: Tensor, tolerance: Tolerance, size: Tensor, ignored: Tensor) -> str | None:
    bound = tolerance.absolute * size + tolerance.units * unit_in_last_place(want, got.dtype)
    return compare(name, got, want, bound, ignored)
