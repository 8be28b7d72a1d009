"""The modules against a list of T plain nn.BatchNorm layers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from support.problems import FORMATS, GATES, in_memory_format, stack, unstack
from torch import Tensor, nn

from tsbn_kernels import FusedTSigmaBN1d, FusedTSigmaBN2d, FusedTSigmaBN3d, use_backend
from tsbn_kernels.definition.activations import ACTIVATIONS, as_module

T, N, C = 3, 4, 5
LAYERS = [
    (FusedTSigmaBN1d, nn.BatchNorm1d, ()),
    (FusedTSigmaBN1d, nn.BatchNorm1d, (7,)),
    (FusedTSigmaBN2d, nn.BatchNorm2d, (3, 4)),
    (FusedTSigmaBN3d, nn.BatchNorm3d, (2, 3, 4)),
]
layers = pytest.mark.parametrize(("fused", "plain", "spatial"), LAYERS)


def randomise(layer: Any) -> None:
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean):
            if tensor is not None:
                tensor.normal_()
        if layer.running_var is not None:
            layer.running_var.uniform_(0.5, 1.5)


def plain_layers(layer: Any, plain: type[nn.Module], **options: Any) -> list[Any]:
    """T plain layers with the same numbers; built here, not by ``task()``, which is under test."""
    result = []
    for t in range(layer.num_tasks):
        one: Any = plain(layer.num_features, eps=layer.eps, **options)  # type: ignore[call-arg]
        with torch.no_grad():
            one.weight.copy_(torch.sigmoid(layer.weight[t]) if layer.gate == "sigmoid" else layer.weight[t])
            if layer.bias is not None:
                one.bias.copy_(layer.bias[t])
            if layer.running_mean is not None:
                one.running_mean.copy_(layer.running_mean[t])
                one.running_var.copy_(layer.running_var[t])
        result.append(one.train(layer.training))
    return result


def assert_same_statistics(layer: Any, oracles: list[Any]) -> None:
    for t, one in enumerate(oracles):
        torch.testing.assert_close(layer.running_mean[t], one.running_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.running_var[t], one.running_var, rtol=1e-5, atol=1e-6)
        assert layer.num_batches_tracked[t] == one.num_batches_tracked


@layers
@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("stacking", ["task_major", "sample_major"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_several_steps_equal_plain_layers(
    momentum: float | None, stacking: str, memory_format: str, fused: Any, plain: Any, spatial: tuple[int, ...]
) -> None:
    layer = fused(T, C, momentum=momentum, bias=True, stacking=stacking)
    randomise(layer)
    oracles = plain_layers(layer, plain, momentum=momentum)
    for step, training in enumerate([True, True, False, True]):
        layer.train(training)
        streams = torch.randn(T, N, C, *spatial) * (step + 1) + step
        x = stack(streams, stacking, memory_format).requires_grad_()
        dy = torch.randn(T, N, C, *spatial)
        y = layer(x)
        gradients = torch.autograd.grad(y, (x, layer.weight, layer.bias), stack(dy, stacking, memory_format))
        assert y.stride() == gradients[0].stride() == x.stride()
        slope = torch.sigmoid(layer.weight) * torch.sigmoid(-layer.weight)
        for t, one in enumerate(oracles):
            stream = streams[t].clone().requires_grad_()
            expected = one.train(training)(stream)
            wanted = torch.autograd.grad(expected, (stream, one.weight, one.bias), dy[t])
            torch.testing.assert_close(unstack(y, T, stacking)[t], expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(unstack(gradients[0], T, stacking)[t], wanted[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(gradients[1][t], wanted[1] * slope[t], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(gradients[2][t], wanted[2], rtol=1e-4, atol=1e-4)
        assert_same_statistics(layer, oracles)


@layers
@pytest.mark.usefixtures("on_device")
def test_leading_task_axis(fused: Any, plain: Any, spatial: tuple[int, ...]) -> None:
    """[T, N, C, *] is read whatever the stacking of flat batches; [T, N, C] would look like [T*N, C, L]."""
    if not spatial:
        return
    layer = fused(T, C, stacking="sample_major")
    randomise(layer)
    streams = torch.randn(T, N, C, *spatial)
    y = layer(streams)
    for stream, out, one in zip(streams, y, plain_layers(layer, plain), strict=True):
        torch.testing.assert_close(out, one(stream), rtol=1e-4, atol=1e-5)


@layers
@pytest.mark.parametrize("stacking", ["task_major", "sample_major"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("tasks", [None, [2], [2, 0]])
def test_one_input_for_all_or_some_tasks(
    tasks: list[int] | None, momentum: float | None, stacking: Any, fused: Any, plain: Any, spatial: tuple[int, ...]
) -> None:
    layer = fused(T, C, momentum=momentum, bias=True, stacking=stacking)
    randomise(layer)
    oracles = plain_layers(layer, plain, momentum=momentum)
    rows = range(T) if tasks is None else tasks
    indices = None if tasks is None else torch.tensor(tasks)
    for shared in (True, False):
        x = torch.randn(N, C, *spatial)
        given = x if shared else stack(x.expand(len(rows), *x.shape).clone(), stacking, "contiguous")
        y = unstack(layer(given, tasks=indices, fan_out=shared), len(rows), stacking)
        for out, t in zip(y, rows, strict=True):
            torch.testing.assert_close(out, oracles[t](x), rtol=1e-4, atol=1e-5)
        assert_same_statistics(layer, oracles)
    y.square().sum().backward()
    assert [bool(row.any()) for row in layer.bias.grad] == [t in rows for t in range(T)]


@layers
def test_a_shared_input_has_no_task_axis(fused: Any, plain: Any, spatial: tuple[int, ...]) -> None:
    dims = max(fused._stacked_dims) + 1
    with pytest.raises(ValueError, match=f"expected .* input.*got {dims}D input"):
        fused(T, C)(torch.randn([T, N, C, *[2] * (dims - 3)]), fan_out=True)


@layers
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("bias", [False, True, "frozen"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tracking", [True, False])
def test_task_returns_an_equal_plain_layer(
    tracking: bool, training: bool, bias: Any, gate: Any, fused: Any, plain: Any, spatial: tuple[int, ...]
) -> None:
    layer = fused(T, C, gate=gate, bias=bias, eps=1e-3, momentum=0.3, track_running_stats=tracking)
    randomise(layer)
    layer.train(training)
    x = torch.randn(T, N, C, *spatial)
    ones = [layer.task(t) for t in range(T)]
    y = unstack(layer(x.flatten(0, 1)), T, "task_major")
    for t, one in enumerate(ones):
        assert type(one) is plain
        assert one.training == training
        assert one.bias.requires_grad == (bias is True)
        torch.testing.assert_close(one(x[t]), y[t], rtol=1e-4, atol=1e-5)
        if tracking:
            torch.testing.assert_close(one.running_var, layer.running_var[t], rtol=1e-5, atol=1e-6)
            assert one.num_batches_tracked == layer.num_batches_tracked[t]
    assert torch.equal(layer.task(-1).weight, layer.task(T - 1).weight)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
def test_task_keeps_the_activation(training: bool, activation: Any) -> None:
    plain = as_module(activation, 0.3)
    layer = FusedTSigmaBN2d(T, C, bias=True, activation=activation, negative_slope=0.3)
    randomise(layer)
    layer.train(training)
    one: Any = layer.task(1)
    assert isinstance(one, nn.Sequential)
    assert [type(module) for module in one] == [nn.BatchNorm2d, type(plain)]
    assert one.training == one[1].training == training
    streams = torch.randn(T, N, C, 3, 4)
    with use_backend("reference"):
        y = layer(streams)
    torch.testing.assert_close(one(streams[1]), y[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one(streams[1]), plain(one[0](streams[1])))


def test_task_is_a_copy_and_checks_its_index() -> None:
    layer = FusedTSigmaBN2d(T, C, bias=True)
    one: Any = layer.task(1)
    with torch.no_grad():
        one.weight.zero_()
        one.running_mean.fill_(3)
    assert (layer.gates == 0.5).all()
    assert layer.running_mean is not None
    assert (layer.running_mean == 0).all()
    for index in (T, -T - 1):
        with pytest.raises(IndexError, match=f"task {index} is out of range for num_tasks={T}"):
            layer.task(index)


@pytest.mark.parametrize("bias", [False, True, "frozen"])
@pytest.mark.parametrize("tracking", [True, False])
def test_state_dict_has_the_names_of_batch_norm(tracking: bool, bias: Any) -> None:
    layer = FusedTSigmaBN2d(T, C, bias=bias, track_running_stats=tracking)
    state = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    plain = nn.BatchNorm2d(C, track_running_stats=tracking).state_dict()
    expected = {name: (T, *tensor.shape) for name, tensor in plain.items() if bias or name != "bias"}
    assert state == expected
    parameters = {name for name, _ in layer.named_parameters()}
    assert parameters == ({"weight", "bias"} if bias is True else {"weight"})


def test_strict_load() -> None:
    source, target = FusedTSigmaBN2d(T, C, bias="frozen"), FusedTSigmaBN2d(T, C, bias="frozen")
    randomise(source)
    target.load_state_dict(source.state_dict(), strict=True)
    x = torch.randn(T * N, C, 3, 3)
    assert torch.equal(source.eval()(x), target.eval()(x))
    learned = FusedTSigmaBN2d(T, C, bias=True)
    learned.load_state_dict(source.state_dict(), strict=True)  # frozen and learned biases have one name
    with pytest.raises(RuntimeError, match="bias"):
        FusedTSigmaBN2d(T, C).load_state_dict(source.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        FusedTSigmaBN2d(T + 1, C, bias=True).load_state_dict(source.state_dict())


def test_frozen_bias_is_added_and_not_trained() -> None:
    layer = FusedTSigmaBN2d(T, C, bias="frozen")
    plain = FusedTSigmaBN2d(T, C)
    assert layer.bias is not None
    assert not layer.bias.requires_grad
    layer.bias.fill_(2.0)
    x = torch.randn(T * N, C, 3, 3, requires_grad=True)
    torch.testing.assert_close(layer(x), plain(x) + 2.0)
    layer(x).mul(torch.randn_like(x)).sum().backward()
    assert layer.bias.grad is None
    assert layer.weight.grad is not None


def test_initial_values_and_reset() -> None:
    sigmoid, identity = FusedTSigmaBN2d(T, C, bias=True), FusedTSigmaBN2d(T, C, gate="identity", bias="frozen")
    assert torch.equal(sigmoid.gates, torch.full((T, C), 0.5))
    assert torch.equal(identity.gates, torch.ones(T, C))
    fresh = copy.deepcopy(sigmoid.state_dict())
    for layer in (sigmoid, identity):
        randomise(layer)
        layer(torch.randn(T * N, C, 2, 2))
        layer.reset_running_stats()
        assert layer.running_mean is not None
        assert layer.running_var is not None
        assert layer.num_batches_tracked is not None
        assert (layer.running_mean == 0).all()
        assert (layer.running_var == 1).all()
        assert (layer.num_batches_tracked == 0).all()
        assert (layer.weight != 0).all()
        layer.reset_parameters()
    for name, tensor in sigmoid.state_dict().items():
        assert torch.equal(tensor, fresh[name])
    assert torch.equal(identity.gates, torch.ones(T, C))
    assert (identity.bias == 0).all()


def test_gates_are_differentiable() -> None:
    layer = FusedTSigmaBN2d(T, C)
    layer.gates.sum().backward()
    torch.testing.assert_close(layer.weight.grad, torch.full((T, C), 0.25))


def test_without_running_statistics_evaluation_uses_the_batch() -> None:
    layer = FusedTSigmaBN2d(T, C, track_running_stats=False)
    assert layer.running_mean is None
    assert layer.num_batches_tracked is None
    x = torch.randn(T * N, C, 3, 3)
    assert torch.equal(layer(x), layer.eval()(x))
    layer.reset_running_stats()


def test_tracking_can_be_switched_off_and_on() -> None:
    """As in nn.BatchNorm: with buffers there and tracking off, training leaves them and evaluation reads them."""
    fused, plain = FusedTSigmaBN2d(1, C, gate="identity"), nn.BatchNorm2d(C)
    for layer in (fused, plain):
        layer.track_running_stats = False
        torch.manual_seed(1)
        layer(torch.randn(N, C, 3, 3))
        assert layer.running_mean is not None
        assert (layer.running_mean == 0).all()
        assert layer.num_batches_tracked is not None
        assert (layer.num_batches_tracked == 0).all()
    x = torch.randn(N, C, 3, 3)
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x))


@layers
def test_empty_batch_as_batch_norm(fused: Any, plain: Any, spatial: tuple[int, ...]) -> None:
    layer, one = fused(T, C), plain(C)
    assert layer(torch.zeros(0, C, *spatial)).shape == one(torch.zeros(0, C, *spatial)).shape
    assert (layer.num_batches_tracked == one.num_batches_tracked).all()
    assert torch.equal(layer.running_mean, torch.zeros(T, C))
    assert torch.equal(layer.running_var, torch.ones(T, C))


@pytest.mark.parametrize("dims", [3, 6])
def test_wrong_dimensions_are_the_same_error_as_batch_norm(dims: int) -> None:
    x = torch.zeros([2 * T, *[C] * (dims - 1)])
    with pytest.raises(ValueError, match=rf"FusedTSigmaBN2d expected 4D or 5D input.*got {dims}D input of shape"):
        FusedTSigmaBN2d(T, C)(x)
    with pytest.raises(ValueError, match="expected 4D input"):
        nn.BatchNorm2d(C)(x)


@pytest.mark.parametrize(
    ("fused", "message"),
    [(FusedTSigmaBN1d, "2D or 3D or 4D"), (FusedTSigmaBN2d, "4D or 5D"), (FusedTSigmaBN3d, "5D or 6D")],
)
def test_wrong_dimensions_name_what_is_accepted(fused: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"expected {message} input, the last with a leading task axis, got 1D"):
        fused(T, C)(torch.zeros(6))


def test_one_value_per_channel_is_the_same_error_as_batch_norm() -> None:
    for layer, x in ((FusedTSigmaBN2d(T, C), torch.zeros(T, C, 1, 1)), (nn.BatchNorm2d(C), torch.zeros(1, C, 1, 1))):
        with pytest.raises(ValueError, match="Expected more than 1 value per"):
            layer(x)
        assert layer.eval()(x).shape == x.shape


def test_wrong_sizes_name_both() -> None:
    with pytest.raises(
        ValueError, match=r"weight must have shape .* = \[3, 4\] for x of shape \[6, 4, 2, 2\], got \[3, 5\]"
    ):
        FusedTSigmaBN2d(T, C)(torch.zeros(6, 4, 2, 2))
    with pytest.raises(ValueError, match="the first dimension of x, 7, is not a multiple of num_tasks=3"):
        FusedTSigmaBN2d(T, C)(torch.zeros(7, C, 2, 2))
    with pytest.raises(ValueError, match="has 2 tasks along its first dimension, expected num_tasks=3"):
        FusedTSigmaBN2d(T, C)(torch.zeros(2, 2, C, 2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tasks": 0}, "num_tasks must be 1 or more, got 0"),
        ({"num_features": -1}, "num_features must be 1 or more, got -1"),
        ({"gate": "tanh"}, "gate must be one of sigmoid, identity, got 'tanh'"),
        ({"bias": "learned"}, "bias must be True, False or 'frozen', got 'learned'"),
        ({"stacking": "task_axis"}, "stacking must be 'task_major' or 'sample_major', got 'task_axis'"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedTSigmaBN2d(**{"num_tasks": T, "num_features": C, **options})


def test_repr_names_every_option() -> None:
    layer = FusedTSigmaBN2d(T, C, eps=1e-3, momentum=None, gate="identity", bias="frozen", stacking="sample_major")
    assert repr(layer) == (
        "FusedTSigmaBN2d(3, 5, eps=0.001, momentum=None, gate='identity', bias='frozen', stacking='sample_major', "
        "track_running_stats=True)"
    )
    assert "bias=True" in repr(FusedTSigmaBN2d(T, C, bias=True))
    assert "bias=False" in repr(FusedTSigmaBN2d(T, C))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("bias", [False, True, "frozen"])
def test_copies_are_equal_and_separate(bias: Any, duplicate: Any) -> None:
    layer = FusedTSigmaBN2d(T, C, bias=bias)
    randomise(layer)
    other = duplicate(layer)
    x = torch.randn(T * N, C, 3, 3)
    assert torch.equal(layer.eval()(x), other.eval()(x))
    other.weight.data.zero_()
    assert (layer.weight != 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_conversion_to_another_dtype(dtype: torch.dtype) -> None:
    layer = FusedTSigmaBN2d(T, C, bias="frozen").to(dtype)
    for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
        assert tensor is not None
        assert tensor.dtype == dtype
    assert layer.num_batches_tracked is not None
    assert layer.num_batches_tracked.dtype == torch.long
    y = layer(torch.randn(T * N, C, 3, 3, dtype=dtype))
    assert y.dtype == dtype
    made = FusedTSigmaBN2d(T, C, bias=True, dtype=dtype, device="cpu")
    assert {tensor.dtype for tensor in made.parameters()} == {dtype}


def test_deferred_initialisation_on_the_meta_device() -> None:
    layer = FusedTSigmaBN2d(T, C, bias=True, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    for name, tensor in FusedTSigmaBN2d(T, C, bias=True).state_dict().items():
        assert torch.equal(layer.state_dict()[name], tensor)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_network_of_layers_learns_as_its_plain_twin(memory_format: str) -> None:
    """Three steps of SGD through convolution, layer and in-place ReLU equal those of T plain layers."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, C, 3, bias=False)
    layer = FusedTSigmaBN2d(T, C, gate="identity", bias=True)
    twin = copy.deepcopy(convolution)
    oracles = nn.ModuleList(plain_layers(layer, nn.BatchNorm2d))
    optimisers = [
        torch.optim.SGD([*convolution.parameters(), *layer.parameters()], lr=0.1),
        torch.optim.SGD([*twin.parameters(), *oracles.parameters()], lr=0.1),
    ]
    target = torch.randn(T * N, C, 4, 4)

    def loop(x: Tensor) -> Tensor:
        return torch.cat([one(stream) for one, stream in zip(oracles, twin(x).chunk(T), strict=True)])

    for _ in range(3):
        x = in_memory_format(torch.randn(T * N, 3, 6, 6), "task_major", memory_format)
        losses = []
        for optimiser, forward in zip(optimisers, (lambda x: layer(convolution(x)), loop), strict=True):
            optimiser.zero_grad()
            loss = (nn.functional.relu(forward(x), inplace=True) - target).square().mean()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses)
    torch.testing.assert_close(convolution.weight, twin.weight, rtol=1e-4, atol=1e-5)
    assert_same_statistics(layer, list(oracles))
