"""Mixed batches on several processes, each with a mix of its own: equal to one process with the joined batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import ranks
from support.tolerances import assert_same_bits
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from tsbn_kernels import (
    FusedTSigmaBN1d,
    FusedTSigmaBN2d,
    FusedTSigmaLN,
    hold_absent_tasks,
    recompute_outputs,
    shard_tasks,
    task_index,
    use_backend,
)

T, C = 4, 5
# The tasks of each rank's samples. Task 1 is on one rank alone, task 3 on none until the end; a rank may have nothing.
MIXES: tuple[tuple[list[int], ...], ...] = (
    ([2, 0, 2, 2], [0, 2, 0, 1, 1], [2]),
    ([0], [], [2, 2, 0]),
    ([], [], []),
    ([3, 3, 3], [3], [0, 1]),
)
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "activation and residual": {"activation": "silu", "residual": True, "bias": True},
    "identity gate, frozen bias": {"gate": "identity", "bias": "frozen", "activation": "relu"},
    "cumulative average, residual alone": {"momentum": None, "residual": True, "bias": True},
}


def joined_index(mix: tuple[list[int], ...]) -> Tensor:
    return torch.tensor([task for part in mix for task in part], dtype=torch.int64)


def case_steps(dtype: torch.dtype, backend: str | None, options: dict[str, Any]) -> Tensor:
    """Trains a layer on a rank's part beside one on the joined batch; returns the statistics."""
    options = dict(options)
    residual = options.pop("residual", False)
    layer = FusedTSigmaBN2d(T, C, process_group="world", **options).to(dtype)
    nn.init.normal_(layer.weight)
    whole = copy.deepcopy(layer).double()
    whole.process_group = None
    rank, more = distributed.get_rank(), residual + 1
    for mix in MIXES:
        index = joined_index(mix)
        mine = index.split([len(part) for part in mix])[rank]
        tensors = torch.randn(more + 1, len(index), C, 3, 2, dtype=torch.float64) + 2
        parts = [tensor.split([len(part) for part in mix])[rank].to(dtype) for tensor in tensors]
        results = []
        for module, own, (dy, *inputs) in ((layer, mine, parts), (whole, index, tensors)):
            leaves = [tensor.clone().requires_grad_() for tensor in inputs]
            module.zero_grad()
            with use_backend(backend if module is layer else "reference") if backend else recompute_outputs():
                y = module(*leaves, task_of_sample=own)
                y.backward(dy)
            results.append([y.detach(), *(leaf.grad for leaf in leaves)])
        tolerance: Any = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
        for got, joined in zip(*results, strict=True):
            wanted = joined.split([len(part) for part in mix])[rank]
            torch.testing.assert_close(got.double(), wanted, **tolerance)
        for parameter, joined in zip(layer.parameters(), whole.parameters(), strict=True):
            assert parameter.grad is not None
            distributed.all_reduce(parameter.grad)
            torch.testing.assert_close(parameter.grad.double(), joined.grad, rtol=2e-5, atol=2e-4)
        for buffer, wanted in zip(layer.buffers(), whole.buffers(), strict=True):
            torch.testing.assert_close(buffer.to(wanted.dtype), wanted, **tolerance)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return torch.stack((layer.running_mean, layer.running_var))


@pytest.mark.parametrize(
    ("dtype", "backend", "options"),
    [
        *((torch.float64, None, options) for options in LAYERS.values()),
        (torch.float64, "reference", LAYERS["activation and residual"]),
        (torch.float32, None, LAYERS["activation and residual"]),
    ],
    ids=[*LAYERS, "reference", "float32"],
)
def test_equals_one_process_on_the_joined_batch(
    dtype: torch.dtype, backend: str | None, options: dict[str, Any]
) -> None:
    """Outputs, all gradients and running statistics, which have the same bits on all ranks."""
    first, *others = ranks.run(case_steps, 3, dtype, backend, options)
    for other in others:
        assert_same_bits(other, first)


def case_collectives() -> list[int]:
    layer = FusedTSigmaBN2d(T, C, process_group="world")
    x = torch.randn(3, C, 3, 3, requires_grad=True)
    found = []
    with profile(activities=[ProfilerActivity.CPU]) as forward:
        y = layer(x, task_of_sample=torch.tensor([0, 1, 1]))
    with profile(activities=[ProfilerActivity.CPU]) as backward:
        y.backward(torch.randn_like(y))
    for done in (forward, backward):
        found.append(sum(event.count for event in done.key_averages() if event.key.startswith("c10d::")))
    layer.eval()
    with profile(activities=[ProfilerActivity.CPU]) as evaluation:
        layer(x, task_of_sample=torch.tensor([0, 1, 1]))
    return [*found, sum(event.count for event in evaluation.key_averages() if event.key.startswith("c10d::"))]


def test_one_collective_each_way_and_none_in_evaluation() -> None:
    assert ranks.run(case_collectives, 2) == [[1, 1, 0]] * 2


def case_single(lonely: bool) -> None:
    """A task with one value on each of two ranks has two values; with one on a rank alone, the error is everywhere."""
    layer = FusedTSigmaBN1d(T, C, process_group="world")
    rank = distributed.get_rank()
    index = torch.tensor([[0, 1], [0, 2 if lonely else 1]][rank])
    x = torch.randn(2, C)
    if not lonely:
        layer(x, task_of_sample=index)
        return
    with pytest.raises(ValueError, match=r"more than 1 value per task and channel .* one sample of task 1, 2"):
        layer(x, task_of_sample=index)
    assert layer.num_batches_tracked is not None
    assert not layer.num_batches_tracked.any()
    layer.evaluate_single = True
    y = layer(x, task_of_sample=index)
    assert layer.num_batches_tracked.tolist() == [1, 0, 0, 0]
    torch.testing.assert_close(y[1], layer.task(int(index[1])).eval()(x)[1])


@pytest.mark.parametrize("lonely", [False, True])
def test_one_value_on_a_rank(lonely: bool) -> None:
    ranks.run(case_single, 2, lonely)


def case_training() -> tuple[list[Tensor], list[Tensor]]:
    """DDP with a mix on each rank, its absent tasks held, beside one process; the loss is the mean over all samples."""
    torch.manual_seed(0)
    layer = FusedTSigmaBN2d(T, C, gate="identity", bias=True, process_group="world")
    model: Any = nn.Sequential(nn.Conv2d(3, C, 3), layer, nn.Flatten(), nn.Linear(C * 9, 1)).double()
    alone = copy.deepcopy(model)
    alone[1].process_group = None
    parallel = DistributedDataParallel(model)
    steps = [torch.optim.Adam(one.parameters(), lr=0.1, weight_decay=0.1) for one in (model, alone)]
    hold_absent_tasks(steps[0], parallel)
    hold_absent_tasks(steps[1], alone)
    rank = distributed.get_rank()
    for mix in (([2, 0, 2], [0, 2, 1, 1]), ([0], [0, 2]), ([1, 1], [])):
        index = joined_index(mix)
        x, dy = torch.randn(len(index), 3, 5, 5).double(), torch.randn(len(index), 1).double()
        sizes = [len(part) for part in mix]
        for one in steps:
            one.zero_grad()
        with task_index(index.split(sizes)[rank]):
            (2 * parallel(x.split(sizes)[rank]) * dy.split(sizes)[rank]).sum().backward()  # DDP averages
        with task_index(index):
            (alone(x) * dy).sum().backward()
        for one in steps:
            one.step()
    return [list(one.state_dict().values()) for one in (model, alone)]  # type: ignore[return-value]


def test_training_equals_one_process() -> None:
    for got, expected in ranks.run(case_training, 2):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


class Rows(nn.Module):
    """A layer of samples, and one of several rows of each."""

    def __init__(self) -> None:
        super().__init__()
        self.of_samples, self.of_rows = FusedTSigmaBN2d(T, C, bias=True), FusedTSigmaLN(T, 3, bias=True)
        self.shared = nn.Conv2d(C, C, 1)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.of_rows(self.of_samples(self.shared(x)).flatten(0, 2))  # type: ignore[no-any-return]


def case_sharded_and_repeated(reentrant: bool) -> None:
    """A rank has samples of its own tasks; what a checkpoint repeats gets the index of all tasks, which they shift."""
    model, whole = (Rows().double() for _ in range(2))
    whole.load_state_dict(model.state_dict())
    shard_tasks(model, init_device_mesh("cpu", (2,), mesh_dim_names=("tasks",)))
    index = torch.tensor([2, 0, 3, 1, 1, 2, 0, 3])
    mine = (index // 2 == distributed.get_rank()).nonzero().flatten()
    x, dy = torch.randn(8, C, 2, 3).double(), torch.randn(8 * C * 2, 3).double()
    found = []
    for module, rows in ((model, mine), (whole, torch.arange(8))):
        own = x[rows].requires_grad_()
        with task_index(index[rows]):
            y = checkpoint(module, own, use_reentrant=reentrant) if module is model else module(own)
        y.backward(dy.unflatten(0, (8, -1))[rows].flatten(0, 1))  # the context has ended
        gradients = [parameter.grad for parameter in module.parameters()]
        dx = own.grad if module is model else own.grad[mine]  # type: ignore[index]
        found.append([dx, *(getattr(one, "full_tensor", lambda one=one: one)() for one in gradients)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_of_sharded_layers_of_samples_and_rows(reentrant: bool) -> None:
    ranks.run(case_sharded_and_repeated, 2, reentrant)
