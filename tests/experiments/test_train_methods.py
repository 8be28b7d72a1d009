"""The networks of the methods: sizes, single-task networks that share nothing, and the optimiser's groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.network.model import CELEBA, CelebaNetwork, Layout, loss_of
from experiments.forty_tasks.methods import METHODS, SingleTasks, gates, plain_norm
from experiments.forty_tasks.step_cost import NETWORKS
from experiments.forty_tasks.train_run import optimizer_of

TINY = Layout(2, (2, 3, 2, 3, 2, 3, 4))


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_parameter_counts_of_the_paper():
    found = {}
    with torch.device("meta"):
        for name, make in NETWORKS.items():
            found[name] = parameters(make(40, CELEBA))
    assert found == {
        "single_task": 207_086_120,
        "hard_sharing": 5_197_160,
        "tsbn": 5_421_800,
        "ts_sigma_bn": 5_306_600,
        "loop": 5_306_600,
    }


def copy_task(ours: SingleTasks, single: CelebaNetwork, task: int) -> None:
    """The weights of one task into a network of its own."""
    with torch.no_grad():
        for mine, its in zip(ours.convolutions, single.convolutions, strict=True):
            its.weight.copy_(mine.weight.unflatten(0, (ours.tasks, -1))[task])
        for mine, its in zip(ours.linears, single.linears, strict=True):
            its.weight.copy_(mine[task].T)
        for mine, its in zip(ours.norms, single.norms, strict=True):
            its.weight.copy_(mine.weight.unflatten(0, (ours.tasks, -1))[task])
            its.bias.copy_(mine.bias.unflatten(0, (ours.tasks, -1))[task])
        single.head_weight.copy_(ours.head_weight[task : task + 1])
        single.head_bias.copy_(ours.head_bias[task : task + 1])


def test_single_tasks_are_networks_of_their_own():
    tasks = 3
    ours = SingleTasks(tasks, TINY).double()
    for norm in ours.norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    images, labels = torch.rand(5, 2, 16, 16).double(), torch.randint(2, (5, tasks)).double()
    loss_of(ours, images, labels).backward()
    logits = ours(images)
    assert logits.shape == (tasks, 5)
    for task in range(tasks):
        single = CelebaNetwork(1, plain_norm, 1, layout=TINY).double()
        copy_task(ours, single, task)
        loss_of(single, images, labels[:, task : task + 1]).backward()
        torch.testing.assert_close(single(images)[0], logits[task])
        gradient = ours.convolutions[1].weight.grad.unflatten(0, (tasks, -1))[task]
        torch.testing.assert_close(gradient, single.convolutions[1].weight.grad)


def test_single_tasks_start_as_such_networks_do():
    torch.manual_seed(0)
    ours, single = SingleTasks(40, CELEBA), CelebaNetwork(1, plain_norm, 1)
    for mine, its in zip(ours.convolutions, single.convolutions, strict=True):
        assert mine.weight.std().item() == pytest.approx(its.weight.std().item(), rel=0.05)
    for mine, its in zip(ours.linears, single.linears, strict=True):
        assert mine.std().item() == pytest.approx(its.weight.std().item(), rel=0.05)


def test_fused_and_loop_compute_the_same():
    networks = [NETWORKS[name](3, TINY).double() for name in ("ts_sigma_bn", "loop")]
    fused, loop = networks
    loop.load_state_dict({k: v for k, v in fused.state_dict().items() if not k.startswith("norms")}, strict=False)
    images = torch.rand(5, 2, 16, 16).double()
    torch.testing.assert_close(fused(images), loop(images))


def test_gates_start_at_one_half_or_one():
    features = sum(TINY.channels) + 2 * TINY.features
    assert gates(METHODS["ts_sigma_bn"](3, TINY)).equal(torch.full((3, features), 0.5))
    assert gates(METHODS["tsbn"](3, TINY)).equal(torch.ones(3, features))
    assert gates(METHODS["hard_sharing"](3, TINY)) is None and gates(METHODS["single_task"](3, TINY)) is None


@pytest.mark.parametrize("name", list(METHODS))
def test_the_multiplier_is_of_task_specific_weights_alone(name):
    network = METHODS[name](3, TINY)
    groups = {group["name"]: group for group in optimizer_of(network, 0.01, 7.0).param_groups}
    assert groups["base"]["lr"] == 0.01
    if name in ("tsbn", "ts_sigma_bn"):
        assert groups["gates"]["lr"] == pytest.approx(0.07)
        assert {id(p) for p in groups["gates"]["params"]} == {id(norm.weight) for norm in network.norms}
    else:
        assert list(groups) == ["base"]
    assert sum(p.numel() for group in groups.values() for p in group["params"]) == parameters(network)
