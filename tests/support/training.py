"""A small multi-task model, its batches and its loss, the same on every rank, for the tests of parallel training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from support.networks import pretrained
from tsbn_kernels import MultiTaskModel, convert_model


def task_names(count: int) -> list[str]:
    return [f"task{index}" for index in range(count)]


def multitask(num_tasks: int, name: str = "celeba", *, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """The same model in every process; its tasks differ."""
    torch.manual_seed(1)
    plain: Any = pretrained(name, dtype)
    backbone = convert_model(plain, num_tasks, **options)
    for module in backbone.modules():
        if hasattr(module, "gates"):
            nn.init.normal_(module.weight)
    heads = {task: nn.Linear(plain.features, 1, dtype=dtype) for task in task_names(num_tasks)}
    return MultiTaskModel(backbone, heads)


def batch(num_tasks: int, step: int, part: int = 0, size: int = 4) -> tuple[Tensor, dict[str, Tensor]]:
    """Images, and what each task's predictions are multiplied by, of one part of the data of a step."""
    generator = torch.Generator().manual_seed(100 * step + part)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return normal(size, 3, 32, 32), {task: normal(size, 1) for task in task_names(num_tasks)}


def loss_of(predictions: dict[str, Tensor], upstream: dict[str, Tensor]) -> Tensor:
    """The sum over the tasks that were predicted."""
    losses = [(y * upstream[task]).mean() + 0.1 * y.square().mean() for task, y in predictions.items()]
    return torch.stack(losses).sum()


def averaged_backward(
    model: nn.Module, batches: Iterable[tuple[Tensor, dict[str, Tensor]]], *, first: bool = False
) -> None:
    """One process in place of several: each batch has statistics of its own, and gradients are averaged.

    Buffers are averaged too, or are those of the ``first`` batch.
    """
    batches = list(batches)
    buffers = dict(model.named_buffers())
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    after: list[dict[str, Tensor]] = []
    for images, upstream in batches:
        for name, buffer in buffers.items():
            buffer.copy_(before[name])
        (loss_of(model(images), upstream) / len(batches)).backward()
        after.append({name: buffer.clone() for name, buffer in buffers.items()})
    kept = after[:1] if first else after
    for name, buffer in buffers.items():
        buffer.copy_(sum(each[name] for each in kept) / len(kept))


def assert_same_state(actual: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-9) -> None:
    """Keys in the same order, values to rounding."""
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
