"""DistributedDataParallel and FSDP2 train models with these layers without special care."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from support import ranks
from support.networks import pretrained
from support.training import assert_same_state, averaged_backward, batch, loss_of, multitask
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tsbn_kernels import convert_model, expand_state_dict, parameter_groups
from tsbn_kernels.layers.task_specific import TaskSpecific

T = 3
STEPS = 2
FULL = StateDictOptions(full_state_dict=True)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameter_groups(model, lr=1e-3), weight_decay=1e-4)


def data(step: int, part: int, memory_format: torch.memory_format) -> tuple[Tensor, dict[str, Tensor]]:
    images, upstream = batch(T, step, part)
    return images.contiguous(memory_format=memory_format), upstream


def one_process(
    model: nn.Module, accumulated: int = 1, memory_format: torch.memory_format = torch.contiguous_format
) -> dict[str, Any]:
    """The steps of two ranks, each with its own batches and their statistics; the running ones are the first rank's."""
    optimizer = adam(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        for index in range(step * accumulated, (step + 1) * accumulated):
            averaged_backward(model, [data(index, part, memory_format) for part in range(2)], first=True)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return model.state_dict()


def train(
    model: nn.Module,
    accumulated: int = 1,
    memory_format: torch.memory_format = torch.contiguous_format,
    unsynchronised: Any = nullcontext,
) -> None:
    optimizer = adam(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        for index in range(accumulated):
            images, upstream = data(step * accumulated + index, distributed.get_rank(), memory_format)
            with nullcontext() if index == accumulated - 1 else unsynchronised():
                loss_of(model(images), upstream).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


def some_tasks(model: nn.Module) -> dict[str, Tensor | None]:
    """Gradients of a pass through one task, averaged over the ranks."""
    model.zero_grad()
    images, upstream = batch(T, 7, distributed.get_rank())
    loss_of(model(images, tasks=["task1"]), upstream).backward()
    return {
        name: parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        for name, parameter in model.named_parameters()
    }


def assert_gradients_of_some_tasks(found: dict[str, Tensor | None], model: nn.Module) -> None:
    model.zero_grad()
    for part in range(2):
        images, upstream = batch(T, 7, part)
        (loss_of(model(images, tasks=["task1"]), upstream) / 2).backward()
    for (name, gradient), parameter in zip(found.items(), model.parameters(), strict=True):
        if parameter.grad is None:
            assert gradient is None or not gradient.any(), name
        else:
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-8, atol=1e-10)


NETWORKS = [
    ("celeba", {}, torch.contiguous_format, 1),
    ("celeba", {"variant": "tsbn", "fuse_activation": False}, torch.channels_last, 2),
    ("resnet18", {}, torch.channels_last, 1),
    ("transformer", {}, torch.contiguous_format, 1),
    ("transformer, RMS", {"layer_norm_gate": "sigmoid"}, torch.contiguous_format, 2),
]


def case_ddp(name: str, options: Any, memory_format: Any, accumulated: int, recompute: bool) -> Any:
    whole = multitask(T, name, **options)
    whole.recompute = recompute
    model = DistributedDataParallel(whole, find_unused_parameters=True)
    train(model, accumulated, memory_format, model.no_sync)
    state = {key: tensor.clone() for key, tensor in whole.state_dict().items()}
    return state, {key.removeprefix("module."): gradient for key, gradient in some_tasks(model).items()}


@pytest.mark.parametrize(("name", "options", "memory_format", "accumulated"), NETWORKS)
def test_ddp_equals_one_process(name: str, options: Any, memory_format: Any, accumulated: int) -> None:
    (state, gradients), (other, _) = ranks.run(case_ddp, 2, name, options, memory_format, accumulated, accumulated == 1)
    one = multitask(T, name, **options)
    assert_same_state(state, one_process(one, accumulated, memory_format), 1e-8)
    for key, _ in one.named_parameters():
        assert torch.equal(other[key], state[key]), key
    assert_gradients_of_some_tasks(gradients, one)


def sharded(model: Any, **options: Any) -> Any:
    """Each layer of the backbone by itself, and the heads."""
    for module in model.backbone.modules():
        if next(module.parameters(recurse=False), None) is not None:
            fully_shard(module, **options)
    return fully_shard(model, **options)


def case_fsdp(name: str, options: Any, memory_format: Any, accumulated: int, recompute: bool) -> Any:
    model = sharded(multitask(T, name, **options))
    model.recompute = recompute

    @contextmanager
    def unsynchronised() -> Iterator[None]:
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    train(model, accumulated, memory_format, unsynchronised)
    state = {key: tensor.clone() for key, tensor in get_model_state_dict(model, options=FULL).items()}
    gradients = some_tasks(model)
    set_model_state_dict(model, dict(state), options=FULL)  # with the running statistics of before
    layer = next(module for module in model.modules() if isinstance(module, TaskSpecific))
    with torch.no_grad():
        gates = layer.gates.full_tensor()
    return state, gradients, gates, layer.task(1).state_dict()


@pytest.mark.parametrize(("name", "options", "memory_format", "accumulated"), NETWORKS)
def test_fsdp_equals_one_process(name: str, options: Any, memory_format: Any, accumulated: int) -> None:
    state, gradients, gates, task = ranks.run(
        case_fsdp, 2, name, options, memory_format, accumulated, accumulated == 1
    )[0]
    one = multitask(T, name, **options)
    assert_same_state(state, one_process(one, accumulated, memory_format), 1e-8)
    layer = next(module for module in one.modules() if isinstance(module, TaskSpecific))
    torch.testing.assert_close(gates, layer.gates.detach(), rtol=1e-8, atol=1e-8)
    assert_same_state(task, layer.task(1).state_dict(), 1e-8)
    assert_gradients_of_some_tasks(gradients, one)


def case_mixed_precision() -> Any:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(multitask(T).float(), mp_policy=policy)
    seen = set()
    model.backbone[4].register_forward_pre_hook(lambda layer, args: seen.add((args[0].dtype, layer.weight.dtype)))
    images, upstream = batch(T, 0, distributed.get_rank())
    loss_of(model(images.float()), upstream).backward()
    gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    return seen, gradients, dict(model.named_buffers())


def test_mixed_precision_of_fsdp() -> None:
    """Gates and activations are bfloat16 on the way; gradients and running statistics are float32."""
    (seen, gradients, buffers), _ = ranks.run(case_mixed_precision, 2)
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    one = multitask(T)
    averaged_backward(one, [batch(T, 0, part) for part in range(2)], first=True)
    for name, buffer in one.named_buffers():
        assert buffers[name].dtype == (torch.int64 if "tracked" in name else torch.float32)
        torch.testing.assert_close(buffers[name], buffer.to(buffers[name].dtype), rtol=0.02, atol=0.02)
    for name, parameter in one.named_parameters():
        assert gradients[name].dtype == torch.float32
        cosine = nn.functional.cosine_similarity(gradients[name].double().flatten(), parameter.grad.flatten(), dim=0)
        assert cosine > 0.9, name


def case_plain_checkpoint() -> Any:
    model = sharded(multitask(T))
    plain = pretrained("celeba", torch.float64).state_dict()
    state = get_model_state_dict(model, options=FULL)
    state.update({f"backbone.{key}": tensor for key, tensor in plain.items()})
    set_model_state_dict(model, dict(state), options=FULL)
    return plain, get_model_state_dict(model, options=FULL)


def test_a_checkpoint_of_the_plain_model_loads_into_a_model_of_fsdp() -> None:
    (plain, state), _ = ranks.run(case_plain_checkpoint, 2)
    one = multitask(T)
    one.backbone.load_state_dict(plain)
    assert_same_state(state, one.state_dict())


def case_broadcast(variant: Any, on_meta: bool) -> Any:
    """A plain checkpoint that the first rank alone has read."""
    plain = pretrained("celeba", torch.float64)
    torch.manual_seed(2 + distributed.get_rank())
    model = fully_shard(convert_model(pretrained("celeba", torch.float64), T, variant=variant))
    if on_meta:
        model.to("meta")
    first = distributed.get_rank() == 0
    before = dict(plain.state_dict())
    state = expand_state_dict(model, before) if first else {}
    assert before.keys() == plain.state_dict().keys()
    assert all(before[key] is tensor or torch.equal(before[key], tensor) for key, tensor in plain.state_dict().items())
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return plain.state_dict(), get_model_state_dict(model, options=FULL)


def case_broadcast_as_it_is(on_meta: bool) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    model = fully_shard(convert_model(plain, 2 * distributed.get_world_size(), pretrained=False))
    if on_meta:
        model.to("meta")
    state = plain.state_dict() if distributed.get_rank() == 0 else {}
    with pytest.raises(ValueError, match=r"1\.running_mean.* plain layer, and .*1\.weight.* is not.*expand_state_dict"):
        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("on_meta", [False, True])
def test_a_plain_checkpoint_whose_shapes_fit_by_chance_is_refused(on_meta: bool, world_size: int) -> None:
    """PyTorch has written a vector to the rows of all tasks then, whose gates are no sigmoids of it."""
    ranks.run(case_broadcast_as_it_is, world_size, on_meta)


@pytest.mark.parametrize("on_meta", [False, True])
@pytest.mark.parametrize("variant", ["ts_sigma_bn", "tsbn"])
def test_a_plain_checkpoint_of_the_first_rank_is_broadcast(variant: str, on_meta: bool) -> None:
    (plain, state), _ = ranks.run(case_broadcast, 2, variant, on_meta)
    one = convert_model(pretrained("celeba", torch.float64), T, variant=variant)
    one.load_state_dict(plain)
    assert_same_state(state, one.state_dict())
