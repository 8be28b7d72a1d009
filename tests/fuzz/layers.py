"""Calls of the functional form and of the layers."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from torch import Tensor

import tsbn_kernels
from fuzz import definition
from fuzz.calls import Call
from fuzz.judge import LEAVES, OPTIONS, TENSORS, check, same
from fuzz.tensors import CONTENTS, DTYPES, HOSTILE_SCALARS, LAYOUTS, describe, hostile_tensors, laid_out, normal
from fuzz.ways import TRANSFORMS, WAYS
from tsbn_kernels.definition.activations import TABLE
from tsbn_kernels.functional import task_batch_norm, task_streams

SIZES = (1, 2, 3, 4, 5, 8, 16, 17, 33)
ACTIVATIONS = (None, None, *TABLE)
INVERTIBLE = (None, *(name for name, row in TABLE.items() if row.invertible))
KINDS = {
    "num_tasks": "int",
    "training": "bool",
    "momentum": "float",
    "eps": "float",
    "gate": "str",
    "stacking": "str",
    "activation": "str",
    "negative_slope": "float",
    "fan_out": "bool",
    "recover_input": "bool",
    "num_features": "int",
    "bias": "bool",
    "evaluate_single": "bool",
    "track_running_stats": "bool",
}


def draw_shape(rng: random.Random, spatial_dims: int | None = None) -> tuple[int, int, int, list[int]]:
    """T, N, C and the spatial sizes, small, and more than one value a channel."""
    while True:
        T, N, C = rng.randint(1, 4), rng.randint(1, 4), rng.choice(SIZES)
        spatial = [rng.choice(SIZES) for _ in range(rng.randint(0, 3) if spatial_dims is None else spatial_dims)]
        values = N * torch.Size(spatial).numel()
        if rng.random() < 0.03:
            return T, 0, C, spatial
        if 1 < values <= 300 and T * values * C <= 6000:
            return T, N, C, spatial


def draw_tensor(rng: random.Random, values: Tensor, dtype: torch.dtype) -> Tensor:
    """In a random layout."""
    tensor = laid_out(rng, values.to(dtype), rng.choice(LAYOUTS))
    return torch.nn.Parameter(tensor) if rng.random() < 0.1 else tensor


def draw_stack(
    rng: random.Random, T: int, N: int, C: int, spatial: list[int], stacking: str, dtype: torch.dtype
) -> Tensor:
    streams = normal(rng, (T, N, C, *spatial), rng.choice(CONTENTS))
    return draw_tensor(rng, definition.restacked(streams, stacking), dtype)


def draw_way(rng: random.Random, x: Tensor, transforms: bool) -> str:
    """How a call is differentiated."""
    transforms = transforms and x.dtype in (torch.float32, torch.float64) and x.numel() > 0
    return rng.choice(WAYS + (TRANSFORMS if transforms else ()))


def vector(rng: random.Random, T: int, C: int, dtype: torch.dtype, content: str = "normal") -> Tensor:
    return draw_tensor(rng, normal(rng, (T, C), content), dtype)


def functional_arguments(rng: random.Random) -> dict[str, Any]:
    """Of a valid call of the functional form."""
    T, N, C, spatial = draw_shape(rng)
    dtype, parameter_dtype = rng.choice(DTYPES), rng.choice(DTYPES)
    stacking = rng.choice(["task_major", "sample_major", "task_axis"])
    fan_out = rng.random() < 0.25
    training = rng.random() < 0.7
    activation = rng.choice(ACTIVATIONS)
    invertible = activation in INVERTIBLE and not fan_out
    arguments: dict[str, Any] = {
        "x": draw_stack(rng, 1, N, C, spatial, "task_major", dtype)
        if fan_out
        else draw_stack(rng, T, N, C, spatial, stacking, dtype),
        "weight": vector(rng, T, C, parameter_dtype, rng.choice(["normal", "normal", "shifted", "nan"])),
        "bias": vector(rng, T, C, parameter_dtype) if rng.random() < 0.5 else None,
        "num_tasks": T,
        "training": training,
        "eps": rng.choice([1e-5, 1e-3, 1.0]),
        "gate": rng.choice(["sigmoid", "identity"]),
        "stacking": stacking,
        "activation": activation,
        "negative_slope": rng.choice([0.01, 0.3, 1.0]),
        "fan_out": fan_out,
    }
    if not training or rng.random() < 0.5:
        # In training they are written: each value has its own place.
        arguments["running_mean"] = normal(rng, (T, C)).to(parameter_dtype)
        arguments["running_var"] = (normal(rng, (T, C)).abs() + 0.1).to(parameter_dtype)
        arguments["momentum"] = rng.choice([0.1, 0.0, 1.0, torch.rand(T, 1), torch.tensor(0.3)])
    if rng.random() < 0.3:
        arguments["residual"] = draw_stack(rng, T, N, C, spatial, stacking, dtype)
    elif invertible and rng.random() < 0.2:
        arguments["recover_input"] = True
    return arguments


def spoil(rng: random.Random, arguments: dict[str, Any], notes: list[str], name: str | None = None) -> None:
    """Puts something hostile in the place of one argument; where there is no such thing, of none."""
    name = rng.choice(sorted(arguments)) if name is None else name
    current = arguments.get(name)
    if name in (*TENSORS, "input", "task_of_sample") and (name != "bias" or isinstance(current, Tensor)):
        tensors = hostile_tensors(current)
        what = rng.choice(sorted(tensors))
        try:
            arguments[name] = tensors[what]()
        except (RuntimeError, NotImplementedError, TypeError, AttributeError):
            return
        notes.append(f"{name}={what}")
    else:
        arguments[name] = rng.choice(HOSTILE_SCALARS[KINDS[name]])
        notes.append(f"{name}={arguments[name]!r}")


def call_text(function: str, arguments: dict[str, Any]) -> str:
    return f"{function}({', '.join(f'{name}={describe(value)}' for name, value in arguments.items())})"


def functional_call(rng: random.Random) -> Call:
    """``task_batch_norm`` or ``task_streams``, of a mixed batch too, forward and backward."""
    mixed = rng.random() < 0.2
    arguments = mixed_arguments(rng) if mixed else functional_arguments(rng)
    streams = rng.random() < 0.2 and not arguments.get("recover_input") and not mixed
    notes = ["a task with one value"] if mixed and lonely(arguments) else []
    if rng.random() < 0.55:
        for _ in range(rng.choice([1, 1, 2])):
            spoil(rng, arguments, notes)
    backward = rng.random() < 0.7
    needs = {name for name in LEAVES if rng.random() < 0.8}
    seed = rng.getrandbits(32)
    for name in needs if backward else ():
        tensor = arguments.get(name)
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.is_inference() and tensor.is_leaf:
            tensor.requires_grad_()
    written = ("running_mean", "running_var") if arguments["training"] else ()
    inputs = [value for name, value in arguments.items() if isinstance(value, Tensor) and name not in written]
    # Transforms do not let a function update what it did not make, and know neither streams nor recovery.
    plain = streams or arguments.get("recover_input") or any(arguments.get(name) is not None for name in written)
    way = "backward" if notes else draw_way(rng, arguments["x"], not plain)
    function = task_streams if streams else task_batch_norm

    def run() -> str | None:
        before = {name: arguments[name].detach().clone() for name in written if isinstance(arguments.get(name), Tensor)}

        def called(**leaves: Tensor) -> Tensor:
            given = {**arguments, **leaves}
            y = function(**given)
            with torch.autocast("cpu", enabled=False):  # which knows no stack of float64
                return definition.restacked(torch.stack(y), given["stacking"]) if isinstance(y, tuple) else y

        return check(arguments, called, before, random.Random(seed), way)

    return Call(call_text(function.__name__, arguments) + f", {way}", run, not notes, inputs)


# ---- mixed batches -----------------------------------------------------------------------------------------------


def mixed_arguments(rng: random.Random) -> dict[str, Any]:
    """Of a call with a task for each sample; some tasks may have no sample."""
    arguments = functional_arguments(rng)
    T, N, C, spatial = draw_shape(rng)
    index = draw_index(rng, T, N * T)
    dtype, of_vectors = arguments["x"].dtype, arguments["weight"].dtype

    def stack() -> Tensor:
        return draw_stack(rng, 1, len(index), C, spatial, "task_major", dtype)

    arguments |= {"x": stack(), "num_tasks": T, "stacking": "task_major", "fan_out": False, "task_of_sample": index}
    arguments |= {
        "weight": vector(rng, T, C, of_vectors),
        "evaluate_single": "running_mean" in arguments and rng.random() < 0.3,
    }
    arguments.pop("recover_input", None)
    if arguments["bias"] is not None:
        arguments["bias"] = vector(rng, T, C, of_vectors)
    if "residual" in arguments:
        arguments["residual"] = stack()
    if "running_mean" in arguments:
        arguments["running_mean"] = normal(rng, (T, C)).to(of_vectors)
        arguments["running_var"] = (normal(rng, (T, C)).abs() + 0.1).to(of_vectors)
        arguments["momentum"] = rng.choice([0.1, 0.0, 1.0, torch.rand(T, 1), torch.tensor(0.3)])
    return arguments


def draw_index(rng: random.Random, T: int, N: int) -> Tensor:
    """The task of each of N samples: of all alike, or most of them of one."""
    usual = rng.randrange(T)
    tasks = range(T) if rng.random() < 0.5 else [usual] * 5 + [rng.randrange(T)]
    return torch.tensor([rng.choice(tasks) for _ in range(N)], dtype=torch.int64)


def lonely(arguments: dict[str, Any]) -> bool:
    """Whether training refuses a task for its one value of a channel."""
    x, index = arguments["x"], arguments["task_of_sample"]
    evaluates = arguments["evaluate_single"] and "running_mean" in arguments
    one = bool((torch.bincount(index) == 1).any()) and x[0, 0].numel() == 1
    return bool(arguments["training"]) and one and not evaluates


# ---- layers ------------------------------------------------------------------------------------------------------

LAYERS = {"FusedTSigmaBN1d": (0, 1), "FusedTSigmaBN2d": (2,), "FusedTSigmaBN3d": (3,), "FusedTSigmaBN": (0, 1, 2, 3)}


def layer_call(rng: random.Random) -> Call:
    """A layer is built, and called once or twice."""
    name = rng.choice(sorted(LAYERS))
    T, N, C, spatial = draw_shape(rng, rng.choice(LAYERS[name]))
    dtype = rng.choice(DTYPES)
    activation = rng.choice(ACTIVATIONS)
    fan_out = rng.random() < 0.2
    options: dict[str, Any] = {
        "num_tasks": T,
        "num_features": C,
        "eps": rng.choice([1e-5, 1e-2]),
        "momentum": rng.choice([0.1, None, 0.5]),
        "gate": rng.choice(["sigmoid", "identity"]),
        "bias": rng.choice([True, False, "frozen"]),
        "stacking": rng.choice(["task_major", "sample_major"]),
        "track_running_stats": rng.random() < 0.8,
        "activation": activation,
        "negative_slope": rng.choice([0.01, 0.3]),
        "fan_out": fan_out,
        "recover_input": activation in INVERTIBLE and not fan_out and rng.random() < 0.2,
    }
    notes: list[str] = []
    if rng.random() < 0.3:
        spoil(rng, options, notes)
    seed = rng.getrandbits(32)
    text = call_text(f"tsbn_kernels.{name}", options) + f" then calls of seed {seed}"
    calls = random.Random(seed)
    hostile = calls.random() < 0.4
    inputs: list[Any] = []
    steps = [
        step_arguments(calls, options, T, N, C, spatial, dtype, hostile, inputs) for _ in range(calls.choice([1, 2]))
    ]
    text += "".join(f"; ({', '.join(f'{k}={describe(v)}' for k, v in step.items())})" for step, _ in steps)

    def run() -> str | None:
        layer = getattr(tsbn_kernels, name)(**options)
        with torch.no_grad():
            layer.weight.copy_(normal(random.Random(seed), tuple(layer.weight.shape)))
        for step, training in steps:
            if problem := run_step(layer.train(training), step, seed):
                return problem
        return None

    return Call(text, run, not notes and not hostile, inputs)


def step_arguments(
    rng: random.Random,
    options: dict[str, Any],
    T: int,
    N: int,
    C: int,
    spatial: list[int],
    dtype: torch.dtype,
    hostile: bool,
    inputs: list[Any],
) -> tuple[dict[str, Any], bool]:
    """Arguments of one ``forward``, and whether the layer is in training mode."""
    shared = options["fan_out"] is True
    arguments: dict[str, Any] = {}
    if rng.random() < 0.15 and not options["recover_input"]:
        shared = not shared
        arguments["fan_out"] = shared
    count = T
    if rng.random() < 0.25:
        tasks = rng.sample(range(T), rng.randint(1, T))
        count = len(tasks)
        arguments["tasks"] = torch.tensor(tasks) if rng.random() < 0.5 else tasks
    stacking = options["stacking"] if options["stacking"] in ("task_major", "sample_major") else "task_major"
    x = draw_stack(rng, 1 if shared else count, N, C, spatial, "task_major" if shared else stacking, dtype)
    arguments = {"input": x, **arguments}
    if rng.random() < 0.2 and not options["recover_input"]:
        arguments["residual"] = draw_stack(rng, count, N, C, spatial, stacking, dtype)
    if hostile:
        name = rng.choice(["input", "residual", "tasks", "tasks", "fan_out"])
        if name == "tasks":
            arguments[name] = rng.choice([
                [], [0, 0], [T], [-1], "0", "ab", 0, [0.0], [None], torch.tensor([0.5]), torch.tensor([[0]]),
                torch.tensor([T]), torch.tensor([-1]), torch.tensor([], dtype=torch.int64), torch.tensor([0, 0]),
                torch.tensor(0), torch.tensor([True] * T), {0}, range(T), (t for t in range(T)), [True], [2**70],
            ])  # fmt: skip
        else:
            spoil(rng, arguments, [], name)
    inputs += [value for value in arguments.values() if isinstance(value, Tensor)]
    return arguments, rng.random() < 0.7


def run_step(layer: Any, step: dict[str, Any], seed: int) -> str | None:
    """One forward and backward pass of a layer against the definition."""
    old = copy.deepcopy(layer.state_dict())
    y = layer(**step)
    if not isinstance(step["input"], Tensor) or y.device.type != "cpu":
        return None
    x, tasks = step["input"], step.get("tasks")
    indices = list(range(layer.num_tasks)) if tasks is None else [int(task) for task in tasks]
    fan_out = layer.fan_out if step.get("fan_out") is None else bool(step["fan_out"])
    dims = {"FusedTSigmaBN1d": 4, "FusedTSigmaBN2d": 5, "FusedTSigmaBN3d": 6}.get(type(layer).__name__)
    stacking = "task_axis" if x.dim() == dims and not fan_out else layer.stacking
    bias = old.get("bias")
    tracked = layer.running_mean is not None
    batch = layer.training or not tracked
    rows: dict[str, Any] = {name: old[name][indices] for name in old}
    momentum: Any = layer.momentum
    if momentum is None and tracked:
        momentum = 1 / (rows["num_batches_tracked"].double() + 1)[:, None]
    arguments = {
        "x": x,
        "weight": rows["weight"],
        "bias": None if bias is None else rows["bias"],
        "running_mean": rows.get("running_mean"),
        "running_var": rows.get("running_var"),
        "residual": step.get("residual"),
        "num_tasks": len(indices),
        "training": batch,
        "momentum": momentum,
        "eps": layer.eps,
        "gate": layer.gate,
        "stacking": stacking,
        "activation": layer.activation,
        "negative_slope": layer.negative_slope,
        "fan_out": fan_out,
    }
    arguments = {name: v.detach() if isinstance(v, Tensor) else v for name, v in arguments.items()}
    problem = check(arguments, y.detach, {}, random.Random(seed))
    if problem or not tracked:
        return problem
    wanted = definition.define(
        *(arguments[name] for name in TENSORS), None, **{name: arguments[name] for name in OPTIONS}
    )
    writes = layer.training and layer.track_running_stats
    others = [task for task in range(layer.num_tasks) if task not in indices]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        now = layer.state_dict()[name]
        if not same(now[others], old[name][others]):
            return f"{name} of other tasks has changed"
        if not writes and not same(now, old[name]):
            return f"{name} has changed"
        if writes and name == "num_batches_tracked" and not torch.equal(now[indices], old[name][indices] + 1):
            return f"{name} is {now}"
        if writes and name != "num_batches_tracked":
            problem = definition.compare_statistics(name, now[indices], old[name][indices], momentum, wanted, x.dtype)
            if problem:
                return problem
    return None
