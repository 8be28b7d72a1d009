"""Pruned networks against those whose filters are closed, of which each test closes the same ones by hand."""

from __future__ import annotations

import copy
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.folding import TASKS, T, randomise
from support.networks import NETWORKS, look_trained, pretrained
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.network.model import Layout, loss_of, task_specific_network
from tsbn_kernels import FusedTSigmaBN1d, FusedTSigmaBN2d, FusedTSigmaBN3d, MultiTaskModel, convert_model, prune
from tsbn_kernels.layers.task_specific import TaskSpecific

CLOSED, MOST = 4, 12  # a part of the filters of each layer: one of so many, and no more than these
NARROW = Layout(1, (8, 8, 16, 8, 16, 8, 16))


@pytest.fixture(autouse=True)
def _torch_pruning(request: pytest.FixtureRequest) -> None:
    if "without" not in request.node.name:
        pytest.importorskip("torch_pruning")


def closed(width: int, most: int = MOST) -> int:
    return min(width // CLOSED, most)


def close(model: nn.Module, most: int = MOST, bias: float = 0.0) -> Any:
    """Closes the first filters of every layer, so that those which are joined are closed together."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, _BatchNorm):
                count = closed(layer.weight.shape[-1], most)
                layer.weight[..., :count] = -1e4 if getattr(layer, "gate", "") == "sigmoid" else 0.0
                if layer.bias is not None:
                    layer.bias[..., :count] = bias
    return model


def pruned_with(model: nn.Module, *arguments: Any, **options: Any) -> tuple[Any, str]:
    """The pruned network, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = prune(model, *arguments, **options)
    return result, "; ".join(str(one.message) for one in caught if one.category is UserWarning)


def widths(model: nn.Module) -> list[int]:
    return [layer.num_features for layer in model.modules() if isinstance(layer, _BatchNorm)]


def assert_same(model: Any, smaller: Any, *x: Tensor) -> None:
    with torch.no_grad():
        expected, actual = model(*x), smaller(*x)
    if isinstance(expected, dict):
        expected, actual = torch.cat(list(expected.values())), torch.cat(list(actual.values()))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def vgg(models: Any) -> nn.Module:
    """Without the 100 million weights of its classifier."""
    features = models.vgg.make_layers([16, "M", 24, "M", 8], batch_norm=True)
    return nn.Sequential(
        features, nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(8 * 49, 20), nn.ReLU(), nn.Linear(20, 5)
    )


TORCHVISION: dict[str, Callable[[Any], nn.Module]] = {
    "resnet18": lambda models: models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1]),
    "resnet50": lambda models: models.ResNet(models.resnet.Bottleneck, [1, 2, 1, 1]),
    "vgg": vgg,
    "densenet": lambda models: models.DenseNet(8, (2, 2), 16, 2),
    "mobilenet_v2": lambda models: models.mobilenet_v2(width_mult=0.25),
    "mobilenet_v3": lambda models: models.mobilenet_v3_small(width_mult=0.5),
}


@pytest.mark.parametrize(("name", "variant"), [*((name, "ts_sigma_bn") for name in TORCHVISION), ("resnet18", "tsbn")])
def test_torchvision(name: str, variant: Any) -> None:
    models = pytest.importorskip("torchvision").models
    network = look_trained(TORCHVISION[name](models))
    most = 4 if name == "densenet" else MOST  # for what is concatenated, to be the same filters everywhere
    model = close(convert_model(network, 2, variant=variant).eval(), most)
    x = torch.randn(2, 3, 64, 64)
    smaller, warning = pruned_with(model, x, threshold=1e-6)
    assert not warning
    assert widths(smaller) == [full - closed(full, most) for full in widths(model)]
    assert_same(model, smaller, x)


@pytest.mark.parametrize("name", ["resnet18", "bottleneck", "celeba", "segnet"])
def test_own_networks_train_on_alike(name: str) -> None:
    """Outputs, gradients, running statistics and modes are those of the closed network."""
    model = close(convert_model(pretrained(name, torch.float64), T)).train()
    parameter = next(model.parameters()).requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(4 * T, 3, 32, 32, dtype=torch.float64)
    smaller, _ = pruned_with(model, x, threshold=1e-6, min_filters=1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not parameter.requires_grad and not next(smaller.parameters()).requires_grad
    assert [p.requires_grad for p in smaller.parameters()] == [p.requires_grad for p in model.parameters()]
    assert all(module.training for module in smaller.modules())
    assert sum(widths(smaller)) < sum(widths(model))
    y, less = model(x), smaller(x)
    torch.testing.assert_close(less, y)
    dy = torch.randn_like(y)
    y.backward(dy)
    less.backward(dy)
    for (key, full), part in zip(model.named_parameters(), smaller.parameters(), strict=True):
        if full.requires_grad and full.shape == part.shape:
            torch.testing.assert_close(part.grad, full.grad, msg=key)
        elif full.requires_grad and isinstance(model.get_submodule(key.rpartition(".")[0]), TaskSpecific):
            torch.testing.assert_close(part.grad, full.grad[:, -part.shape[1] :], msg=key)  # the last ones stay
    for key, mean in smaller.state_dict().items():
        if key.endswith("running_mean"):
            torch.testing.assert_close(mean, model.state_dict()[key][:, -mean.shape[1] :])


@pytest.mark.parametrize("variant", ["fused", "and fan-out"])
def test_the_celeba_network(variant: str) -> None:
    model = close(randomise(task_specific_network(variant, T, layout=NARROW)))
    x = torch.randn(2, 1, 28, 28)
    smaller, warning = pruned_with(model, x, threshold=1e-6)
    assert "'norms.8': the" in warning and warning.count("norms") == 1  # its features are multiplied by a parameter
    assert widths(smaller) == [n - closed(n) for n in widths(model)[:-1]] + [16]
    assert_same(model, smaller, x)
    loss_of(smaller.train(), x, torch.ones(2, T)).backward()


def test_a_multi_task_model_in_channels_last_is_pruned_twice() -> None:
    heads = {name: nn.Linear(32, 2) for name in TASKS}
    model = close(randomise(MultiTaskModel(convert_model(NETWORKS["resnet18"](), T), heads)))
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 32)
    smaller, warning = pruned_with(model, x, threshold=1e-6)
    assert not warning
    assert_same(model, smaller, x)
    assert smaller.heads["hat"].in_features == 24
    assert smaller.backbone.stages[1][0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    smallest, _ = pruned_with(smaller, x, amount=0.3)
    assert sum(widths(smallest)) < 0.9 * sum(widths(smaller))
    assert all(y.shape == (2, 2) for y in smallest(x).values())


def chain(*gates: list[list[float]]) -> nn.Sequential:
    """Convolutions with gates ``[T, C]`` of given values."""
    layers: list[nn.Module] = []
    inputs = 3
    for values in gates:
        layer = FusedTSigmaBN2d(len(values), len(values[0]), activation="relu")
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(values).logit())
        layers += [nn.Conv2d(inputs, len(values[0]), 3, padding=1), layer]
        inputs = len(values[0])
    return nn.Sequential(*layers, nn.Conv2d(inputs, 2, 1)).eval()


FIRST = [[0.1, 0.9, 0.2, 0.3, 0.8, 0.05], [0.7, 0.1, 0.1, 0.2, 0.3, 0.04]]  # 0.7 0.9 0.2 0.3 0.8 0.05
SECOND = [[0.5, 0.45, 0.6, 0.15], [0.4, 0.1, 0.2, 0.1]]  # 0.5 0.45 0.6 0.15


@pytest.mark.parametrize(
    ("options", "first", "second"),
    [
        ({"threshold": 0.25}, [0.7, 0.9, 0.3, 0.8], [0.5, 0.45, 0.6]),
        ({"threshold": 1.0}, [0.7, 0.9, 0.8], [0.5, 0.45, 0.6]),
        ({"threshold": 1.0, "min_filters": 1}, [0.9], [0.6]),
        ({"threshold": 0.01}, [0.7, 0.9, 0.2, 0.3, 0.8, 0.05], [0.5, 0.45, 0.6, 0.15]),
        ({"amount": 0.4}, [0.7, 0.9, 0.8], [0.5, 0.45, 0.6]),
        ({"amount": 0.5, "min_filters": 1}, [0.7, 0.9, 0.8], [0.5, 0.6]),
        ({"amount": 0.5, "scope": "layer"}, [0.7, 0.9, 0.8], [0.5, 0.45, 0.6]),
        ({"amount": 0.5, "scope": "layer", "min_filters": 1}, [0.7, 0.9, 0.8], [0.5, 0.6]),
        ({"amount": 0.0}, [0.7, 0.9, 0.2, 0.3, 0.8, 0.05], [0.5, 0.45, 0.6, 0.15]),
    ],
)
def test_which_filters_go(options: dict[str, Any], first: list[float], second: list[float]) -> None:
    smaller = prune(chain(FIRST, SECOND), torch.randn(2, 3, 8, 8), **options)
    for index, left in ((1, first), (3, second)):
        torch.testing.assert_close(smaller[index].gates.amax(0), torch.tensor(left))
    assert smaller[4].in_channels == len(second) and smaller[2].weight.shape[:2] == (len(second), len(first))


def test_a_constant_that_would_stay_behind_keeps_its_filter() -> None:
    model = close(nn.Sequential(nn.Conv2d(3, 8, 3), FusedTSigmaBN2d(2, 8), nn.Sigmoid(), nn.Conv2d(8, 2, 1)))
    smaller, warning = pruned_with(model, torch.randn(2, 3, 8, 8), threshold=1e-6)
    assert widths(smaller) == [8] and "'1': closed, they still give something" in warning


class Between(nn.Module):
    """A block of convolution and normalisation, then what a user has written, then another block and an end."""

    def __init__(self, between: Callable[[Tensor], Tensor], channels: int = 8, **more: Any) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), FusedTSigmaBN2d(2, 8, activation="relu")
        self.conv2, self.norm2 = nn.Conv2d(channels, 8, 3, padding=1), FusedTSigmaBN2d(2, 8, activation="relu")
        self.out = nn.Conv2d(8, 2, 1)
        self.between = between
        for name, module in more.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        y = self.between(self.norm(self.conv(x)))
        return self.out(self.norm2(self.conv2(y)))  # type: ignore[no-any-return]


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], int, str]] = {
    "divided": (lambda y: y / y.shape[1], 8, "without some of them an output differs by"),
    "softmax": (lambda y: y.softmax(1), 8, "closed, they still give something to the layers that read them"),
    "maximum": (lambda y: y.amax(1, keepdim=True), 1, r"'conv2' \(Conv2d\) has fewer channels than torch-pruning"),
    "halves": (lambda y: nn.functional.glu(y, 1), 4, r"'conv2' \(Conv2d\) has fewer channels than torch-pruning"),
    "some": (lambda y: y[:, [0, 3, 1]], 3, r"'conv2' \(Conv2d\) has fewer channels than torch-pruning thinks"),
    "slice": (lambda y: y[:, :5], 5, "without some of them it fails with RuntimeError: Given groups=1"),
    "shuffled": (nn.ChannelShuffle(8), 8, "fails with RuntimeError: Number of channels must be divisible"),
    "given shape": (lambda y: y.view(-1, 8, 6, 6), 8, "without some of them it fails with RuntimeError: shape"),
    "its own": (lambda y: y * torch.ones(8, 1, 1), 8, "fails with RuntimeError: The size of tensor"),
    "cut off": (lambda y: y.detach(), 8, "no convolution or linear layer before it is called as a module"),
    "normalised": (nn.GroupNorm(2, 8), 8, r"'between' \(GroupNorm\) computes with all of its channels at once"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_a_user_has_written_is_refused_by_name_and_the_rest_pruned(name: str) -> None:
    """As if that one layer had not been asked for: nothing that was tried of it is left."""
    between, channels, why = FUNCTIONS[name]
    model = close(Between(between, channels).eval())
    torch.manual_seed(1)
    smaller, warning = pruned_with(model, torch.randn(2, 3, 8, 8), threshold=1e-6)
    assert re.fullmatch(f"some layers keep all of their filters: 'norm': .*{why}.*", warning), warning
    assert widths(smaller) == [8, 6] and smaller.conv2.in_channels == channels
    assert_same(model, smaller, torch.randn(2, 3, 8, 8))


def test_tied_and_parametrized_weights_stay() -> None:
    model = close(Between(nn.Identity(), conv3=nn.Conv2d(8, 8, 3, padding=1)).eval())
    model.conv3.weight = model.conv2.weight
    with pytest.raises(ValueError, match=r"'norm2': 'conv2' \(Conv2d\) has a parameter that another module has too"):
        prune(model, torch.randn(2, 3, 8, 8), threshold=1e-6)
    nn.utils.parametrizations.weight_norm(model.conv2)
    with pytest.raises(ValueError, match=r"'norm2': 'conv2' \(ParametrizedConv2d\) is parametrized"):
        prune(model, torch.randn(2, 3, 8, 8), threshold=1e-6)


def test_a_map_for_all_channels_hides_no_filters() -> None:
    class Attention(Between):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            return self.out(self.norm2(self.conv2(y * self.between(y).sigmoid())))  # type: ignore[no-any-return]

    model = close(Attention(nn.Conv2d(8, 1, 7, padding=3)).eval())
    smaller, warning = pruned_with(model, torch.randn(2, 3, 8, 8), threshold=1e-6)
    assert "'norm': 'between' (Conv2d) has fewer channels than torch-pruning thinks" in warning
    assert widths(smaller) == [8, 6]


def test_what_hangs_on_parameters_stays_and_so_does_inference_mode() -> None:
    model: Any = nn.Sequential(nn.Conv3d(3, 8, 3), FusedTSigmaBN3d(2, 8, activation="relu"), nn.Conv3d(8, 2, 3))
    model = close(model).eval().to(memory_format=torch.channels_last_3d)
    model[2].weight.requires_grad_(False).group = "slow"
    x = torch.randn(2, 3, 8, 8, 8)
    with torch.inference_mode():
        smaller, _ = pruned_with(model, x, threshold=1e-6)
    assert widths(smaller) == [6] and not smaller[0].weight.is_inference()
    assert smaller[2].weight.group == "slow" and not smaller[2].weight.requires_grad
    assert smaller[2].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert_same(model, smaller, x)


def test_what_cannot_be_pruned_is_refused_by_name() -> None:
    x = torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match=r"has no filters that can be pruned; 'norm1?': '.*LN\) computes with all of"):
        prune(convert_model(NETWORKS["transformer"](), 2), x, amount=0.3)
    grouped = nn.Sequential(nn.Conv2d(3, 8, 3), FusedTSigmaBN2d(2, 8), nn.Conv2d(8, 8, 3, groups=2))
    with pytest.raises(ValueError, match=r"'1': '2' \(Conv2d\) takes them in groups"):
        prune(grouped, x, amount=0.3)
    with pytest.raises(ValueError, match=r"Conv2d has no filters that can be pruned; no normalisation"):
        prune(nn.Conv2d(3, 8, 3), x, amount=0.3)
    with pytest.raises(ValueError, match="'0': no convolution or linear layer before it"):
        prune(nn.Sequential(FusedTSigmaBN2d(2, 3)), x, amount=0.3)
    with pytest.raises(ValueError, match="cannot read the graph of Sequential: RuntimeError: Given groups=1"):
        prune(chain(FIRST), torch.randn(2, 4, 8, 8), amount=0.3)
    partly = nn.Sequential(*chain(FIRST), nn.Flatten(), nn.Linear(128, 4), FusedTSigmaBN1d(2, 4))
    with pytest.warns(UserWarning, match="some layers keep all of their filters: '5': they are an output"):
        assert widths(prune(partly, torch.randn(2, 3, 8, 8), amount=0.4)) == [4, 4]


def test_options_are_checked() -> None:
    model, x = chain(FIRST), torch.randn(2, 3, 8, 8)
    for wrong, message in [
        ({}, "give amount or threshold, one of them, got amount=None and threshold=None"),
        ({"amount": 0.1, "threshold": 0.1}, "one of them"),
        ({"amount": 1.0}, "amount must be a share of the filters, at least 0 and below 1, got 1.0"),
        ({"amount": -0.1}, "amount must be a finite number of 0.0 or more"),
        ({"threshold": -1.0}, "threshold must be"),
        ({"amount": 0.1, "scope": "all"}, "scope must be 'global' or 'layer', got 'all'"),
        ({"amount": 0.1, "min_filters": 0}, "min_filters must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            prune(model, x, **wrong)
    with pytest.raises(TypeError, match="example must be an input of the network, a tensor or the tuple"):
        prune(model, [3, 8, 8], amount=0.1)


def test_without_torch_pruning_one_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"pruning needs torch-pruning: pip install 'tsbn-kernels\[prune\]'"):
        prune(chain(FIRST), torch.randn(2, 3, 8, 8), amount=0.3)
