"""Where a path leads around the first task-specific layer, the streams part before it, wherever that is."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from logging.handlers import QueueHandler
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tsbn_kernels import MultiTaskModel, convert_model, export_task, revert_model

TASKS = ("age", "smile", "hat")
T, N, C, L = len(TASKS), 4, 6, 5


class Residual(nn.Module):
    """A pre-norm block of ``[N, C, L]``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.BatchNorm1d(C), nn.Conv1d(C, C, 3, padding=1)

    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> Tensor:
        y = self.mix(self.norm(x))
        return x + (y if scale is None else scale * y)


class ClassToken(nn.Module):
    """Reads the number of samples before its first layer, and uses it behind that."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.token = nn.Conv1d(C, C, 1), nn.BatchNorm1d(C), nn.Parameter(torch.randn(1, C, 1))

    def forward(self, x: Tensor) -> Tensor:
        samples = x.shape[0]
        return torch.cat([self.token.expand(samples, -1, -1), self.norm(self.stem(x))], 2)


class Merged(ClassToken):
    """Gives samples of before to a view of the streams, which fits: it would mix the tasks, and nothing would tell."""

    def forward(self, x: Tensor) -> Tensor:
        samples = x.shape[0]
        y = self.norm(self.stem(x) + self.token).transpose(1, 2)
        y = y.reshape(samples, -1, C).softmax(1)
        return y.reshape(-1, L, C)


class Scaled(nn.Module):
    """Its block gets two batches that all tasks share, and one that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv1d(C, C, 1), Residual()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.block(x, scale=x.mean((1, 2), keepdim=True))  # type: ignore[no-any-return]


class Windows(nn.Module):
    """A block on two windows of each sample, joined with what was before them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv1d(C, C, 1), Residual()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        windows = self.block(torch.stack([x, x.flip(2)], 1).flatten(0, 1))
        return torch.cat([x, *windows.unflatten(0, (-1, 2)).unbind(1)], 2)


class Outer(nn.Module):
    """A path that leads around a whole block, which has none."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv1d(C, C, 1), nn.Sequential(nn.Conv1d(C, C, 1), nn.BatchNorm1d(C))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return torch.cat([x, self.block(x).relu()], 1)


class Tied(nn.Module):
    """One block that is called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv1d(C, C, 1), Residual()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = self.block(x)
        return x


class Post(nn.Module):
    """A post-norm block: no path leads around."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.next = nn.Conv1d(C, C, 1), nn.BatchNorm1d(C), Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.next(self.norm(x + self.stem(x)))  # type: ignore[no-any-return]


def two_blocks() -> nn.Module:
    return nn.Sequential(nn.Conv1d(C, C, 1), nn.Sequential(Residual(), Residual()))


# The module at whose input the streams part: None for the layers themselves.
PLACES: dict[Callable[[], nn.Module], str | None] = {
    two_blocks: "1.0",
    ClassToken: "",
    Merged: "",
    Scaled: "block",
    Windows: "",
    Outer: "",
    lambda: nn.Sequential(nn.Conv1d(C, C, 1), Outer()): "1",
    Tied: "block",
    Post: None,
    lambda: nn.Sequential(nn.Conv1d(C, C, 1), nn.BatchNorm1d(C), Residual()): None,
}


def built(make: Callable[[], nn.Module]) -> MultiTaskModel:
    """A model of float64 whose tasks differ, in evaluation mode."""
    torch.manual_seed(0)
    backbone = convert_model(make(), T, variant="tsbn")
    for module in backbone.modules():
        if hasattr(module, "gates"):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean, std=0.1)
    return MultiTaskModel(backbone, {task: nn.Identity() for task in TASKS}).double().eval()


def batch(n: int = N) -> Tensor:
    return torch.randn(n, C, L, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def assert_close(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def assert_equals_plain(model: MultiTaskModel, x: Tensor, tasks: list[str] | None = None) -> None:
    y = model(x, tasks)
    assert list(y) == (tasks or list(TASKS))
    for task, got in y.items():
        assert_close(got, revert_model(model.backbone, TASKS.index(task))(x))


@pytest.mark.parametrize("make", PLACES)
@pytest.mark.parametrize("n", [N, 1, T, L, C, T * T])
def test_every_task_gets_its_plain_model(n: int, make: Any) -> None:
    model = built(make)
    for tasks in (None, ["hat", "age"], ["smile"]):
        assert_equals_plain(model, batch(n), tasks)
    assert_equals_plain(model, batch(n + 1))
    assert model._parting is not None
    assert model._parting.module == PLACES[make]
    if make is not Merged:  # which cannot have its shape of nothing
        assert_equals_plain(model, batch(0))


@pytest.mark.parametrize("make", PLACES)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_those_of_stacked_inputs(training: bool, make: Any) -> None:
    model, x = built(make).train(training), batch().requires_grad_()
    gradients = []
    for inputs in (x, dict.fromkeys(TASKS, x)):
        torch.manual_seed(1)
        y = model(inputs)
        loss = sum((stream * torch.randn_like(stream)).sum() for stream in y.values())
        gradients.append(torch.autograd.grad(loss, [x, *model.backbone.parameters()]))
    assert_close(*gradients)


def test_what_comes_before_runs_once() -> None:
    model, seen = built(two_blocks), []
    model.backbone[0].register_forward_hook(lambda _, __, y: seen.append(y.shape[0]))
    model(batch())
    assert seen == [N]


def test_a_trial_leaves_no_trace() -> None:
    """The hooks of a user are not called, no statistics change, and random numbers stay what they are."""

    class Counting(nn.Sequential):
        count = 0

        def forward(self, x: Tensor) -> Any:
            self.count += 1
            return super().forward(x)

    model = built(lambda: Counting(nn.Dropout(), nn.BatchNorm1d(C), Residual())).train()
    x, calls = batch(), []
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: calls.append(module))
    other = copy.deepcopy(model)
    other(x)  # which has made its trial then
    for statistics in (model.backbone[1], other.backbone[1]):
        statistics.reset_running_stats()
    calls.clear()
    torch.manual_seed(3)
    random.seed(3)
    wanted = other(x)
    after, count, before = torch.get_rng_state(), len(calls), model.backbone.count
    calls.clear()
    torch.manual_seed(3)
    assert_close(model(x), wanted)
    assert torch.equal(torch.get_rng_state(), after)
    assert len(calls) == count
    assert model.backbone.count == before + 1
    assert_close(model.backbone[1].running_mean, other.backbone[1].running_mean)
    assert all(module.training for module in model.modules())


def test_a_trial_says_nothing() -> None:
    log, heard = logging.getLogger("torch._subclasses.fake_tensor"), QueueHandler(SimpleQueue())
    log.addHandler(heard)
    try:
        built(two_blocks)(batch())
    finally:
        log.removeHandler(heard)
    assert heard.queue.empty()
    assert not log.disabled


def test_a_trial_is_on_the_device_of_the_model() -> None:
    class Asking(Residual):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.ones(C, 1, dtype=torch.float64)  # no buffer

        def forward(self, x: Tensor, *, scale: Tensor | None = None) -> Tensor:
            with torch.autocast(x.device.type, enabled=False):
                shift = torch.zeros(C, 1, dtype=x.dtype)
                return super().forward(x * self.scale.to(x.device) + shift, scale=scale)

    model = built(lambda: nn.Sequential(nn.Conv1d(C, C, 1), Asking()))
    assert_equals_plain(model, batch())
    assert model._parting is not None
    assert model._parting.module == "1"


@pytest.mark.parametrize("around", ["", "added", "mask"])
def test_what_cannot_be_tried_fans_out_in_its_layers(around: str) -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(C)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x * (1 + float(x.abs().max() < 0)))
            if around == "mask":
                return y[torch.ones(len(x), dtype=torch.bool)]
            return x + y if around else y

    model = built(Looks)
    if not around:
        assert_equals_plain(model, batch())
        return
    kind, text = (IndexError, "shape of the mask") if around == "mask" else (RuntimeError, "size of tensor")
    with pytest.raises(kind, match=rf"(?s){text}.*in the backbone \(Looks\).*dict.fromkeys"):
        model(batch())
    for task, y in model(dict.fromkeys(TASKS, batch())).items():
        assert_close(y, revert_model(model.backbone, TASKS.index(task))(batch()))


class SamplesSecond(nn.Module):
    """Normalises ``[L, N, C]``, as an attention with ``batch_first=False`` has it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(C)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.permute(2, 0, 1)
        return self.norm(tokens.transpose(1, 2)).transpose(1, 2).mean(0)  # type: ignore[no-any-return]


@pytest.mark.parametrize("n", [L, 1, 2])
@pytest.mark.parametrize("stacked", [True, False])
def test_samples_that_are_not_first_are_an_error(stacked: bool, n: int) -> None:
    """Also where the number of tokens is that of samples, or a multiple, and nothing else would tell."""
    model, x = built(SamplesSecond), torch.randn(n, C, T * L, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"nor have them in another dimension than the first"):
        model(dict.fromkeys(TASKS, x) if stacked else x)


@pytest.mark.parametrize("make", PLACES)
def test_compiled_at_its_first_call(make: Any) -> None:
    model, x = built(make), batch()
    wanted = copy.deepcopy(model)(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), wanted)
    assert_close(compiled(batch(N + 3)), model(batch(N + 3)))
    exported = torch.export.export(built(make), (x,))
    assert_close(exported.module()(x), wanted)


@pytest.fixture
def without_collector() -> Iterator[None]:
    """What a cycle of references holds, it holds for good."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("make", [two_blocks, Tied, Scaled])
def test_checkpoints(make: Any, use_reentrant: bool) -> None:
    def checkpointed(block: nn.Module) -> None:
        forward = type(block).__call__

        class Checkpointed(Residual):
            def __call__(self, x: Tensor, scale: Tensor | None = None) -> Any:
                return checkpoint(lambda x, scale: forward(self, x, scale=scale), x, scale, use_reentrant=use_reentrant)

        block.__class__ = Checkpointed

    gradients = []
    for checkpoints in (False, True):
        model = built(make).train()
        for block in [module for module in model.modules() if isinstance(module, Residual) and checkpoints]:
            checkpointed(block)
        x = batch().requires_grad_()
        y = model(x, ["hat", "age"])
        model(batch(N + 1))  # something else in between
        torch.manual_seed(1)
        loss = sum((stream * torch.randn_like(stream)).sum() for stream in y.values())
        parameters = [x, *model.backbone.parameters()]
        loss.backward()
        gradients.append([p.grad for p in parameters])
    assert_close(*gradients)


def test_threads_share_one_trial() -> None:
    model = built(two_blocks)
    wanted = copy.deepcopy(model)(batch())
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda _: model(batch()), range(8)):
            assert_close(y, wanted)
    assert len(model.backbone[1][0]._forward_pre_hooks) == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("first", [True, False])
def test_copies_part_where_they_did(first: bool, duplicate: Any) -> None:
    model = built(two_blocks)
    wanted = copy.deepcopy(model)(batch())
    if first:
        model(batch())
    other = duplicate(model)
    assert_close(other(batch()), wanted)
    second = MultiTaskModel(model.backbone, {task: nn.Flatten(0) for task in TASKS}).eval()
    assert_close(second(batch()), {task: y.flatten() for task, y in wanted.items()})
    assert_close(model(batch()), wanted)


def test_plain_models_have_no_hooks_of_it() -> None:
    model = built(two_blocks)
    wanted = model(batch())
    for plain in (revert_model(model.backbone, 1), export_task(model, 1)):
        assert not any(module._forward_pre_hooks for module in plain.modules())
        assert_close(plain(batch()), wanted["smile"])
    assert_close(model(batch()), wanted)


def test_transforms() -> None:
    model, x = built(two_blocks), batch()
    tangents = torch.randn_like(x)

    def streams(x: Tensor) -> Tensor:
        return torch.stack(list(model(x).values()))

    _, got = torch.func.jvp(streams, (x,), (tangents,))
    wanted = (streams(x + 1e-6 * tangents) - streams(x - 1e-6 * tangents)) / 2e-6
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert torch.autograd.gradgradcheck(streams, batch(2).requires_grad_())
