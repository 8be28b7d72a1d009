"""The networks of the methods: sizes, single-task networks that share nothing, and the optimiser's groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.network.model import CELEBA, CelebaNetwork, Layout, loss_of
from experiments.forty_tasks.convolutional import SingleTasks, plain_norm
from experiments.forty_tasks.methods import LOOP, gates, make_network, methods_of, sizes
from experiments.forty_tasks.staged import MtanConvolutional, PlainBackbone
from experiments.forty_tasks.step_cost import measured_step
from experiments.forty_tasks.transformer import TransformerLayout
from experiments.training.methods import TASK_SPECIFIC
from experiments.training.run import optimizer_of

TINY = Layout(2, (2, 3, 2, 3, 2, 3, 4))
PATCHES = TransformerLayout(inputs=2, patch=4, tokens=16, width=6, heads=2, depth=2)
LETTERS = TransformerLayout(inputs=9, patch=0, tokens=5, width=6, heads=2, depth=1)
LAYOUTS = {"convolutional": TINY, "patches": PATCHES, "letters": LETTERS}
EACH = [(name, method) for name, layout in LAYOUTS.items() for method in methods_of(layout)]


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_parameters_and_operations_of_the_paper():
    sample = torch.empty(3, 64, 64)
    single = sizes(["hard_sharing"], 1, CELEBA, sample)["hard_sharing"]
    found = sizes(methods_of(CELEBA), 40, CELEBA, sample)
    assert {name: size.parameters for name, size in found.items()} == {
        "single_task": 207_086_120,
        "hard_sharing": 5_197_160,
        "cross_stitch": 207_086_120 + 3 * 40 * 40,  # its units
        # The backbone and what hands on are shared; masks and a head are of each task.
        "mtan": 5_176_640 + 3_836_416 + 40 * (1_810_688 + 513),
        "tsbn": 5_421_800,
        "ts_sigma_bn": 5_306_600,
    }
    assert {name: size.relative(single) for name, size in found.items()} == {
        "single_task": ("40.00", "40.00"),
        "hard_sharing": ("1.00", "1.00"),
        "cross_stitch": ("40.00", "40.12"),
        "mtan": ("15.73", "52.81"),
        "tsbn": ("1.05", "39.60"),  # the first convolution runs once
        "ts_sigma_bn": ("1.03", "39.60"),
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


def test_the_plain_backbone_is_the_network_without_its_heads():
    network, backbone = CelebaNetwork(1, plain_norm, 1, layout=TINY).double(), PlainBackbone(TINY).double()
    theirs = [*network.convolutions, *network.linears]
    ours = [module for module in backbone.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for mine, its in zip(ours, theirs, strict=True):
        mine.load_state_dict(its.state_dict())
    images = torch.rand(5, 2, 16, 16).double()
    logits = backbone(images) @ network.head_weight[0] + network.head_bias
    torch.testing.assert_close(logits.T, network(images))


@pytest.mark.parametrize("method", ["cross_stitch", "mtan"])
def test_nothing_is_made_that_is_not_used(method):
    network = make_network(method, 3, TINY)
    logits = network(torch.rand(5, 2, 16, 16))
    (logits * torch.randn(3, 5)).sum().backward()
    assert not [name for name, parameter in network.named_parameters() if parameter.grad is None]


def test_an_open_mask_lets_the_last_features_pass():
    torch.manual_seed(0)
    network = MtanConvolutional(PlainBackbone(TINY), 3).double()
    last = network.masks_of("task1")[-1]
    nn.init.zeros_(last[4].weight)
    nn.init.constant_(last[4].bias, 50.0)  # a sigmoid of one
    images = torch.rand(5, 2, 16, 16).double()
    features, found = network.backbone(images), network(images)
    torch.testing.assert_close(found["task1"], network.heads["task1"](features))
    assert not found["task2"].allclose(network.heads["task2"](features))


def samples(layout: Layout | TransformerLayout, count: int = 5) -> torch.Tensor:
    """Images of 16x16, or words."""
    return torch.randint(9, (count, 5)) if layout is LETTERS else torch.rand(count, 2, 16, 16).double()


def loop_of(fused: nn.Module, method: str, layout: Layout | TransformerLayout) -> nn.Module:
    """The loop with the weights of the fused network, whose gates are now random."""
    loop = make_network(LOOP, 3, layout).double()
    norms = {name: module for name, module in fused.named_modules() if hasattr(module, "gates")}
    for module in norms.values():
        nn.init.normal_(module.weight)
    state = {}
    for name, tensor in fused.state_dict().items():
        path, _, end = name.rpartition(".")
        if path not in norms:
            state[name] = tensor
        elif end == "weight":
            inside = f"{path}.norms" if layout is TINY else path
            state |= {f"{inside}.{task}.weight": row for task, row in enumerate(tensor)}
    missing, unexpected = loop.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("running" in name or "tracked" in name for name in missing)
    return loop


@pytest.mark.parametrize(
    ("name", "method"), [("convolutional", "ts_sigma_bn"), ("patches", "ts_sigma_ln"), ("letters", "ts_sigma_ln")]
)
def test_fused_and_loop_compute_the_same(name, method):
    layout = LAYOUTS[name]
    fused = make_network(method, 3, layout).double()
    loop = loop_of(fused, method, layout)
    inputs, upstream = samples(layout), torch.randn(3, 5).double()
    outputs = [network(inputs) for network in (fused, loop)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        (output * upstream).sum().backward()
    theirs = dict(loop.named_parameters())
    ours = {name: p.grad for name, p in fused.named_parameters() if name in theirs}
    assert len(ours) > 5
    for parameter, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[parameter].grad)


@pytest.mark.parametrize("layout", [PATCHES, LETTERS])
def test_methods_of_a_transformer_start_alike(layout):
    found = {}
    for method in methods_of(layout):
        torch.manual_seed(0)
        found[method] = dict(make_network(method, 3, layout).named_parameters())
    for method, own in found.items():
        for name, parameter in found["hard_sharing"].items():
            if "norm" not in name:
                assert own[name].equal(parameter), f"{method}: {name}"


@pytest.mark.parametrize(("name", "method"), EACH)
def test_gates_start_at_one_half_or_one(name, method):
    layout = LAYOUTS[name]
    found = gates(make_network(method, 3, layout))
    if method not in TASK_SPECIFIC:
        assert found is None
        return
    features = {"convolutional": sum(TINY.channels) + 2 * TINY.features, "patches": 6 * 6, "letters": 4 * 6}[name]
    assert found.equal(torch.full((3, features), 0.5 if "sigma" in method else 1.0))


@pytest.mark.parametrize(("name", "method"), EACH)
def test_the_multiplier_is_of_task_specific_weights_alone(name, method):
    network = make_network(method, 3, LAYOUTS[name])
    base, *others = optimizer_of(network, 0.01, 7.0).param_groups
    assert (base["name"], base["lr"]) == ("base", 0.01)
    specific = {id(module.weight) for module in network.modules() if hasattr(module, "gates")}
    assert {id(p) for group in others for p in group["params"]} == specific
    assert bool(specific) == (method in TASK_SPECIFIC) == (len(others) == 1)
    assert [group["lr"] for group in others] == pytest.approx([0.07] * len(others))
    assert sum(p.numel() for group in (base, *others) for p in group["params"]) == parameters(network)


@pytest.mark.parametrize("method", [*methods_of(LETTERS), LOOP])
def test_what_a_step_on_words_costs_can_be_measured(method):
    step, count = measured_step(
        method, LETTERS, samples(LETTERS).numpy(), np.zeros((5, 3), np.float32), torch.device("cpu")
    )
    first = step()
    assert step() < first
    assert count == parameters(make_network(method, 3, LETTERS))


@pytest.mark.parametrize("layout", [PATCHES, LETTERS])
def test_streams_part_at_the_norm_of_the_embedding(layout):
    network = make_network("ts_sigma_ln", 3, layout).double()
    rows = {}
    for name in ("embedding", "embedding_norm", "blocks"):
        module = network.backbone.get_submodule(name)
        module.register_forward_hook(lambda _m, args, y, name=name: rows.update({name: (len(args[0]), len(y))}))
    assert network(samples(layout)).shape == (3, 5)
    assert rows == {"embedding": (5, 5), "embedding_norm": (5, 15), "blocks": (15, 15)}
