"""Task parallelism on 2 and 4 processes, against one process."""

from __future__ import annotations

import copy
import gc
import os
import re
import time
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from support import ranks
from support.networks import pretrained
from support.processes import python_output
from support.training import assert_same_state, averaged_backward, batch, loss_of, multitask, task_names
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import swa_utils

from tsbn_kernels import (
    FusedTSigmaBN2d,
    LateFanOut,
    MultiTaskModel,
    add_task,
    convert_model,
    convert_sync_batchnorm,
    expand_state_dict,
    export_task,
    parameter_groups,
    shard_tasks,
)
from tsbn_kernels.layers.task_specific import TaskSpecific
from tsbn_kernels.sharding import clip_grad_norm_, full_state_dict, no_sync

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def mesh_of(data: int = 1) -> DeviceMesh:
    """All ranks, ``data`` of which see the same tasks."""
    if data == 1:
        return init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("tasks",))
    return init_device_mesh("cpu", (distributed.get_world_size() // data, data), mesh_dim_names=("tasks", "data"))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameter_groups(model, lr=1e-3), weight_decay=1e-4, foreach=True)  # as on GPUs


def train(model: Any, optimizer: torch.optim.Optimizer, num_tasks: int, steps: range, part: int = 0) -> list[Tensor]:
    """Returns the norms of the gradients."""
    norms = []
    for step in steps:
        images, upstream = batch(num_tasks, step, part)
        optimizer.zero_grad()
        loss_of(model(images), upstream).backward()
        norms.append(clip_grad_norm_(model, 0.5))
        optimizer.step()
    return norms


def train_one(model: Any, optimizer: torch.optim.Optimizer, num_tasks: int, steps: range, parts: int) -> list[Tensor]:
    """The same in one process."""
    norms = []
    for step in steps:
        optimizer.zero_grad()
        averaged_backward(model, [batch(num_tasks, step, part) for part in range(parts)])
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
        optimizer.step()
    return norms


# ---- training ----------------------------------------------------------------------------------------------------


def case_training(num_tasks: int, data: int, name: str, options: dict[str, Any], memory_format: Any) -> Any:
    mesh = mesh_of(data)
    model = multitask(num_tasks, name, **options).to(torch.float32, memory_format=memory_format)
    if distributed.get_rank() > 0:  # the first rank's counts
        for parameter in model.parameters():
            parameter.data.fill_(0.5)
    model = shard_tasks(model, mesh).double()
    rows = {module.weight.to_local().shape[0] for module in model.modules() if isinstance(module, TaskSpecific)}
    size = sum(p.numel() for p in model.heads.parameters())
    norms = train(model, adam(model), num_tasks, range(3), mesh.get_local_rank("data") if data > 1 else 0)
    state = full_state_dict(model)
    predictions = {task: y.detach() for task, y in model.eval()(batch(num_tasks, 9)[0]).items()}
    return norms, state, predictions, rows, size


@pytest.mark.parametrize(
    ("num_tasks", "shape", "name", "options", "memory_format"),
    [
        (5, (2, 1), "celeba", {}, torch.contiguous_format),
        (7, (4, 1), "celeba", {"variant": "tsbn"}, torch.contiguous_format),
        (5, (2, 2), "celeba", {"exclude": "1"}, torch.channels_last),
        (3, (2, 1), "resnet18", {}, torch.channels_last),
        (5, (2, 1), "transformer", {}, torch.contiguous_format),
        (3, (1, 2), "celeba", {"fuse_activation": False}, torch.contiguous_format),
    ],
)
def test_training_equals_one_process(
    num_tasks: int, shape: tuple[int, int], name: str, options: Any, memory_format: Any
) -> None:
    parts, data = shape
    found = ranks.run(case_training, parts * data, num_tasks, data, name, options, memory_format)
    one = multitask(num_tasks, name, **options).to(torch.float32, memory_format=memory_format).double()
    head = sum(p.numel() for p in one.heads.parameters()) // num_tasks
    norms = train_one(one, adam(one), num_tasks, range(3), data)
    state = {key: tensor.clone() for key, tensor in one.state_dict().items()}
    predictions = one.eval()(batch(num_tasks, 9)[0])
    for its_norms, its_state, its_predictions, rows, size in found:
        torch.testing.assert_close(torch.stack(its_norms), torch.stack(norms), rtol=1e-9, atol=0)
        assert_same_state(its_state, state)
        for task, y in its_predictions.items():
            torch.testing.assert_close(y, predictions[task], rtol=1e-9, atol=1e-9)
        assert rows == {len(its_predictions)}
        assert size == len(its_predictions) * head
    names = [list(its_predictions) for _, _, its_predictions, _, _ in found][::data]
    assert [task for part in names for task in part] == task_names(num_tasks)


def case_exchange() -> tuple[list[int], ...]:
    """Values that the forward pass, a backward pass, one in no_sync, and one that another follows, exchange."""
    model = shard_tasks(multitask(3), mesh_of())
    images, upstream = batch(3, 0)
    sent: list[int] = []
    all_reduce = distributed.all_reduce

    def counted(tensor: Tensor, **options: Any) -> Any:
        sent.append(tensor.numel())
        return all_reduce(tensor, **options)

    counts = []
    with mock.patch.object(distributed, "all_reduce", counted):
        loss = loss_of(model(images), upstream)
        counts.append(list(sent))
        loss.backward()
        counts.append(list(sent))
        with no_sync(model):
            loss_of(model(images), upstream).backward()
        counts.append(list(sent))
        failing = images.clone().requires_grad_()
        failing.register_hook(lambda _: 1 / 0)
        loss = loss_of(model(failing), upstream)
        with pytest.raises(ZeroDivisionError):
            loss.backward()
        loss_of(model(images), upstream).backward()
        counts.append(list(sent))
    return tuple(counts)


def test_only_gradients_of_shared_weights_are_exchanged_and_at_once() -> None:
    shared = [p for p in pretrained("celeba").parameters() if p.dim() > 1]  # of convolutions and linear layers
    once = [sum(p.numel() for p in shared) + len(shared)]
    for forward, backward, unsynchronised, after_failure in ranks.run(case_exchange, 2):
        assert forward == []
        assert backward == unsynchronised == once
        assert after_failure == once + once


def case_freed() -> bool:
    model = shard_tasks(multitask(3), mesh_of())
    images, upstream = batch(3, 0)
    loss_of(model(images), upstream).backward()
    model, reference = None, weakref.ref(model)
    gc.collect()
    return reference() is None


def test_a_sharded_model_is_freed() -> None:
    assert all(ranks.run(case_freed, 2))


class Branches(nn.Module):
    """Two features, of which a head may take one; and a layer that no head takes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, dtype=torch.float64), nn.BatchNorm2d(4, dtype=torch.float64))
        self.fine, self.coarse, self.unused = (nn.Linear(4, 2, dtype=torch.float64) for _ in range(3))
        self.frozen = nn.Parameter(torch.ones((), dtype=torch.float64), requires_grad=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x).mean((2, 3)) * self.frozen
        return {"fine": self.fine(x), "coarse": self.coarse(x)}


class Pick(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.linear = nn.Linear(2, 1, dtype=torch.float64)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        y: Tensor = self.linear(features[self.name])
        return y


def branches() -> Any:
    torch.manual_seed(1)
    heads = {task: Pick(name) for task, name in zip(task_names(3), ("fine", "fine", "coarse"), strict=True)}
    return MultiTaskModel(convert_model(Branches(), 3, pretrained=False), heads)


def gathered_gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Of this rank's parameters; of those that are sharded the whole."""
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients.items()}


def case_gradients(synchronised: bool, data: int) -> None:
    """Two passes accumulated, with a step of no_sync or without, and then one for some of the tasks."""
    one, model, mesh = branches(), branches(), mesh_of(data)
    shard_tasks(model, mesh)
    part = mesh.get_local_rank("data") if data > 1 else 0
    for step in range(2):
        averaged_backward(one, [batch(3, step, p) for p in range(data)])
        images, upstream = batch(3, step, part)
        if step == 0 and not synchronised:
            with no_sync(model):
                loss_of(model(images), upstream).backward()
        else:
            loss_of(model(images), upstream).backward()
    own = ["task0", "task2"]
    for p in range(data):
        images, upstream = batch(3, 2, p)
        (loss_of(one(images, own), upstream) / data).backward()
        if p == part:
            loss_of(model(images, [task for task in own if task in model.heads]), upstream).backward()
    expected = {name: p.grad for name, p in one.named_parameters()}
    for name, gradient in gathered_gradients(model).items():
        wanted = expected[name]
        assert (gradient is None) == (wanted is None) == ("unused" in name or "frozen" in name), name
        if wanted is not None:
            torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("synchronised", "shape"), [(True, (2, 1)), (False, (2, 1)), (False, (2, 2))])
def test_accumulated_gradients_and_weights_that_some_ranks_do_not_use(
    synchronised: bool, shape: tuple[int, int]
) -> None:
    parts, data = shape
    ranks.run(case_gradients, parts * data, synchronised, data)


def case_backbone() -> None:
    """Streams of the tasks in, stacked sample-major; a layer that is called for some of the tasks."""
    T, N = 5, 3
    torch.manual_seed(1)
    one = convert_model(pretrained("celeba", torch.float64), T, stacking="sample_major")
    model = shard_tasks(copy.deepcopy(one), mesh_of())
    own = [range(3), range(3, 5)][distributed.get_rank()]
    x, upstream = torch.randn(N, T, 3, 32, 32).double(), torch.randn(N, T, 16).double()
    y, wanted = model(x[:, own].flatten(0, 1)), one(x.flatten(0, 1))
    torch.testing.assert_close(y, wanted.unflatten(0, (N, T))[:, own].flatten(0, 1), rtol=1e-9, atol=1e-9)
    (wanted * upstream.flatten(0, 1)).sum().backward()
    (y * upstream[:, own].flatten(0, 1)).sum().backward()
    for gradient, parameter in zip(gathered_gradients(model).values(), one.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-9)
    some, z = [own[1], own[0]], torch.randn(2 * N, 2, 4, 4).double()
    for task, stream in zip(some, z.unflatten(0, (N, 2)).unbind(1), strict=True):
        wanted = one[1](stream, tasks=[task])
        torch.testing.assert_close(model[1](stream, tasks=[task]), wanted, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(full_state_dict(model)["1.running_mean"][own], one[1].running_mean[own])


def test_a_backbone_takes_the_streams_of_its_tasks() -> None:
    ranks.run(case_backbone, 2)


def case_synchronised() -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    mesh = mesh_of(data=2)
    with pytest.raises(ValueError, match=r"over the ranks \[0, 1, 2, 3\], which have different tasks"):
        shard_tasks(convert_sync_batchnorm(multitask(5)), mesh)
    model = shard_tasks(convert_sync_batchnorm(multitask(5), mesh.get_group("data")), mesh)
    images, upstream = batch(5, 0, mesh.get_local_rank("data"))
    loss_of(model(images), upstream).backward()
    return full_state_dict(model), gathered_gradients(model)


def test_statistics_are_synchronised_over_the_data() -> None:
    """Equal to one process on the joined batch."""
    one = multitask(5)
    batches = [batch(5, 0, part) for part in range(2)]
    upstream = {task: torch.cat([part[task] for _, part in batches]) for task in batches[0][1]}
    loss_of(one(torch.cat([images for images, _ in batches])), upstream).backward()
    expected = {name: parameter.grad for name, parameter in one.named_parameters()}
    for state, gradients in ranks.run(case_synchronised, 4):
        assert_same_state(state, one.state_dict())
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-10)


# ---- states ------------------------------------------------------------------------------------------------------


def case_states() -> None:
    model = shard_tasks(multitask(3), mesh_of())
    other = multitask(3)
    train_one(other, adam(other), 3, range(1), 1)
    state = other.state_dict()
    model.load_state_dict(state)
    assert_same_state(full_state_dict(model), state, tolerance=0)
    images, _ = batch(3, 1)
    wanted = other(images)
    for task, y in model(images).items():
        torch.testing.assert_close(y, wanted[task], rtol=1e-9, atol=1e-9)

    plain = pretrained("celeba", torch.float64).state_dict()  # 1-d vectors: every task starts from them
    model.backbone.load_state_dict(plain)
    other.backbone.load_state_dict(plain)
    assert_same_state(full_state_dict(model), other.state_dict(), tolerance=0)

    copied = copy.deepcopy(model)
    layer = model.backbone[1]
    average: Any = swa_utils.AveragedModel(model, avg_fn=swa_utils.get_ema_avg_fn(0.5))
    for _ in range(2):
        train(copied, adam(copied), 3, range(1))
    train_one(other, adam(other), 3, range(1), 1)
    train_one(other, adam(other), 3, range(1), 1)
    assert_same_state(full_state_dict(copied), other.state_dict())
    for _ in range(2):
        average.update_parameters(copied)
    mean = (copied.backbone[1].weight + copied.backbone[1].weight) / 2  # the first update copies
    torch.testing.assert_close(average.module.backbone[1].weight.full_tensor(), mean.full_tensor())
    task = other.backbone[1].task(2)
    model.load_state_dict(other.state_dict())
    assert_same_state(layer.task(2).state_dict(), task.state_dict(), tolerance=0)


def test_states_come_from_one_process_and_go_back() -> None:
    ranks.run(case_states, 2)


def case_resume(path: str, before: int, steps: range, num_tasks: int, data: int) -> None:
    """Goes on from the checkpoint of ``before`` steps, and leaves one."""
    mesh = mesh_of(data)
    model = shard_tasks(multitask(num_tasks, variant="tsbn"), mesh)
    optimizer = adam(model)
    if before:
        for parameter in model.parameters():
            parameter.data.zero_()
        _load(path, before, model, optimizer)
    train(model, optimizer, num_tasks, steps, mesh.get_local_rank("data") if data > 1 else 0)
    checkpoint.save(_state(model, optimizer), checkpoint_id=f"{path}/{steps.stop}")


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer, options=FLAT)}


def _load(path: str, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    state = _state(model, optimizer)
    checkpoint.load(state, checkpoint_id=f"{path}/{step}", no_dist=not distributed.is_initialized())
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=FLAT)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoints_resume_on_another_number_of_ranks(tmp_path: Any) -> None:
    """2, 4, 2 x 2 and 4 ranks, and one process in the end."""
    T = 7
    one = multitask(T, variant="tsbn")
    optimizer = adam(one)
    shapes = [(2, 1), (4, 1), (2, 2), (4, 1)]
    for step, (parts, data) in enumerate(shapes):
        ranks.run(case_resume, parts * data, str(tmp_path), step, range(step, step + 1), T, data)
        train_one(one, optimizer, T, range(step, step + 1), data)
    last = multitask(T, variant="tsbn")
    resumed = adam(last)
    _load(str(tmp_path), len(shapes), last, resumed)
    assert_same_state(last.state_dict(), one.state_dict())
    for model, its in ((one, optimizer), (last, resumed)):
        train_one(model, its, T, range(9, 10), 1)
    assert_same_state(last.state_dict(), one.state_dict())


# ---- what goes wrong ---------------------------------------------------------------------------------------------


def case_errors() -> None:
    mesh, model = mesh_of(), multitask(3)
    shared_head = MultiTaskModel(model.backbone, dict.fromkeys(task_names(3), nn.Linear(16, 1)))
    with pytest.raises(ValueError, match=r"'task0' and 'task2' share parameters, and are of different ranks"):
        shard_tasks(shared_head, mesh)
    with pytest.raises(ValueError, match=r"a dimension 'tasks', got 'data'"):
        shard_tasks(model, init_device_mesh("cpu", (2,), mesh_dim_names=("data",)))
    with pytest.raises(ValueError, match=r"a dimension 'tasks', got no names"):
        shard_tasks(model, init_device_mesh("cpu", (2,)))
    with pytest.raises(ValueError, match=r"1 tasks, in parts of 1, occupy 1 of the 2 ranks"):
        shard_tasks(multitask(1), mesh)
    with pytest.raises(ValueError, match=r"Sequential has no task-specific layer"):
        shard_tasks(nn.Sequential(nn.Linear(1, 1)), mesh)
    with pytest.raises(ValueError, match=r"got 3 of '0' and 2 of '1'"):
        shard_tasks(nn.Sequential(FusedTSigmaBN2d(3, 4), FusedTSigmaBN2d(2, 4)), mesh)
    with pytest.raises(ValueError, match=r"has a MultiTaskModel inside"):
        shard_tasks(nn.Sequential(model), mesh)
    with pytest.raises(TypeError, match=r"'0' is a LateFanOut"):
        shard_tasks(nn.Sequential(LateFanOut(3, 4)), mesh)
    with pytest.raises(ValueError, match=r"that is not sharded"), no_sync(model):
        pass
    shard_tasks(model, mesh)
    with pytest.raises(ValueError, match=r"'backbone.1' is sharded already"):
        shard_tasks(model, mesh)
    with pytest.raises(ValueError, match=r"'backbone.1' is sharded; add and remove tasks before shard_tasks"):
        add_task(model, "task3", like="task0")
    whole = model.backbone[1].weight.full_tensor()
    expanded = expand_state_dict(model, {"backbone.1.weight": torch.full((2, whole.shape[1]), 5.0)}, tasks=[2, 0])
    assert torch.equal(expanded["backbone.1.weight"][1], whole[1])
    assert (expanded["backbone.1.weight"][::2] == 5).all()
    images, _ = batch(3, 0)
    other, own = [("task2", [0, 1]), ("task0", [2])][distributed.get_rank()]
    with pytest.raises(ValueError, match=f"{other} runs on other ranks; this one has {', '.join(model.heads)}"):
        model(images, tasks=[other])
    with pytest.raises(ValueError, match=rf"this rank has the tasks {re.escape(str(own))}"):
        model.backbone[1](torch.randn(2, 2, 4, 4), tasks=[int(other[-1])])
    with pytest.raises(ValueError, match=r"multiple of|must be|divisible"):
        FusedTSigmaBN2d(3, 2)(torch.randn(2, 2, 4, 4))
    fsdp = multitask(3)
    fully_shard(fsdp.backbone[1], mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(ValueError, match=r"'backbone.1' is sharded already"):
        shard_tasks(fsdp, mesh)
    with pytest.raises(ValueError, match=r"the tasks of the model are sharded; load its full_state_dict"):
        export_task(model, "task0")
    model.load_state_dict(multitask(3).state_dict(), assign=True)
    both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("tasks", "data"))
    wrapped: Any = fully_shard(shard_tasks(multitask(3), both["tasks"]), mesh=both["data"])
    for replaced in (model, wrapped):
        with pytest.raises(RuntimeError, match=r"parameter 'backbone.0.weight' was replaced after shard_tasks"):
            replaced(images)


def test_errors() -> None:
    ranks.run(case_errors, 2)


def case_idle() -> None:
    with pytest.raises(ValueError, match=r"5 tasks, in parts of 2, occupy 3 of the 4 ranks along 'tasks'"):
        shard_tasks(multitask(5), mesh_of())


def test_no_rank_is_left_without_a_task() -> None:
    ranks.run(case_idle, 4)


def case_death(how: str) -> None:
    model = shard_tasks(multitask(3), mesh_of())
    optimizer = adam(model)
    train(model, optimizer, 3, range(2))
    if distributed.get_rank() == 1:
        if how == "dies":
            os._exit(7)
        time.sleep(3)
    train(model, optimizer, 3, range(1))


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_rank_that_is_lost_is_an_error_on_the_others(how: str) -> None:
    with pytest.raises(AssertionError) as error:
        ranks.run(case_death, 2, how, timeout=2 if how == "hangs" else 60)
    text = str(error.value)
    assert re.search(r"rank 0: (?s:.*)RuntimeError: .*(closed|reset|[Tt]imed out)", text)
    assert ("rank 1: died with exit status 7" in text) == (how == "dies")


def test_the_package_loads_no_part_of_torch_distributed() -> None:
    program = "import sys, torch; before = set(sys.modules); import tsbn_kernels; print(*set(sys.modules) - before)"
    assert "torch.distributed" not in python_output(program)
