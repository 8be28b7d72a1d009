"""Random programs that drive a ``MultiTaskModel``, against a loop over one plain network for each task in float64.

A program makes a network, places of checkpointing, hooks, heads of which some write in place, and steps: calls with
some of the tasks, of one input or batches of their own, whose backward passes come at once or after each other. It runs
in one thread or in several, which share the model: then outputs and the gradients of inputs are compared, for what all
threads add up is nobody's.
"""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fuzz.calls import Call
from tsbn_kernels import MultiTaskModel, convert_model, revert_model
from tsbn_kernels.layers.task_specific import TaskSpecific

NAMES = "abcd"
PLACES = (None, None, "block", "layer", "backbone", "model", "nested")
TOLERANCE = 1e-8


class Features(NamedTuple):
    """What some of the backbones return."""

    deep: Tensor
    scale: Tensor
    early: Tensor | None


@dataclass(frozen=True)
class Again:
    """Where activation checkpointing runs something again, and by which form."""

    place: str | None
    reentrant: bool

    def __call__(self, place: str, function: Callable[..., Any], *inputs: Any) -> Any:
        """``function(*inputs)``, as a checkpoint where the place is this one."""
        here = place == self.place or (self.place == "nested" and place in ("block", "backbone"))
        return checkpoint(function, *inputs, use_reentrant=self.reentrant) if here else function(*inputs)


class Block(nn.Module):
    """Convolution, normalisation, activation; tokens are normalised folded into the batch, rows each by itself."""

    def __init__(self, inputs: int, outputs: int, kind: str, act: nn.Module, again: Again) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=kind != "tokens")
        self.norm = {"tokens": nn.BatchNorm1d, "rows": nn.LayerNorm}.get(kind, nn.BatchNorm2d)(outputs)
        self.act, self.kind, self.again = act, kind, again
        self.keep = inputs == outputs and kind == "residual"

    def normalized(self, x: Tensor) -> Tensor:
        """The normalisation, of samples or of their tokens."""
        if self.kind not in ("tokens", "rows"):
            return self.norm(x)  # type: ignore[no-any-return]
        tokens = x.flatten(2).transpose(1, 2)
        y: Tensor = self.norm(tokens if self.kind == "rows" else tokens.flatten(0, 1))
        return y.view(tokens.shape).transpose(1, 2).reshape(x.shape)

    def forward(self, x: Tensor) -> Tensor:
        y = self.again("layer", self.normalized, self.conv(x))
        return self.act(y + x if self.keep else y)  # type: ignore[no-any-return]


class Network(nn.Module):
    """Blocks, and what is made of the last one's output."""

    def __init__(self, rng: random.Random, again: Again, output: str, kinds: Sequence[str]) -> None:
        super().__init__()
        channels = [3, *(rng.choice([3, 4]) for _ in range(rng.randint(1, 3)))]
        acts = [rng.choice([nn.Tanh, nn.SiLU, nn.Softplus])() for _ in channels[1:]]
        chosen = [rng.choice(kinds) if i else "plain" for i in range(len(acts))]
        self.blocks = nn.ModuleList(
            Block(before, after, kind, act, again)
            for before, after, kind, act in zip(channels, channels[1:], chosen, acts, strict=False)
        )
        self.scale = nn.Parameter(torch.rand(len(NAMES)))
        self.again, self.output, self.width = again, output, channels[-1]

    def run(self, x: Tensor) -> Tensor:
        """All blocks."""
        for block in self.blocks:
            x = self.again("block", block, x)
        return x

    def forward(self, x: Tensor) -> Any:
        y = self.again("backbone", self.run, x)
        if self.output == "pooled":
            return y.mean((2, 3))
        if self.output == "named":
            return Features(y * 1, self.scale, None)
        return {"map": y * 1, "more": [y.mean((2, 3))]} if self.output == "dict" else y * 1


class Head(nn.Module):
    """Reads any features; some begin with an operator in place."""

    def __init__(self, width: int, write: str) -> None:
        super().__init__()
        self.linear, self.write = nn.Linear(width, 2), write

    def forward(self, features: Any) -> Tensor:
        extra: Any = 0.0
        if isinstance(features, Features):
            features, extra = features.deep, features.scale.sum()
        elif isinstance(features, dict):
            extra, features = features["more"][0].sum(), features["map"]
        if self.write == "relu":
            features = nn.functional.softplus(features.relu_())
        elif self.write == "twice":
            features = features.mul_(1.5)
            features[:, :1].sigmoid_()
        if features.dim() == 4:
            features = features.mean((2, 3))
        return self.linear(features) + extra  # type: ignore[no-any-return]


class Step(NamedTuple):
    """A call of the model, and what its outputs' gradients are."""

    tasks: list[str]
    inputs: dict[str, Tensor] | Tensor
    upstream: dict[str, Tensor]
    by_name: bool


class Program:
    """Everything that is drawn; :meth:`run` says what is wrong with what the model makes of it."""

    def __init__(self, rng: random.Random, compiled: bool = False) -> None:
        self.rng, self.seed = rng, rng.getrandbits(30)
        torch.manual_seed(self.seed)
        self.names = NAMES[: rng.randint(1, 4)]
        self.compiled = rng.choice(["model", "backbone", "block"]) if compiled else None
        self.place = None if compiled else rng.choice(PLACES)
        self.reentrant = rng.random() < 0.5
        self.recompute = not compiled and rng.random() < 0.25
        self.training = rng.random() < 0.8
        self.threads = 1 if compiled else rng.choice([1, 1, 1, 2, 3])
        self.backward = rng.choice(["at once", "in order", "reversed", "at once" if compiled else "by output"])
        self.hooks = not compiled and rng.random() < 0.3
        self.output = rng.choice(["pooled", "map", "named", "dict"])
        # Of flattened tokens PyTorch traces graphs whose backward pass cannot make a view that it wants.
        kinds = ["plain", "plain", "residual", "rows", *["tokens"] * (not compiled)]
        self.plain = Network(rng, Again(None, False), self.output, kinds).double()
        backbone = convert_model(self.plain, len(self.names), pretrained=False, fuse_activation=rng.random() < 0.5)
        for layer in backbone.modules():
            if isinstance(layer, TaskSpecific):
                nn.init.normal_(layer.weight)
        heads = {name: Head(self.plain.width, rng.choice(["none", "relu", "twice"])) for name in self.names}
        self.model = MultiTaskModel(backbone, heads, recompute=self.recompute).double().train(self.training)
        self.again = Again(self.place, self.reentrant)
        for module in backbone.modules():
            if hasattr(module, "again"):
                module.again = self.again
        self.steps = [[self._step() for _ in range(rng.randint(1, 3))] for _ in range(self.threads)]

    def _step(self) -> Step:
        rng, own = self.rng, self.rng.random() < 0.5
        tasks = rng.sample(self.names, rng.randint(1, len(self.names)))
        sizes = {name: rng.randint(2, 4) for name in tasks} if own else dict.fromkeys(tasks, rng.randint(2, 4))

        def image(n: int) -> Tensor:
            return torch.randn(n, 3, 4, 4, dtype=torch.float64).requires_grad_(self.reentrant or rng.random() < 0.7)

        inputs = {name: image(sizes[name]) for name in tasks} if own else image(sizes[tasks[0]])
        upstream = {name: torch.randn(sizes[name], 2, dtype=torch.float64) for name in tasks}
        return Step(tasks, inputs, upstream, rng.random() < 0.5 or not own)

    def __str__(self) -> str:
        steps = [
            [
                f"{''.join(step.tasks)} of "
                + ("one" if isinstance(step.inputs, Tensor) else str([len(x) for x in step.inputs.values()]))
                for step in steps
            ]
            for steps in self.steps
        ]
        return (
            f"{len(self.names)} tasks, blocks {[block.kind for block in self.plain.blocks]}, {self.output}, heads "
            f"{[head.write for head in self.model.heads.values()]}, checkpoint {self.place}, reentrant="
            f"{self.reentrant}, recompute={self.recompute}, training={self.training}, compiled={self.compiled}, "
            f"hooks={self.hooks}, backward {self.backward}, steps {steps}"
        )

    def run(self) -> str | None:
        """What is wrong, or None."""
        model = self.model
        wanted = [self._wanted(copy.deepcopy(model), steps) for steps in self.steps]
        if self.compiled:
            self._compile(model)
        found: list[Any] = [None] * self.threads

        def work(thread: int) -> None:
            try:
                found[thread] = self._found(model, self.steps[thread])
            except Exception as error:  # it is raised in the thread that asked
                found[thread] = error

        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(1, self.threads)]
        for thread in threads:
            thread.start()
        work(0)
        for thread in threads:
            thread.join()
        for thread in range(self.threads):
            if isinstance(found[thread], Exception):
                raise found[thread]
            if problem := _differences(found[thread], wanted[thread]):
                return f"thread {thread}: {problem}"
        return None

    def _compile(self, model: MultiTaskModel) -> None:
        torch._dynamo.reset()
        what: Any = {"model": model, "backbone": model.backbone, "block": model.backbone.blocks[0]}[self.compiled or ""]
        what.compile(backend="aot_eager", fullgraph=True)

    def _called(self, model: MultiTaskModel, step: Step) -> dict[str, Tensor]:
        names = step.tasks
        if self.place != "model":
            return model(step.inputs, names if step.by_name else None)  # type: ignore[no-any-return]
        if isinstance(step.inputs, Tensor):
            outputs = self.again("model", lambda x: tuple(model(x, names).values()), step.inputs)
        else:
            outputs = self.again(
                "model", lambda *xs: tuple(model(dict(zip(names, xs, strict=True))).values()), *step.inputs.values()
            )
        return dict(zip(names, outputs, strict=True))

    def _found(self, model: MultiTaskModel, steps: list[Step]) -> dict[str, Any]:
        """Outputs, gradients and statistics."""
        seen: list[int] = []
        if self.hooks:
            for layer in model.backbone.modules():
                if isinstance(layer, TaskSpecific):
                    layer.register_forward_pre_hook(lambda _, args: (args[0] * 1,))
                    layer.register_forward_hook(lambda _, __, y: seen.append(len(y)))
        pairs, results = [], {}
        for number, step in enumerate(steps):
            for name, y in self._called(model, step).items():
                results[f"{number} {name}"] = y.detach().clone()
                pairs.append((number, y, step.upstream[name]))
        _backward(pairs, self.backward)
        return {**results, **_state(model, steps, self.threads > 1)}

    def _wanted(self, model: MultiTaskModel, steps: list[Step]) -> dict[str, Any]:
        """The same by a plain network for each task, whose shared parameters are one."""
        steps = [
            step._replace(
                inputs=step.inputs.detach().clone().requires_grad_(step.inputs.requires_grad)
                if isinstance(step.inputs, Tensor)
                else {n: x.detach().clone().requires_grad_(x.requires_grad) for n, x in step.inputs.items()}
            )
            for step in steps
        ]
        for module in model.backbone.modules():
            if hasattr(module, "again"):
                module.again = Again(None, False)
        twins = [revert_model(model.backbone, t).train(self.training) for t in range(len(self.names))]
        specific = {name for name, module in model.backbone.named_modules() if isinstance(module, TaskSpecific)}
        for twin in twins:
            for name, parameter in model.backbone.named_parameters():
                owner, _, leaf = name.rpartition(".")
                if owner not in specific:
                    setattr(twin.get_submodule(owner), leaf, parameter)
        outputs, pairs = {}, []
        for number, step in enumerate(steps):
            for name in step.tasks:
                x = step.inputs if isinstance(step.inputs, Tensor) else step.inputs[name]
                y = model.heads[name](twins[self.names.index(name)](x))
                outputs[f"{number} {name}"] = y.detach().clone()
                pairs.append((number, y, step.upstream[name]))
        _backward(pairs, "at once")
        for name in specific:
            layer = model.backbone.get_submodule(name)
            norms = [twin.get_submodule(name) for twin in twins]
            norms = [norm[0] if isinstance(norm, nn.Sequential) else norm for norm in norms]
            for vector in ("weight", "bias"):
                grads = [None if norm is None else norm.grad for norm in (getattr(norm, vector) for norm in norms)]
                if getattr(layer, vector) is not None and any(grad is not None for grad in grads):
                    start = torch.zeros_like(getattr(layer, vector)[0])
                    getattr(layer, vector).grad = torch.stack([start if grad is None else grad for grad in grads])
            if layer.weight.grad is not None and layer.gate == "sigmoid":
                gates = torch.sigmoid(layer.weight.detach())
                layer.weight.grad *= gates * (1 - gates)
            for buffer, rows in layer.named_buffers():
                rows.copy_(torch.stack([getattr(norm, buffer) for norm in norms]))
        return {**outputs, **_state(model, steps, self.threads > 1)}


def _backward(pairs: list[tuple[int, Tensor, Tensor]], order: str) -> None:
    if order == "at once":
        torch.autograd.backward([y for _, y, _ in pairs], [dy for _, _, dy in pairs])
    elif order == "by output":
        for _, y, dy in pairs:
            y.backward(dy, retain_graph=True)
    else:
        numbers = sorted({number for number, _, _ in pairs}, reverse=order == "reversed")
        for number in numbers:
            of_step = [(y, dy) for n, y, dy in pairs if n == number]
            torch.autograd.backward([y for y, _ in of_step], [dy for _, dy in of_step])


def _state(model: MultiTaskModel, steps: list[Step], shared: bool) -> dict[str, Any]:
    inputs = [x for step in steps for x in ([step.inputs] if isinstance(step.inputs, Tensor) else step.inputs.values())]
    state = {f"gradient of input {index}": x.grad for index, x in enumerate(inputs)}
    if shared:
        return state
    state |= {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    return state | dict(model.named_buffers())


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    for name, value in wanted.items():
        got = found[name]
        zero = value is None and (
            got is None or not got.any()
        )  # a loop leaves out what stacked parameters get zero for
        if zero or (got is None and not value.any()):
            continue
        if got is None or value is None:
            return f"{name} is {got}, expected {value}"
        if got.shape != value.shape:
            return f"{name} has shape {tuple(got.shape)}, expected {tuple(value.shape)}"
        error = (got.double() - value.double()).abs().max().item() if got.numel() else 0.0
        if not error <= TOLERANCE * (1 + float(value.double().abs().max())):
            return f"{name} is off by {error}"
    return None


def program_call(rng: random.Random) -> Call:
    """One program, of which one in twelve compiles something."""
    program = Program(rng, compiled=rng.random() < 1 / 12)
    return Call(f"program of {program}", program.run, valid=True)
