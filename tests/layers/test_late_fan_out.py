"""Late fan-out: the same as fanning out first, without activations of T streams before they part."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from support.problems import FORMATS, in_memory_format
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune

from tsbn_kernels import FusedTSigmaBN2d, LateFanOut, MultiTaskModel
from tsbn_kernels.layers.late_fan_out import HOMOGENEOUS

T, N, C = 3, 4, 5

POOLS: dict[str, Callable[[], nn.Module | None]] = {
    "none": lambda: None,
    "max": lambda: nn.MaxPool2d(2),
    "average": lambda: nn.AvgPool2d(3, stride=2, padding=1),
    "adaptive": lambda: nn.AdaptiveAvgPool2d(2),
}
CONVS: dict[str, Callable[[], nn.Module | None]] = {
    "none": lambda: None,
    "3x3": lambda: nn.Conv2d(C, 6, 3, padding=1, bias=False),
    "strided, with a bias": lambda: nn.Conv2d(C, 7, 3, stride=2, padding=1),
    "padded by reflection": lambda: nn.Conv2d(C, 4, 3, padding=1, padding_mode="reflect"),
}


def pair(activation: str | None, pool: str, conv: str, stacking: str) -> tuple[LateFanOut, Callable[[Tensor], Tensor]]:
    """A late fan-out, and a layer that fans out followed by the same modules."""
    layer = FusedTSigmaBN2d(T, C, activation=activation, fan_out=True, stacking=stacking, dtype=torch.float64)
    nn.init.normal_(layer.weight)
    pooling, convolution = POOLS[pool](), CONVS[conv]()
    convolution = None if convolution is None else convolution.double()
    late = LateFanOut.from_layer(layer, pooling, convolution)

    def early(x: Tensor) -> Tensor:
        y: Tensor = layer(x)
        for module in (pooling, convolution):
            y = y if module is None else module(y)
        return y

    early.layer = layer
    return late, early


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("stacking", ["task_major", "sample_major"])
@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("activation", HOMOGENEOUS)
def test_equals_fanning_out_first(
    activation: str | None, pool: str, conv: str, stacking: str, memory_format: str
) -> None:
    torch.manual_seed(1)
    late, early = pair(activation, pool, conv, stacking)
    x = in_memory_format(torch.randn(N, C, 8, 8, dtype=torch.float64), "task_major", memory_format).requires_grad_()
    y, expected = late(x), early(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    dy = torch.randn_like(y)
    parameters = [] if late.conv is None else list(late.conv.parameters())
    got = torch.autograd.grad(y, [x, late.weight, *parameters], dy)
    wanted = torch.autograd.grad(expected, [x, early.layer.weight, *parameters], dy)
    for gradient, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(late.norm.running_var, early.layer.running_var[:1])
    late.eval(), early.layer.eval()
    torch.testing.assert_close(late(x), early(x), rtol=1e-10, atol=1e-10)


def test_what_is_saved_has_no_task_axis() -> None:
    late, _ = pair("relu", "max", "3x3", "sample_major")
    x = torch.randn(N, C, 16, 16, dtype=torch.float64, requires_grad=True)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        late(x)
    assert max(saved.values()) == x.numel()
    activations = [size for size in saved.values() if size >= x.numel() // 4]
    assert sum(activations) <= 3 * x.numel()  # x, y, and y pooled with its indices


def test_second_derivative() -> None:
    late, _ = pair("leaky_relu", "average", "3x3", "sample_major")
    x = torch.randn(2, C, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, w: functional_of(late, x, w), (x, late.weight))


def functional_of(late: LateFanOut, x: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = torch.func.functional_call(late, {"weight": weight}, (x,))
    return out


def test_state_holds_gates_and_one_row_of_statistics() -> None:
    late = LateFanOut(T, C)
    shapes = {name: tuple(tensor.shape) for name, tensor in late.state_dict().items()}
    assert shapes == {
        "weight": (T, C),
        "norm.running_mean": (1, C),
        "norm.running_var": (1, C),
        "norm.num_batches_tracked": (1,),
    }
    assert [name for name, _ in late.named_parameters()] == ["weight"]
    LateFanOut(T, C).load_state_dict(late.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "gelu"}, "an activation that lets positive factors pass"),
        ({"pool": nn.LPPool2d(2, 2)}, "pool must be a max or average pooling"),
        ({"pool": nn.MaxPool2d(2, return_indices=True)}, "returns no indices"),
        ({"conv": nn.Conv2d(C, C, 3, groups=C)}, "of one group"),
        ({"conv": nn.ConvTranspose2d(C, C, 3)}, "of one group"),
        ({"conv": nn.Conv2d(C + 1, C, 3)}, "must take the 5 channels"),
    ],
)
def test_what_does_not_commute_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LateFanOut(T, C, **options)


@pytest.mark.parametrize("options", [{"bias": True}, {"bias": "frozen"}, {"gate": "identity"}])
def test_layers_with_a_bias_or_free_gates_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="positive gates and no bias"):
        LateFanOut.from_layer(FusedTSigmaBN2d(T, C, **options))


def test_layers_whose_tasks_saw_different_inputs_are_refused() -> None:
    layer = FusedTSigmaBN2d(T, C)
    layer(torch.randn(T * N, C, 3, 3))
    with pytest.raises(ValueError, match="different running_mean"):
        LateFanOut.from_layer(layer)


def test_half_precision_gates_are_those_of_the_layer() -> None:
    layer = FusedTSigmaBN2d(T, C, activation="relu", fan_out=True)
    nn.init.normal_(layer.weight)
    late = LateFanOut.from_layer(layer)
    x = torch.randn(N, C, 4, 4).bfloat16()
    torch.testing.assert_close(late(x), layer(x), rtol=2**-7, atol=1e-6)
    assert functional.relu(late(x)).equal(late(x))


class Standardised(nn.Conv2d):
    """Makes its weight in forward."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return functional.conv2d(x, weight, self.bias, padding=self.padding)


class Doubled(nn.AvgPool2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda _, __, y: y + 1)
    return module


def own_forward(module: nn.Module) -> nn.Module:
    plain = module.forward
    module.forward = lambda x: plain(x) + 1  # type: ignore[method-assign]
    return module


def pruned(module: nn.Module) -> nn.Module:
    prune.l1_unstructured(module, "weight", amount=0.5)
    return module


def convolution() -> nn.Module:
    return nn.Conv2d(C, 6, 3, padding=1)


UNKNOWN: dict[str, Callable[[], tuple[nn.Module | None, nn.Module | None]]] = {
    "made in forward": lambda: (None, Standardised(C, 6, 3, padding=1)),
    "hook": lambda: (None, hooked(convolution())),
    "forward of the instance": lambda: (None, own_forward(convolution())),
    "pruned": lambda: (None, pruned(convolution())),
    "weight norm": lambda: (None, parametrizations.weight_norm(convolution())),
    "spectral norm": lambda: (None, parametrizations.spectral_norm(convolution())),
    "older weight norm": lambda: (None, nn.utils.weight_norm(convolution())),
    "pool of another forward": lambda: (Doubled(2), convolution()),
    "hooked pool": lambda: (hooked(nn.MaxPool2d(2)), convolution()),
    "both": lambda: (hooked(nn.MaxPool2d(2)), hooked(convolution())),
    "pool alone": lambda: (own_forward(nn.AvgPool2d(2)), None),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("unknown", UNKNOWN)
def test_gates_are_not_folded_into_what_may_compute_something_else(unknown: str, later: bool) -> None:
    layer = FusedTSigmaBN2d(T, C, activation="relu", fan_out=True, dtype=torch.float64)
    nn.init.normal_(layer.weight)
    pool, conv = UNKNOWN[unknown]()
    pool, conv = (None if module is None else module.double() for module in (pool, conv))
    if later:  # than the late fan-out was made
        late = LateFanOut.from_layer(layer, pool and nn.MaxPool2d(2), conv and convolution().double())
        late.pool, late.conv = pool, conv
    else:
        late = LateFanOut.from_layer(layer, pool, conv)
    late.eval(), layer.eval()
    x = torch.randn(N, C, 8, 8, dtype=torch.float64)
    y = layer(x)
    for module in (pool, conv):
        y = y if module is None else module(y)
    torch.testing.assert_close(late(x), y, rtol=1e-9, atol=1e-9)


class Offset(FusedTSigmaBN2d):
    def forward(self, x: Tensor, *args: object, **options: object) -> Tensor:
        return super().forward(x, *args, **options) + 1


def test_layers_that_compute_something_else_are_refused() -> None:
    for layer in (Offset(T, C), hooked(FusedTSigmaBN2d(T, C)), own_forward(FusedTSigmaBN2d(T, C))):
        with pytest.raises(ValueError, match="must be a FusedTSigmaBN without hooks or methods of its own"):
            LateFanOut.from_layer(layer)  # type: ignore[arg-type]


@pytest.mark.parametrize("conv", ["none", "3x3"])
def test_streams_of_a_model_part_there(conv: str) -> None:
    """The layer tells the model that it has fanned out, and runs the tasks that the model runs."""
    torch.manual_seed(1)
    late, early = pair("relu", "max", conv, "task_major")
    stem, second = nn.Conv2d(3, C, 1).double(), nn.Conv2d(C if late.conv is None else 6, 4, 1).double()
    following = [FusedTSigmaBN2d(T, 4, dtype=torch.float64) for _ in range(2)]
    names = "abc"
    heads = {name: nn.Flatten() for name in names}
    late_model = MultiTaskModel(nn.Sequential(stem, late, second, following[0]), heads)
    modules = [early.layer, nn.MaxPool2d(2), *([] if late.conv is None else [late.conv]), second, following[1]]
    early_model = MultiTaskModel(nn.Sequential(stem, *modules), heads)
    models = late_model, copy.deepcopy(late_model), early_model
    x = torch.randn(N, 3, 6, 6, dtype=torch.float64)
    for tasks in (None, ["c", "a"], ["b"]):
        *ours, expected = (model(x, tasks) for model in models)
        for found in ours:
            assert list(found) == list(expected)
            for name, stream in found.items():
                torch.testing.assert_close(stream, expected[name], rtol=1e-10, atol=1e-10)
    for layer in (late.norm, early.layer):
        assert layer.running_mean.isfinite().all()
    assert late.norm.running_mean.shape[0] == 1 and int(late.norm.num_batches_tracked) == 3
    with pytest.raises(ValueError, match="late fan-out needs one input for all tasks, got the streams of 3"):
        late_model(dict.fromkeys(names, x))


def test_batches_of_a_task_each_run_one_after_the_other() -> None:
    late, _ = pair("relu", "max", "3x3", "task_major")
    model = MultiTaskModel(
        nn.Sequential(late, FusedTSigmaBN2d(T, 6, dtype=torch.float64)), dict.fromkeys("abc", nn.Flatten())
    )
    model.eval()
    batches = {name: torch.randn(N + index, C, 4, 4, dtype=torch.float64) for index, name in enumerate("ab")}
    found = model(batches)
    for name, batch in batches.items():
        torch.testing.assert_close(found[name], model(batch)[name])
