"""Activation checkpointing of layers: a part of the network that is run again counts once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.layers import LAYERS, SHAPE, C, N, T, assert_batches, assert_same, gradients, of_any_kind, trained
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tsbn_kernels import FusedTSigmaBN2d, MultiTaskModel, convert_model
from tsbn_kernels.functional import task_batch_norm
from tsbn_kernels.operator import runs

reentrant = pytest.mark.parametrize("use_reentrant", [True, False])


OPTIONS = [("BN", {"activation": "relu"}), ("BN", {"momentum": None}), *((kind, {}) for kind in LAYERS)]


@reentrant
@pytest.mark.parametrize(("kind", "options"), OPTIONS)
@pytest.mark.parametrize("tasks", [None, [2, 0]])
def test_checkpointing_counts_a_batch_once(tasks: Any, kind: str, options: Any, use_reentrant: bool) -> None:
    layer = trained(kind, **options)
    twin = copy.deepcopy(layer)

    def plain(module: nn.Module, x: Tensor) -> Tensor:
        return module(x, tasks=tasks)  # type: ignore[no-any-return]

    shape = SHAPE if tasks is None else (2 * N, *SHAPE[1:])
    for step in range(2):
        x, dy = torch.randn(shape) * (step + 1) + step, torch.randn(shape)
        got = gradients(layer, x, dy, lambda *args: checkpoint(plain, *args, use_reentrant=use_reentrant))
        assert_same(got, gradients(twin, x, dy, plain))
        assert_same(layer.state_dict().values(), twin.state_dict().values())


@of_any_kind
def test_nested_checkpoints_count_a_batch_once(kind: str) -> None:
    layer = nn.Sequential(trained(kind), trained(kind))
    x, dy = torch.randn(SHAPE), torch.randn(SHAPE)

    def nested(module: Any, x: Tensor) -> Tensor:
        return checkpoint(module[1], module[0](x), use_reentrant=False)  # type: ignore[no-any-return]

    expected = gradients(copy.deepcopy(layer), x, dy)
    assert_same(gradients(layer, x, dy, lambda *args: checkpoint(nested, *args, use_reentrant=False)), expected)
    assert_batches(layer[1], 1)


@reentrant
def test_a_checkpointed_functional_call_updates_once(use_reentrant: bool) -> None:
    x, weight = torch.randn(SHAPE, requires_grad=True), torch.zeros(T, C)
    means = []
    for wrap in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant)):
        mean, var = torch.zeros(T, C), torch.ones(T, C)
        wrap(lambda x, mean=mean, var=var: task_batch_norm(x, weight, None, mean, var, num_tasks=T), x).backward(
            torch.randn(SHAPE)
        )
        means.append(mean)
    assert torch.equal(*means)


class Checkpointed(nn.Module):
    """A backbone of two blocks, each run again in the backward pass."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh()) for c in (3, 4)
        )
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.use_reentrant is None else checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x.mean(dim=(2, 3))


@reentrant
@pytest.mark.parametrize("separately", [True, False])
def test_checkpointed_backbones_know_which_tasks_ran(separately: bool, use_reentrant: bool) -> None:
    """Two passes with two of four tasks each: in the backward pass the streams alone do not tell which."""
    torch.manual_seed(1)
    names = ["a", "b", "c", "d"]
    heads = {name: nn.Linear(4, 2) for name in names}
    plain = MultiTaskModel(convert_model(Checkpointed(None), 4, fuse_activation=False), heads).double()
    for layer in plain.modules():
        if isinstance(layer, FusedTSigmaBN2d):
            nn.init.normal_(layer.weight)
    model = copy.deepcopy(plain)
    model.backbone.use_reentrant = use_reentrant
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(4, 4, 2, dtype=torch.float64)
    for network in (plain, model):
        outputs = {}
        for tasks in (["a", "c"], ["d", "b"]):
            outputs.update(network(x, tasks=tasks))
        if separately:
            for name in names:
                outputs[name].backward(dy[names.index(name)], retain_graph=True)
        else:
            torch.autograd.backward([outputs[name] for name in names], list(dy))
    for (name, got), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, msg=lambda text, name=name: f"{name}: {text}")
    assert_same(model.buffers(), plain.buffers())
    assert runs.current(model._router) == (None, False)
