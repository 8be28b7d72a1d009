"""Exported networks without the filters that their task has closed, against that task's stream."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from support.folding import TASKS, N, T, randomise, stream_of
from support.networks import NETWORKS, look_trained
from torch import Tensor, nn

from tsbn_kernels import FusedTSigmaBN2d, MultiTaskModel, Pruning, convert_model, export_task
from tsbn_kernels.layers.task_specific import TaskSpecific

pytest.importorskip("torch_pruning")
TASK = 1


def close(model: nn.Module, bias: float, most: int = 12) -> Any:
    """Closes a quarter of the filters of one task; those of the others stay open."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, TaskSpecific):
                count = min(layer.weight.shape[1] // 4, most)
                layer.weight[TASK, :count] = -1e4 if layer.gate == "sigmoid" else 0.0
                if layer.bias is not None:
                    layer.bias[TASK, :count] = bias
    return model.eval()


def export(model: nn.Module, x: Tensor, task: Any = TASK, **options: Any) -> tuple[Any, str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exported = export_task(model, task, prune=Pruning(x, **options or {"threshold": 1e-6}))
    return exported, "; ".join(str(one.message) for one in caught if one.category is UserWarning)


def channels(model: nn.Module) -> list[int]:
    return [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


TORCHVISION: dict[str, Any] = {
    "resnet": lambda models: models.ResNet(models.resnet.Bottleneck, [1, 2, 1, 1]),
    "vgg": lambda models: nn.Sequential(
        models.vgg.make_layers([16, "M", 24], batch_norm=True), nn.Flatten(), nn.Linear(24 * 64, 5)
    ),
    "densenet": lambda models: models.DenseNet(8, (2, 2), 16, 2),
    "mobilenet_v2": lambda models: models.mobilenet_v2(width_mult=0.25),
    "mobilenet_v3": lambda models: models.mobilenet_v3_small(width_mult=0.5),
}


@pytest.mark.parametrize("bias", [0.0, 0.3])
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str, bias: float) -> None:
    """With a bias they leave a constant behind, which goes where no padding is and not elsewhere."""
    models = pytest.importorskip("torchvision").models
    x = torch.randn(2, 3, 16 if name == "vgg" else 64, 16 if name == "vgg" else 64)
    model = convert_model(look_trained(TORCHVISION[name](models)), T)
    exported, warning = export(close(model, bias, 4 if name == "densenet" else 12), x)
    assert bias or not warning
    assert_same(exported(x), stream_of(model, x, TASK))
    full = channels(export_task(model, TASK))
    assert sum(channels(exported)) < sum(full)
    if bias == 0 and name in ("resnet", "vgg"):
        assert channels(exported) == [count - min(count // 4, 12) for count in full]


PADDINGS = [(0, "zeros"), (1, "reflect"), (1, "replicate"), (1, "circular"), ("valid", "zeros")]


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize(
    ("padding", "mode", "folded"),
    [*((*one, True) for one in PADDINGS), (1, "zeros", False), ("same", "zeros", False), ("same", "reflect", True)],
)
@pytest.mark.parametrize("bias", [0.0, -0.2, 0.7])
def test_a_constant_is_folded_where_padding_allows(
    bias: float, padding: Any, mode: Any, folded: bool, activation: Any
) -> None:
    norm = FusedTSigmaBN2d(T, 8, bias="frozen", activation=activation, dtype=torch.float64)
    convs = [nn.Conv2d(a, b, 3, dtype=torch.float64) for a, b in ((3, 8), (8, 4))]
    reader = nn.Conv2d(8, 4, 3, padding=padding, padding_mode=mode, bias=False, dtype=torch.float64)
    model = close(randomise(nn.Sequential(convs[0], norm, reader)), bias)
    x = torch.randn(N, 3, 9, 9, dtype=torch.float64)
    exported, _ = export(model, x)
    silent = bias == 0 or (activation == "relu" and bias < 0)
    assert exported[0].out_channels == (6 if folded or silent else 8)
    assert (exported[2].bias is None) == (silent or not folded)
    torch.testing.assert_close(exported(x), stream_of(model, x, TASK))


def test_a_transposed_convolution_keeps_what_is_constant() -> None:
    """Its border gets fewer of the constants than its middle."""
    norm = FusedTSigmaBN2d(T, 8, bias="frozen", activation="relu")
    model = close(randomise(nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ConvTranspose2d(8, 4, 3))), 0.5)
    x = torch.randn(N, 3, 9, 9)
    exported, _ = export(model, x)
    assert exported[0].out_channels == 8
    assert_same(exported(x), stream_of(model, x, TASK))


class Joined(nn.Module):
    """Two branches side by side, and layers that read them in this order and in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 8, 3), FusedTSigmaBN2d(T, 8, bias="frozen", activation="relu")) for _ in range(2)
        )
        self.readers = nn.ModuleList(nn.Conv2d(16, 4, 1, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (branch(x) for branch in self.branches)
        one, other = self.readers
        return one(torch.cat([first, second], 1)) * other(torch.cat([second, first], 1))  # type: ignore[no-any-return]


def test_a_layer_behind_a_concatenation_takes_the_constants_of_all_branches() -> None:
    """Each is multiplied by the weights of its own channel, though those of another branch go too."""
    model = close(randomise(Joined().double()), 0.7)
    x = torch.randn(N, 3, 9, 9, dtype=torch.float64)
    exported, warning = export(model, x)
    assert not warning
    assert all(reader.in_channels == 12 and reader.bias is not None for reader in exported.readers)
    torch.testing.assert_close(exported(x), stream_of(model, x, TASK))


def test_a_multi_task_model_gives_the_same_modules_narrower() -> None:
    """Which is why ONNX takes them as it takes those that are not pruned."""
    heads = {name: nn.Sequential(nn.Linear(16, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 1)) for name in TASKS}
    model = randomise(MultiTaskModel(convert_model(NETWORKS["celeba"](), T), heads))
    x = torch.randn(2, 3, 32, 32)
    full = export_task(model, "smile")
    exported, warning = export(model, x, "smile", amount=0.3, min_filters=1)
    assert "closed, they still give something" in warning  # their bias, which the border of the next layer lacks
    assert sum(p.numel() for p in exported.parameters()) < 0.9 * sum(p.numel() for p in full.parameters())
    assert [type(one) for one in exported.modules()] == [type(one) for one in full.modules()]
    expected = exported(x)
    torch.testing.assert_close(torch.export.export(exported, (x,)).module()(x), expected)


def test_each_task_keeps_its_own_filters() -> None:
    norm = FusedTSigmaBN2d(2, 6, activation="relu")
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([[0.9, 0.9, 0.9, 0.1, 0.1, 0.1], [0.1, 0.1, 0.9, 0.9, 0.9, 0.9]]).logit())
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.Conv2d(6, 2, 1)).eval()
    x = torch.randn(2, 3, 8, 8)
    for task, left in ((0, [0, 1, 2]), (1, [2, 3, 4, 5])):
        exported, _ = export(model, x, task, threshold=0.5)
        scale = norm.gates[task, left] / (norm.running_var[task, left] + norm.eps).sqrt()
        torch.testing.assert_close(exported[0].weight, model[0].weight[left] * scale[:, None, None, None])
    with pytest.raises(ValueError, match="Sequential has no filters that can be pruned"):
        export(nn.Sequential(nn.Conv2d(3, 6, 3), norm), x)
