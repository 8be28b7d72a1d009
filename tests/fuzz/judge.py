"""What is wrong with the result of a call of the functional form: y, gradients, statistics, a second derivative."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fuzz import definition
from fuzz.tensors import normal
from fuzz.ways import differentiate, second_derivatives

TENSORS = ("x", "weight", "bias", "running_mean", "running_var", "residual")
LEAVES = ("x", "weight", "bias", "residual")
DEFAULTS: dict[str, Any] = {
    "training": True,
    "momentum": 0.1,
    "eps": 1e-5,
    "gate": "sigmoid",
    "stacking": "task_major",
    "activation": None,
    "negative_slope": 0.01,
    "fan_out": False,
    "recover_input": False,
    "task_of_sample": None,
    "evaluate_single": False,
}
OPTIONS = ("num_tasks", "training", "eps", "gate", "stacking", "activation", "negative_slope", "fan_out")


def check(
    arguments: dict[str, Any],
    function: Callable[..., Tensor],
    before: dict[str, Tensor],
    rng: random.Random,
    way: str = "backward",
) -> str | None:
    """What is wrong with the result of a call of the functional form, its gradients and its statistics."""
    leaves = {name: v for name in LEAVES if isinstance(v := arguments.get(name), Tensor) and v.requires_grad}
    dy, found = None, []

    def called(*tensors: Tensor) -> Tensor:
        return function(**dict(zip(leaves, tensors, strict=True)))

    if leaves and isinstance(x := arguments["x"], Tensor) and x.device.type == "cpu":
        y, dy, found = differentiate(way, called, list(leaves.values()), rng)
    else:
        y = function()
    given = {**dict.fromkeys(TENSORS), **DEFAULTS, **arguments}
    x = given["x"]
    if y.device.type != "cpu":
        return None if y.device == x.device else f"y is on {y.device}, x on {x.device}"
    if y.dtype != x.dtype:
        return f"y is {y.dtype}, x is {x.dtype}"
    if y.requires_grad and not leaves:
        return "y has a graph, and nothing requires a gradient"
    for name in ("num_tasks", "eps", "negative_slope"):
        given[name] = given[name].item() if isinstance(given[name], Tensor) else given[name]
    given |= {"num_tasks": int(given["num_tasks"]), "training": bool(given["training"])}
    gradients = dict(zip(leaves, found, strict=True))
    if given["task_of_sample"] is not None:
        return compare_mixed(given, y, dy, gradients, before)
    if problem := compare_call(given, y, dy, gradients, before):
        return problem
    if dy is not None and {v.dtype for v in (x, *leaves.values())} == {torch.float64} and not given["recover_input"]:
        return compare_second(given, called, leaves, dy, rng)
    return None


def compare_call(
    given: dict[str, Any], y: Tensor, dy: Tensor | None, gradients: dict[str, Tensor], before: dict[str, Tensor]
) -> str | None:
    """What is wrong with y, the gradients of some leaves and what running statistics are now."""
    wanted = definition.define(
        *(before.get(name, given[name]) for name in TENSORS), dy, **{name: given[name] for name in OPTIONS}
    )
    T, stacking, dtype = given["num_tasks"], given["stacking"], given["x"].dtype
    if problem := definition.compare_output("y", y, wanted, T, stacking):
        return problem
    slack = 1.0
    if given["recover_input"]:  # xhat comes from the rounded y
        slack = 40 * torch.finfo(dtype).eps / definition.BACKWARD[dtype].absolute
    for name, gradient in gradients.items():
        shared = bool(given["fan_out"])
        problem = definition.compare_gradient(name, gradient, wanted, T, stacking, dtype, slack=slack, shared=shared)
        if problem:
            return problem
    for name, old in before.items():
        problem = definition.compare_statistics(name, given[name], old, given["momentum"], wanted, dtype)
        if problem:
            return problem
    return None


def compare_second(
    given: dict[str, Any],
    function: Callable[..., Tensor],
    leaves: dict[str, Tensor],
    dy: Tensor,
    rng: random.Random,
) -> str | None:
    """What is wrong with the second derivative, where float64 has digits left for it."""
    options = {name: given[name] for name in OPTIONS}
    wanted = definition.define(*(given[name] for name in TENSORS), None, **options)
    condition = float(wanted.condition.max()) if wanted.condition.numel() else torch.inf
    sizes = [float(tensor.detach().abs().max()) for tensor in (dy, *leaves.values()) if tensor.numel()]
    if not condition < 100 or not max(sizes) < 100 or wanted.kinked.any() or wanted.loose.any() or not dy.numel():
        return None
    directions = [normal(rng, tuple(leaf.shape)) for leaf in leaves.values()]

    def plain(*tensors: Tensor) -> Tensor:
        all_of_them = {**fixed, **dict(zip(leaves, tensors, strict=True))}
        return definition.plain(all_of_them, given["running_mean"], given["running_var"], **options).y

    fixed = definition.in_double({name: given[name] for name in LEAVES})
    exact = second_derivatives(plain, [fixed[name] for name in leaves], dy, directions)
    found = second_derivatives(function, list(leaves.values()), dy, directions)
    for name, got, want in zip([*leaves, "dy"], found, exact, strict=True):
        error = float((got - want).abs().max()) if got.numel() else 0.0
        if not error <= 1e-13 * condition**4 * wanted.count * max(1.0, float(want.abs().max())):
            return f"second derivative of {name} is off by {error}, of values up to {float(want.abs().max())}"
    return None


def compare_mixed(
    given: dict[str, Any], y: Tensor, dy: Tensor | None, gradients: dict[str, Tensor], before: dict[str, Tensor]
) -> str | None:
    """What is wrong with the samples of one task after the other."""
    index, x = given["task_of_sample"], given["x"]
    if y.shape != x.shape:
        return f"y has shape {tuple(y.shape)}, expected {tuple(x.shape)}"
    for task in range(given["num_tasks"]):
        mine, row = (index == task).nonzero().flatten(), slice(task, task + 1)

        def own(name: str, tensor: Any, mine: Tensor = mine, row: slice = row) -> Any:
            if not isinstance(tensor, Tensor) or (name == "momentum" and tensor.dim() < 2):
                return tensor
            return tensor.detach()[mine if name in ("x", "residual") else row]

        vectors = {name: own(name, gradient) for name, gradient in gradients.items()}
        olds = {name: own(name, tensor) for name, tensor in before.items()}
        if not len(mine):
            touched = [name for name, gradient in vectors.items() if gradient.any()]
            touched += [name for name, old in olds.items() if not same(own(name, given[name]), old)]
            if touched:
                return f"of task {task}, which has no sample: {touched}"
            continue
        rows = {name: own(name, value) for name, value in given.items()} | {"num_tasks": 1}
        if given["training"] and rows["x"].numel() == rows["x"].shape[1]:  # one value: it is evaluated
            if any(not same(rows[name], old) for name, old in olds.items()):
                return f"statistics of task {task}, which is evaluated, have changed"
            rows, olds = {**rows, "training": False}, {}
        problem = compare_call(rows, y[mine], None if dy is None else dy[mine], vectors, olds)
        if problem:
            return f"task {task}: {problem}"
    return None


def same(one: Tensor, other: Tensor) -> bool:
    """Where both are NaN too."""
    return torch.equal(one.nan_to_num(7), other.nan_to_num(7))
