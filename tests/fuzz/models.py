"""Calls of what is built on the layers: late fan-out, conversion, folding, multi-task models, parameter groups."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import tsbn_kernels
from fuzz.calls import Call
from fuzz.definition import in_streams, restacked
from fuzz.tensors import HOSTILE_SCALARS, describe, hostile_tensors, normal
from tsbn_kernels import memory
from tsbn_kernels.definition.activations import TABLE
from tsbn_kernels.layers.late_fan_out import HOMOGENEOUS

TASKS: list[Any] = [0, 1, -1, 2, -3, 7, "a", "zz", None, 1.0, [0], True, 2**70, torch.tensor(0)]
MODULES: list[Callable[[], Any]] = [
    lambda: None, lambda: "model", nn.ReLU, lambda: nn.Linear(2, 2), lambda: nn.BatchNorm2d(3),
    lambda: nn.LSTM(3, 3), lambda: torch.ones(2), lambda: nn.Conv2d(3, 5, 1), lambda: nn.Conv2d(4, 6, 1, groups=2),
    nn.LazyBatchNorm2d, lambda: nn.InstanceNorm2d(3), nn.Sequential, lambda: nn.Conv2d, lambda: 3,
]  # fmt: skip


def _fill(module: nn.Module, rng: random.Random) -> Any:
    """Parameters and statistics as if trained, gates that survive clipping."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data.copy_(normal(rng, tuple(tensor.shape)))
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            if norm.running_var is not None:
                norm.running_var.uniform_(0.5, 2)
            if norm.weight is not None and norm.weight.dim() == 1:
                nn.init.uniform_(norm.weight, 0.1, 0.9)
    return module


def _differs(name: str, actual: Tensor, expected: Tensor, bound: float = 1e-3) -> str | None:
    if actual.shape != expected.shape:
        return f"{name} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = (actual.double() - expected.double()).abs().max().item() if actual.numel() else 0.0
    return None if error <= bound * (1 + float(expected.abs().max()) if actual.numel() else 1) else f"{name}: {error}"


def _spoil(rng: random.Random, arguments: dict[str, Any], kinds: dict[str, str], share: float = 0.4) -> bool:
    """Whether something hostile took the place of an argument."""
    if rng.random() > share:
        return False
    name = rng.choice(sorted(kinds))
    kind = kinds[name]
    pool = {"task": TASKS, **HOSTILE_SCALARS}
    arguments[name] = rng.choice(MODULES)() if kind == "module" else rng.choice(pool[kind])
    return True


def _text(function: str, arguments: dict[str, Any], x: Any = None) -> str:
    return f"{function}({', '.join(f'{k}={describe(v)}' for k, v in arguments.items())}); {describe(x)}"


def late_call(rng: random.Random) -> Call:
    """``LateFanOut`` against convolution, pooling and activation behind a layer that fans out."""
    T, N, C = rng.randint(1, 4), rng.randint(1, 3), rng.randint(1, 5)
    arguments: dict[str, Any] = {
        "num_tasks": T,
        "num_features": C,
        "activation": rng.choice(HOMOGENEOUS),
        "negative_slope": rng.choice([0.01, 0.3]),
        "stacking": rng.choice(["task_major", "sample_major"]),
        "pool": rng.choice([None, nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2)]),
        "conv": rng.choice([None, nn.Conv2d(C, 3, 3, padding=1), nn.Conv2d(C, 2, 1, bias=False)]),
        "momentum": rng.choice([0.1, None]),
        "eps": rng.choice([1e-5, 1e-2]),
        "track_running_stats": rng.random() < 0.8,
    }
    kinds = {
        "num_tasks": "int",
        "num_features": "int",
        "activation": "str",
        "stacking": "str",
        "pool": "module",
        "conv": "module",
        "eps": "float",
        "momentum": "float",
        "negative_slope": "float",
    }
    hostile = _spoil(rng, arguments, kinds)
    x: Any = normal(rng, (N, C, 6, 6)).float()
    if not hostile and rng.random() < 0.3:
        hostile, pool = True, hostile_tensors(x)
        try:
            x = pool[rng.choice(sorted(pool))]()
        except (RuntimeError, NotImplementedError, TypeError, AttributeError):
            hostile = False
    training = rng.random() < 0.6

    def run() -> str | None:
        late = _fill(tsbn_kernels.LateFanOut(**arguments), rng).train(training)
        late.norm.weight.fill_(1)
        norm = copy.deepcopy(late.norm).double()
        y = late(x)
        if y.device.type != "cpu":
            return None
        r = norm(x.double())
        r = r if late.pool is None else late.pool(r)
        r = r * torch.sigmoid(late.weight.double()).view(late.num_tasks, 1, -1, 1, 1)
        r = r if late.conv is None else torch.stack([copy.deepcopy(late.conv).double()(stream) for stream in r])
        return _differs("y", y, restacked(r, late.stacking))

    return Call(_text("LateFanOut", arguments, x), run, not hostile, [x])


def _network(rng: random.Random, conv: bool = True) -> nn.Module:
    act = rng.choice([*(row.module(0.2) for row in TABLE.values()), nn.Tanh(), nn.Identity()])
    layers: list[nn.Module] = [nn.Conv2d(3, 4, 3, padding=1, bias=rng.random() < 0.5)] if conv else []
    channels = 4 if conv else 3
    layers += [nn.BatchNorm2d(channels, affine=rng.random() < 0.9, momentum=rng.choice([0.1, None])), act]
    return nn.Sequential(*layers, nn.Conv2d(channels, 3, 1), nn.BatchNorm2d(3))


def convert_call(rng: random.Random) -> Call:
    """``convert_model``, ``revert_model`` and ``export_task`` of a small network."""
    plain = _fill(_network(rng), rng)
    plain.eval() if rng.random() < 0.6 else plain.train()
    T, N = rng.randint(1, 4), rng.randint(2, 3)
    arguments: dict[str, Any] = {
        "model": plain,
        "num_tasks": T,
        "variant": rng.choice(["ts_sigma_bn", "tsbn"]),
        "stacking": rng.choice(["task_major", "sample_major"]),
        "fuse_activation": rng.random() < 0.7,
        "exclude": rng.choice([(), "1", ["4"], ()]),
    }
    kinds = {"model": "module", "num_tasks": "int", "variant": "str", "stacking": "str", "exclude": "str"}
    hostile = _spoil(rng, arguments, kinds)
    after: dict[str, Any] = {"task": rng.randrange(T)}
    hostile |= _spoil(rng, after, {"task": "task"}, 0.3)
    what = rng.choice(["revert_model", "export_task"])
    x = normal(rng, (T * N, 3, 6, 6)).float()

    def run() -> str | None:
        converted = tsbn_kernels.convert_model(**arguments)
        if arguments["model"] is not plain:  # it took what was meant to be refused, or a layer
            return None if isinstance(arguments["model"], nn.Module) else "converted what is no module"
        one = getattr(tsbn_kernels, what)(converted, after["task"])
        tasks = int(arguments["num_tasks"])  # which may be another valid number
        if len(x) % tasks:
            return None
        twin = copy.deepcopy(plain).double()
        excluded = arguments["exclude"] not in ((), [])
        if plain.training and excluded:
            return None  # a plain layer sees all the streams at once
        streams = [twin(stream.double()) for stream in in_streams(x, tasks, arguments["stacking"])]
        if problem := _differs("converted", converted(x), restacked(torch.stack(streams), arguments["stacking"])):
            return problem
        if what == "revert_model" or not plain.training:
            one.train(plain.training)
            stream = in_streams(x, tasks, arguments["stacking"])[0]
            return _differs(what, one(stream), copy.deepcopy(plain).double()(stream.double()))
        return None

    return Call(_text("convert_model", arguments) + f" {what}{after}", run, not hostile, [x])


def fold_call(rng: random.Random) -> Call:
    """``fold_into_conv`` and ``task``."""
    T = rng.randint(1, 4)
    layer = _fill(tsbn_kernels.FusedTSigmaBN2d(T, 4, bias=rng.choice([True, False, "frozen"])), rng).eval()
    conv = _fill(rng.choice([nn.Conv2d(3, 4, 3, bias=False), nn.ConvTranspose2d(3, 4, 2)]), rng)
    arguments: dict[str, Any] = {"conv": conv, "layer": layer, "task": rng.randrange(T)}
    hostile = _spoil(rng, arguments, {"conv": "module", "layer": "module", "task": "task"})
    x = normal(rng, (2, 3, 5, 5)).float()

    def run() -> str | None:
        folded = tsbn_kernels.fold_into_conv(**arguments)
        index = int(arguments["task"])
        if arguments["conv"] is not conv:
            return None
        plain = layer.task(index).double()
        streams = copy.deepcopy(layer).double()(conv(x).double().repeat(T, 1, 1, 1))
        expected = in_streams(streams, T, "task_major")[index]
        if problem := _differs("task", plain(conv(x).double()), expected):
            return problem
        return _differs("folded", folded(x), expected)

    return Call(_text("fold_into_conv", arguments, x), run, not hostile, [x])


def groups_call(rng: random.Random) -> Call:
    """``parameter_groups``: every parameter once, the gates apart."""
    model = tsbn_kernels.convert_model(_network(rng), 2)
    arguments: dict[str, Any] = {
        "model": model,
        "lr": 0.1,
        "gate_lr_multiplier": 10.0,
        "layer_norm_lr_multiplier": 3.0,
        "weight_decay": 0.1,
    }
    kinds = dict.fromkeys(("lr", "gate_lr_multiplier", "layer_norm_lr_multiplier", "weight_decay"), "float")
    hostile = _spoil(rng, arguments, {"model": "module", **kinds})

    def run() -> str | None:
        groups = tsbn_kernels.parameter_groups(**arguments)
        given = [id(parameter) for group in groups for parameter in group["params"]]
        if sorted(given) != sorted(map(id, arguments["model"].parameters())):
            return "not every parameter once"
        if arguments["model"] is model and not hostile:
            rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
            return None if rates == {"base": (0.1, 0.1), "gates": (1.0, 0.0)} else f"{rates}"
        if groups:
            torch.optim.SGD(groups)
        return None

    return Call(_text("parameter_groups", arguments), run, not hostile)


def multitask_call(rng: random.Random) -> Call:
    """``MultiTaskModel`` with an input for all or for each, of some tasks."""
    names = ["a", "b", "c"][: rng.randint(1, 3)]
    plain = _fill(_network(rng), rng).eval()
    backbone = tsbn_kernels.convert_model(plain, len(names))
    arguments: dict[str, Any] = {"backbone": backbone, "heads": {name: nn.Flatten() for name in names}}
    hostile = False
    if rng.random() < 0.2:
        hostile = True
        arguments[rng.choice(["backbone", "heads"])] = rng.choice([*(make() for make in MODULES), {}, {"a": 3}, ["a"]])
    x: Any = normal(rng, (2, 3, 6, 6)).float()
    chosen = rng.sample(names, rng.randint(1, len(names)))
    call: dict[str, Any] = {
        "inputs": x if rng.random() < 0.5 else dict.fromkeys(chosen, x),
        "tasks": rng.choice([None, chosen, tuple(chosen)]),
    }
    if rng.random() < 0.3:
        hostile = True
        call[rng.choice(["inputs", "tasks"])] = rng.choice(
            [
                None,
                {},
                [],
                "a",
                ["zz"],
                ["a", "a"],
                3,
                {"a": None},
                {"zz": x},
                [x],
                torch.ones(2),
                {"a": 3},
                [None],
                x[:0],
            ]
        )

    def run() -> str | None:
        model = tsbn_kernels.MultiTaskModel(**arguments).eval()
        outputs = model(**call)
        expected = plain.double()(x.double()).flatten(1)
        if not hostile and list(outputs) != list(call["tasks"] or (names if call["inputs"] is x else chosen)):
            return f"outputs of {list(outputs)}"
        for name, y in outputs.items():
            if y.numel() and (problem := _differs(name, y, expected)):
                return problem
        return None

    return Call(_text("MultiTaskModel", arguments) + f" called with {describe(call)}", run, not hostile, [x])


def small_call(rng: random.Random) -> Call:
    """The pool's limit, and the choice of a backend."""
    value = rng.choice([*HOSTILE_SCALARS["int"], *HOSTILE_SCALARS["str"], "reference", "cpu", 1 << 24])
    if rng.random() < 0.5:

        def run() -> str | None:
            before = memory.cache_limit()
            try:
                memory.set_cache_limit(value)
                return None if 0 <= memory.cache_limit() <= max(0, int(value)) else "the limit is above what was set"
            finally:
                memory.set_cache_limit(before)

        return Call(f"memory.set_cache_limit({value!r})", run, False)

    def choose() -> str | None:
        with tsbn_kernels.use_backend(value):
            return None if value in ("reference", "cpu") else "an unknown backend was taken"

    return Call(f"use_backend({value!r})", choose, value in ("reference", "cpu"))


def _quietly(make: Callable[[random.Random], Call]) -> Callable[[random.Random], Call]:
    def call(rng: random.Random) -> Call:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(rng)

    return call


MODEL_CALLS = [_quietly(make) for make in (late_call, convert_call, fold_call, groups_call, multitask_call, small_call)]
