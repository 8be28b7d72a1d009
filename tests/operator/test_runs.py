"""Which run a layer is part of: in threads, under checkpointing of any form and place, and in users' own hooks."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tsbn_kernels import FusedTSigmaBN2d, MultiTaskModel, convert_model, revert_model
from tsbn_kernels.operator import runs

TASKS = ("a", "b", "c", "d")
T, N, C = len(TASKS), 4, 4
REENTRANT = pytest.mark.parametrize("reentrant", [True, False])
PLACES = (None, "blocks", "layers", "nested", "backbone", "model")


class Backbone(nn.Module):
    """Two blocks, which run again in the backward pass: each, their layers, both, or both in one that is repeated."""

    def __init__(self, place: str | None, reentrant: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, C, 3, padding=1), nn.BatchNorm2d(C), nn.Tanh()) for c in (3, C)
        )
        self.place, self.reentrant = place, reentrant

    def again(self, function: Callable[..., Any], x: Tensor) -> Any:
        return checkpoint(function, x, use_reentrant=self.reentrant)

    def forward(self, x: Tensor) -> Tensor:
        if self.place in ("nested", "backbone"):
            return self.again(self.run, x).mean((2, 3))  # type: ignore[no-any-return]
        return self.run(x).mean((2, 3))

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.place in ("blocks", "nested"):
                x = self.again(block, x)
            elif self.place == "layers":
                for layer in block:
                    x = self.again(layer, x)
            else:
                x = block(x)
        return x


def models(place: str | None, reentrant: bool) -> tuple[MultiTaskModel, MultiTaskModel]:
    """One without and one with checkpoints; otherwise equal."""
    backbone = convert_model(Backbone(None, True), T, pretrained=False, fuse_activation=False)
    for layer in backbone.modules():
        if isinstance(layer, FusedTSigmaBN2d):
            nn.init.normal_(layer.weight)
    plain = MultiTaskModel(backbone, {task: nn.Linear(C, 2) for task in TASKS}).double()
    model = copy.deepcopy(plain)
    model.backbone.place, model.backbone.reentrant = place, reentrant
    return plain, model


def called(model: MultiTaskModel, x: Any, tasks: list[str]) -> dict[str, Tensor]:
    """The model, inside a checkpoint where its place is there."""
    place, reentrant = model.backbone.place, model.backbone.reentrant
    if place != "model":
        return model(x, tasks)
    if isinstance(x, dict):
        names = list(x)
        outputs = checkpoint(
            lambda *batches: tuple(model(dict(zip(names, batches, strict=True)), tasks).values()),
            *x.values(),
            use_reentrant=reentrant,
        )
    else:
        outputs = checkpoint(lambda x: tuple(model(x, tasks).values()), x, use_reentrant=reentrant)
    return dict(zip(tasks, outputs, strict=True))


def images(n: int = N) -> Tensor:
    return torch.randn(n, 3, 5, 5, dtype=torch.float64, requires_grad=True)


def assert_same_state(model: nn.Module, plain: nn.Module) -> None:
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")
    for one, other in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other)


@REENTRANT
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("order", ["together", "forwards", "backwards"])
def test_several_runs_before_their_backward_passes(order: str, place: str | None, reentrant: bool) -> None:
    """With other tasks each, of one shape and of several: the streams alone do not tell which they are."""
    pair = models(place, reentrant)
    calls = [
        (images(), ["a", "c"]),
        (images(), ["d", "b"]),
        (
            {task: images(n).detach().requires_grad_() for task, n in zip("cabd", (2, 3, 2, 4), strict=True)},
            list("cabd"),
        ),
        (images(), ["b"]),
    ]
    weights = [torch.randn(n, 2, dtype=torch.float64) for n in (4,) * 4 + (2, 3, 2, 4) + (4,)]
    for model in pair:
        outputs = [y for x, tasks in calls for y in called(model, x, tasks).values()]
        pairs = list(zip(outputs, weights, strict=True))
        if order == "together":
            torch.autograd.backward(outputs, weights)
        for y, w in [] if order == "together" else pairs if order == "forwards" else pairs[::-1]:
            if y.requires_grad:
                y.backward(w, retain_graph=True)
    assert_same_state(*pair[::-1])


@REENTRANT
@pytest.mark.parametrize("place", PLACES)
def test_threads_do_not_disturb_each_other(place: str | None, reentrant: bool) -> None:
    """Each trains with tasks of its own, on a model that they share; sequence numbers of their graphs are the same."""
    plain, model = models(place, reentrant)
    plain.eval()
    model.eval()
    parameters = list(model.backbone.parameters())
    inputs = {task: images() for task in TASKS}
    weights = torch.randn(N, 2, dtype=torch.float64)

    def gradients(model: MultiTaskModel, task: str) -> list[Tensor]:
        y = called(model, {task: inputs[task]} if place == "model" else inputs[task], [task])[task]
        gates = [*model.backbone.parameters()]
        if reentrant and place is not None:  # takes backward() alone, which adds up what all threads leave
            x = inputs[task]
            x.grad = None
            y.backward(weights)
            return [y.detach(), x.grad]
        return [y.detach(), *torch.autograd.grad(y, [inputs[task], *gates], weights)]

    wanted = {task: gradients(plain, task) for task in TASKS}
    failures: list[str] = []
    barrier = threading.Barrier(T)

    def work(task: str) -> None:
        barrier.wait()
        for _ in range(15):
            try:
                got = gradients(model, task)
                failures.extend(
                    f"{task}: wrong" for a, b in zip(got, wanted[task], strict=False) if not torch.allclose(a, b)
                )
            except Exception as error:
                failures.append(f"{task}: {error!r}")

    threads = [threading.Thread(target=work, args=(task,)) for task in TASKS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert parameters == list(model.backbone.parameters())


@REENTRANT
def test_a_backward_pass_in_another_thread(reentrant: bool) -> None:
    """Its nodes have numbers that other threads' graphs have too."""
    plain, model = models("blocks", reentrant)
    x, w = {task: images() for task in TASKS}, torch.randn(N, 2, dtype=torch.float64)
    outputs: dict[str, Tensor] = {}

    def forward(task: str) -> None:
        outputs.update(model(x[task], [task]))

    for work in (forward, lambda task: outputs[task].backward(w)):
        threads = [threading.Thread(target=work, args=(task,)) for task in TASKS]
        for thread in threads:
            thread.start()
            thread.join()
    for task in TASKS:
        plain(x[task], [task])[task].backward(w)
    assert_same_state(model, plain)


@pytest.mark.parametrize("way", ["forward", "streams"])
def test_layers_that_the_backbone_does_not_call_as_modules(way: str) -> None:
    """They know their streams all the same."""

    class Directly(nn.Module):
        def __init__(self, blocks: nn.ModuleList) -> None:
            super().__init__()
            self.blocks = blocks

        def forward(self, x: Tensor) -> Tensor:
            for conv, norm, act in self.blocks:  # type: ignore[misc]
                y = norm.forward(conv(x)) if way == "forward" else torch.cat(norm.streams(conv(x)))
                x = act(y)
            return x.mean((2, 3))

    plain, _ = models(None, True)
    model = copy.deepcopy(plain)
    model.backbone = Directly(model.backbone.blocks)  # type: ignore[arg-type]
    x = images()
    for tasks in (["c", "a"], list(TASKS), ["b"]):
        torch.testing.assert_close(model(x, tasks), plain(x, tasks))
    for got, wanted in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(got, wanted)


def test_threads_with_compiled_backbones() -> None:
    plain, model = models(None, True)
    torch._dynamo.reset()
    model.backbone.compile(backend="aot_eager", fullgraph=True)
    model.eval()
    plain.eval()
    x, wrong = images().detach(), []
    with torch.no_grad():
        for task in TASKS:
            model(x, [task])
        wanted = {task: plain(x, [task])[task] for task in TASKS}

    def work(task: str) -> None:
        with torch.no_grad():
            wrong.extend(not torch.allclose(model(x, [task])[task], wanted[task]) for _ in range(20))

    threads = [threading.Thread(target=work, args=(task,)) for task in TASKS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [False] * 20 * T


# ---- what a backward pass runs: repeated, or new ---------------------------------------------------------------------


class Custom(torch.autograd.Function):
    """Runs a forward pass of a user's own in its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[], None]) -> Tensor:
        ctx.run = run
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        ctx.run()
        return dy, None


class MyCheckpoint(Custom):
    """What repeats a forward pass has this in its name."""


@pytest.mark.parametrize("how", ["hook", "function", "accumulated", "a checkpoint in a hook"])
def test_a_new_forward_pass_of_a_users_own_in_a_backward_pass(how: str) -> None:
    """Counts as ``nn.BatchNorm2d`` counts it, and runs what it names, whatever the backward pass comes from."""
    model, _ = models(None, True)
    single = revert_model(model.backbone, 1)
    other = images()

    def new() -> None:
        if how == "a checkpoint in a hook":
            checkpoint(lambda x: (model(x, ["b"]), single(x)), other, use_reentrant=False)
        else:
            model(other, ["b"])
            single(other)

    x = images()
    leaf = images()
    y = model(x, ["a", "b"])
    single(x)
    z = Custom.apply(leaf, new) if how == "function" else leaf * 1
    if how == "accumulated":
        leaf.register_post_accumulate_grad_hook(lambda _: new())
    elif how != "function":
        z.register_hook(lambda _: new())
    (z.sum() + y["a"].sum()).backward()
    got, wanted = revert_model(model.backbone, 1).state_dict(), single.state_dict()
    for key, tensor in wanted.items():
        torch.testing.assert_close(got[key], tensor, msg=key)
    assert wanted["blocks.0.1.num_batches_tracked"] == 2


@pytest.mark.parametrize("function", [Custom, MyCheckpoint])
def test_a_function_that_repeats_says_so_by_its_name(function: Any) -> None:
    layer = FusedTSigmaBN2d(T, C)
    leaf = torch.randn(T * N, C, 2, 2, requires_grad=True)
    function.apply(leaf, lambda: layer(leaf)).sum().backward()
    assert layer.num_batches_tracked is not None
    assert layer.num_batches_tracked.tolist() == [0 if function is MyCheckpoint else 1] * T


@REENTRANT
def test_a_backbone_of_its_own_is_repeated_as_it_ran(reentrant: bool) -> None:
    """Called without its model, between runs of that, it takes stacked streams; and so it does in its repetition."""
    plain, model = models("blocks", reentrant)
    x, w = images(T * N), torch.randn(T * N, C, dtype=torch.float64)
    for one in (plain, model):
        before = one(images().detach(), ["c", "a"])
        y = one.backbone(x)
        after = one(images().detach(), ["b"])
        (y * w).sum().backward()
        assert before
        assert after
    parameters = zip(model.backbone.parameters(), plain.backbone.parameters(), strict=True)
    for got, wanted in parameters:
        torch.testing.assert_close(got.grad, wanted.grad)


def test_a_repetition_that_no_output_leads_to_is_an_error() -> None:
    _, model = models("blocks", False)
    inside: list[Tensor] = []
    model.backbone.blocks[1].register_forward_hook(lambda _, __, y: inside.append((y * 2).tanh()))
    y = model(images(), ["c", "a"])
    with pytest.raises(RuntimeError, match="computed again in a backward pass that comes from none of its outputs"):
        inside[0].sum().backward()
    assert y


def test_a_run_keeps_nothing_alive() -> None:
    """Nor does its memory wait for Python's collector: nothing of it is in a cycle."""
    _, model = models("blocks", False)
    model(images())
    gc.collect()
    gc.disable()
    before = set(runs._graphs)
    try:
        for backward in (False, True):
            y = model(images(), ["a", "b"])
            (graph,) = runs._graphs - before
            stream = weakref.ref(y["a"])
            assert graph() is not None
            if backward:
                sum(y.values()).sum().backward()  # type: ignore[union-attr]
            del y
            assert graph() is stream() is None
            assert runs._graphs == before
    finally:
        gc.enable()
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 7, 5, 5, dtype=torch.float64))
    assert runs._running.run is None


def test_a_model_inside_a_model() -> None:
    """Each layer gets the streams of the model whose backbone it is in, the innermost that runs."""
    plain, inner = models(None, True)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.inner = FusedTSigmaBN2d(2, 3), [inner]

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return torch.cat([*self.inner[0](y[: len(y) // 2], ["d"]).values()] * 2)

    outer = MultiTaskModel(Around(), {"one": nn.Identity(), "two": nn.Identity()}).double()
    x = images()
    got = outer(x)["one"]
    torch.testing.assert_close(got, plain(outer.backbone.norm(x, fan_out=True)[:N], ["d"])["d"])
