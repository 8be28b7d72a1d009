"""Conversion of plain models, and back, against the plain models themselves and loops of BatchNorms."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from support.networks import BATCH_NORMALISED, NETWORKS, look_trained, pretrained
from torch import Tensor, nn
from torch.nn import functional

from tsbn_kernels import (
    FusedTSigmaBN,
    FusedTSigmaBN1d,
    FusedTSigmaBN2d,
    FusedTSigmaBN3d,
    MultiTaskModel,
    convert_model,
    parameter_groups,
    revert_model,
)
from tsbn_kernels.layers.task_specific import TaskSpecific

T, N = 3, 8
variants = pytest.mark.parametrize("variant", ["ts_sigma_bn", "tsbn"])
networks = pytest.mark.parametrize("name", NETWORKS)


class BatchNormAct2d(nn.BatchNorm2d):
    """What timm's class of that name adds to nn.BatchNorm2d; it is known by where it comes from."""

    __module__ = "timm.layers.norm_act"

    def __init__(self, num_features: int, act: nn.Module) -> None:
        super().__init__(num_features)
        self.drop, self.act = nn.Dropout(0.5), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def task_specific(model: nn.Module) -> dict[str, FusedTSigmaBN]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedTSigmaBN)}


def assert_same_state(one: nn.Module, other: nn.Module, **tolerance: float) -> None:
    state, expected = one.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@networks
@variants
@pytest.mark.parametrize("stacking", ["task_major", "sample_major"])
def test_every_task_starts_as_the_plain_model(stacking: Any, variant: Any, name: str) -> None:
    plain = pretrained(name).eval()
    converted = convert_model(plain, T, variant=variant, stacking=stacking)
    kinds = nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.RMSNorm
    norms = [name for name, module in plain.named_modules() if isinstance(module, kinds)]
    assert norms and all(isinstance(converted.get_submodule(norm), TaskSpecific) for norm in norms)
    x = torch.randn(N, 3, 16, 16)
    stacked = x.repeat(T, 1, 1, 1) if stacking == "task_major" else x.repeat_interleave(T, 0)
    y, expected = converted(stacked), plain(x)
    for t in range(T):
        stream = y[t * N : (t + 1) * N] if stacking == "task_major" else y[t::T]
        torch.testing.assert_close(stream, expected, rtol=1e-5, atol=1e-5)


@networks
@variants
def test_revert_gives_the_plain_model_back(variant: Any, name: str) -> None:
    plain = pretrained(name)
    converted = convert_model(plain, T, variant=variant)
    for t in range(T):
        back = revert_model(converted, task=t)
        assert [type(module) for module in back.modules()] == [type(module) for module in plain.modules()]
        assert_same_state(back, plain, rtol=0 if variant == "tsbn" else 1e-6, atol=0)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision").models
    plain = look_trained(getattr(models, name)()).eval()
    converted = convert_model(plain, T)
    x = torch.randn(2, 3, 64, 64)
    expected = plain(x)
    for stream in converted(x.repeat(T, 1, 1, 1)).chunk(T):
        torch.testing.assert_close(stream, expected, rtol=1e-5, atol=1e-5)
    back = revert_model(converted, task=1)
    assert repr(back) == repr(plain)
    torch.testing.assert_close(back(x), expected, rtol=1e-5, atol=1e-5)


def test_revert_gives_the_task_asked_for_and_leaves_the_model() -> None:
    converted = convert_model(pretrained("celeba"), T)
    for layer in task_specific(converted).values():
        nn.init.normal_(layer.weight)
    converted.train()(torch.randn(T * N, 3, 16, 16))
    converted.eval()
    before = copy.deepcopy(converted.state_dict())
    x = torch.randn(T * N, 3, 16, 16)
    for t, stream in enumerate(converted(x).chunk(T)):
        torch.testing.assert_close(revert_model(converted, t)(x[t * N : (t + 1) * N]), stream, rtol=1e-4, atol=1e-5)
    for key, tensor in converted.state_dict().items():
        assert torch.equal(tensor, before[key])


class LoopOfBatchNorms(nn.Module):
    """T plain layers in a loop over task-major streams, with the raw gates as their parameters."""

    def __init__(self, plain: nn.Module, variant: str) -> None:
        super().__init__()
        self.norms = nn.ModuleList(copy.deepcopy(plain) for _ in range(T))
        self.sigmoid = variant == "ts_sigma_bn"
        for norm in self.norms if self.sigmoid else ():
            norm.weight = nn.Parameter(torch.logit(norm.weight.detach()))
            norm.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        streams = []
        for norm, stream in zip(self.norms, x.chunk(T), strict=True):
            weight = torch.sigmoid(norm.weight) if self.sigmoid else norm.weight
            statistics = norm.running_mean, norm.running_var
            streams.append(functional.batch_norm(stream, *statistics, weight, norm.bias, True, norm.momentum, norm.eps))
        return torch.cat(streams)

    def stacked(self, name: str) -> Tensor:
        return torch.stack([getattr(norm, name) for norm in self.norms])


# ResNet-50, whose steps take long, for five of them, with each variant and in each dtype once: its blocks are those of
# "bottleneck", which takes all twenty.
TRAINED = [
    (dtype, tolerance, variant, name)
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-3))
    for variant in ("ts_sigma_bn", "tsbn")
    for name in BATCH_NORMALISED
    if name != "resnet50" or (variant == "tsbn") == (dtype == torch.float32)
]


@pytest.mark.parametrize(("dtype", "tolerance", "variant", "name"), TRAINED)
def test_twenty_training_steps_equal_a_loop_of_batch_norms(
    dtype: torch.dtype, tolerance: float, variant: Any, name: str
) -> None:
    """The shared stem runs once in the fused model, and T times in the loop.

    Training is chaotic: where a ReLU or a maximum tips, one rounding becomes a step of the learning rate. So the rate
    is low; lower still in the fifty layers of ResNet-50, whose images are larger, for statistics over a handful of
    values amplify it.
    """
    size, lr = (96, 3e-5) if name == "resnet50" else (32, 3e-4)
    plain = pretrained(name, dtype)
    heads = nn.ModuleDict(
        {
            f"task{t}": nn.Conv2d(plain.features, 1, 1) if name == "segnet" else nn.Linear(plain.features, 1)
            for t in range(T)
        }
    ).to(dtype)
    twin, twin_heads = copy.deepcopy(plain), copy.deepcopy(heads)
    model = MultiTaskModel(convert_model(plain, T, variant=variant), heads)
    layers = task_specific(model.backbone)
    for path in layers:
        twin.set_submodule(path, LoopOfBatchNorms(twin.get_submodule(path), variant))

    def loop(x: Tensor) -> list[Tensor]:
        streams = twin(x.repeat(T, 1, 1, 1)).chunk(T)
        return [head(stream) for head, stream in zip(twin_heads.values(), streams, strict=True)]

    gates = [norm.weight for module in twin.modules() if isinstance(module, LoopOfBatchNorms) for norm in module.norms]
    rest = {*twin.parameters(), *twin_heads.parameters()} - set(gates)
    optimisers = [
        torch.optim.SGD(parameter_groups(model, lr=lr, gate_lr_multiplier=10)),
        torch.optim.SGD([{"params": gates, "lr": 10 * lr}, {"params": list(rest)}], lr=lr),
    ]
    for _ in range(5 if name == "resnet50" else 20):
        x = torch.randn(N, 3, size, size, dtype=dtype)
        for optimiser, forward in zip(optimisers, (lambda x: list(model(x).values()), loop), strict=True):
            optimiser.zero_grad()
            sum((y - t).square().mean() for t, y in enumerate(forward(x))).backward()
            optimiser.step()
    close = {"rtol": tolerance, "atol": tolerance}
    assert_same_state(heads, twin_heads, **close)
    for path, layer in layers.items():
        for attribute in ("weight", "bias", "running_mean", "running_var"):
            expected = twin.get_submodule(path).stacked(attribute)
            torch.testing.assert_close(getattr(layer, attribute), expected, **close)
    moved = [(layer.gates - plain.get_parameter(f"{path}.weight")).abs().max() for path, layer in layers.items()]
    assert max(moved) > lr / 3
    for path, parameter in model.backbone.named_parameters():
        if path.rpartition(".")[0] not in layers:
            torch.testing.assert_close(parameter, twin.get_parameter(path), **close)


def test_every_kind_of_layer_has_its_own() -> None:
    plain = nn.ModuleList(
        [nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2), BatchNormAct2d(2, nn.PReLU())]
    )
    converted = convert_model(plain, T, fuse_activation=False, pretrained=True)
    bases = [FusedTSigmaBN1d, FusedTSigmaBN2d, FusedTSigmaBN3d, FusedTSigmaBN, FusedTSigmaBN2d]
    for layer, base in zip(converted, bases, strict=True):
        assert isinstance(layer, base)
    assert [type(layer) for layer in revert_model(converted, 0)] == [type(layer) for layer in plain]
    for spatial in ((), (5,), (5, 4), (2, 3, 4)):
        x = torch.randn(T * N, 2, *spatial)
        torch.testing.assert_close(converted[3].eval()(x), plain[3].eval()(x), rtol=1e-4, atol=1e-4)


def test_batch_norm_act_keeps_activation_and_drop() -> None:
    torch.manual_seed(1)
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4, nn.PReLU(init=0.3)))
    plain[1].weight.data.uniform_(0.1, 0.9)
    plain[1].bias.data.normal_()
    converted = convert_model(plain, T)
    assert converted[1].act.weight is not plain[1].act.weight
    assert list(converted.state_dict()) == list(plain.state_dict())
    x = torch.randn(T * N, 3, 5, 5)
    torch.testing.assert_close(converted.eval()(x), plain.eval()(x), rtol=1e-5, atol=1e-5)
    assert (converted.train()(x) == 0).any()  # dropout
    back = revert_model(converted.eval(), 1)
    assert type(back[1]) is BatchNormAct2d
    assert back[1].training is back[1].act.training is False
    converted.load_state_dict(plain.state_dict())
    convert_model(plain, T, inplace=True)


def test_streams_of_timms_layer_are_activated() -> None:
    layer: Any = convert_model(nn.Sequential(BatchNormAct2d(4, nn.PReLU(init=0.3))), T)[0].eval()  # type: ignore[index]
    x = torch.randn(T * N, 4, 3, 3)
    assert torch.equal(torch.cat(layer.streams(x)), layer(x))


def test_in_place_and_copy() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    converted = convert_model(plain, T)
    assert type(plain[1]) is nn.BatchNorm2d
    assert converted[0].weight is not plain[0].weight
    weight = plain[0].weight
    assert convert_model(plain, T, inplace=True) is plain
    assert plain[0].weight is weight
    assert type(plain[1]) is FusedTSigmaBN2d
    assert type(convert_model(nn.BatchNorm2d(4), T)) is FusedTSigmaBN2d


def test_an_error_leaves_a_model_as_it_was() -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    for unknown, message in (
        (Own(4), "is a Own that has a class with its own forward"),
        (nn.LazyBatchNorm2d(), "initialise a lazy layer"),
    ):
        plain = nn.Sequential(nn.BatchNorm2d(4), unknown)
        with pytest.raises(TypeError, match=message):
            convert_model(plain, T, inplace=True)
        assert type(plain[0]) is nn.BatchNorm2d
        converted: Any = convert_model(plain, T, exclude="1", fuse_activation=False, inplace=True)
        assert type(converted[1]) is type(unknown)


def test_a_shared_layer_is_replaced_by_one_layer() -> None:
    norm = nn.BatchNorm2d(4)
    block = nn.Sequential(nn.Conv2d(4, 4, 1), norm)
    plain = nn.ModuleDict({"a": block, "b": block, "c": nn.Sequential(norm, nn.Sequential(norm, nn.ReLU()))})
    converted = convert_model(plain, T, fuse_activation=False)  # a ModuleDict has no forward to be traced
    layer = converted["a"][1]
    assert isinstance(layer, FusedTSigmaBN2d)
    assert converted["b"][1] is converted["c"][0] is converted["c"][1][0] is layer
    back = revert_model(converted, 0)
    assert back["b"][1] is back["c"][0] is back["c"][1][0] is back["a"][1]


def test_exclude_names_modules_with_all_that_is_in_them() -> None:
    plain = nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)), nn.BatchNorm2d(4))
    converted = convert_model(plain, T, exclude=["1", "2"])
    assert list(task_specific(converted)) == ["0"]
    with pytest.raises(ValueError, match=r"exclude names '3', '1\.x', not a module of Sequential"):
        convert_model(plain, T, exclude=["1", "3", "1.x"])


@variants
def test_options_of_the_plain_layer_stay(variant: Any) -> None:
    plain = nn.BatchNorm2d(4, eps=1e-3, momentum=None, dtype=torch.float64).eval()
    plain.weight.requires_grad_(False)
    plain.bias.requires_grad_(False)
    layer: Any = convert_model(plain, T, variant=variant)
    assert (layer.eps, layer.momentum, layer.training) == (1e-3, None, False)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert layer.weight.dtype == layer.running_var.dtype == torch.float64
    assert isinstance(layer.bias, nn.Parameter) == (variant == "tsbn")
    back: Any = revert_model(layer, 0)
    assert not back.weight.requires_grad
    assert (back.eps, back.momentum, back.training) == (1e-3, None, False)


def test_statistics_keep_a_dtype_of_their_own() -> None:
    plain = nn.BatchNorm2d(4)
    plain.weight.data, plain.bias.data = plain.weight.data.half() / 2, plain.bias.data.half()
    layer: Any = convert_model(plain, T)
    assert layer.weight.dtype == layer.bias.dtype == torch.float16
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    torch.testing.assert_close(layer.gates, torch.full((T, 4), 0.5, dtype=torch.float16))


def test_meta_device() -> None:
    layer: Any = convert_model(nn.BatchNorm2d(4, device="meta"), T)
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}


@variants
@pytest.mark.parametrize("tracking", [True, False])
def test_layers_without_parameters_or_statistics(tracking: bool, variant: Any) -> None:
    """The weight that affine=False stands for is one."""
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 1, dtype=torch.float64), nn.BatchNorm2d(4, affine=False, track_running_stats=tracking)
    ).double()
    converted = convert_model(plain, T, variant=variant, pretrained=True)
    assert converted[1].weight.dtype == torch.float64
    assert (converted[1].bias is None) == (variant == "ts_sigma_bn")
    x = torch.randn(N, 3, 5, 5, dtype=torch.float64)
    for training in (True, False):
        y = converted.train(training)(x.repeat(T, 1, 1, 1))
        torch.testing.assert_close(y[N : 2 * N], plain.train(training)(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(revert_model(converted, 0)(x), plain(x), rtol=1e-4, atol=1e-4)
    if tracking:
        fresh = convert_model(plain, T, variant=variant, pretrained=False)
        fresh.load_state_dict(plain.state_dict())
        torch.testing.assert_close(fresh(x.repeat(T, 1, 1, 1))[:N], plain(x), rtol=1e-4, atol=1e-4)


def test_layer_that_stopped_tracking() -> None:
    plain = nn.BatchNorm2d(4)
    plain.running_mean.fill_(2.0)
    plain.track_running_stats = False
    layer: Any = convert_model(plain, T, pretrained=True)
    assert layer.track_running_stats is False
    assert (layer.running_mean == 2).all()
    back: Any = revert_model(layer, 1)
    assert back.track_running_stats is False
    assert (back.running_mean == 2).all()


def test_weights_outside_of_the_gates_range_are_clipped() -> None:
    plain = nn.BatchNorm2d(4)
    plain.weight.data = torch.tensor([-1.0, 0.0, 0.25, 3.0])
    with pytest.warns(UserWarning, match=r"^2 scales of 1 layers, '', lie outside of \(0, 1\).*by up to 2: .*tsbn"):
        gates = convert_model(plain, T).gates[1]
    torch.testing.assert_close(gates, torch.tensor([1e-5, 1e-5, 0.25, 1 - 1e-5]))
    assert torch.equal(convert_model(plain, T, variant="tsbn").gates[1], plain.weight)


def test_not_pretrained_is_new() -> None:
    plain = pretrained("celeba")
    for layer in task_specific(convert_model(plain, T, pretrained=False)).values():
        assert (layer.gates == 0.5).all()
        assert layer.bias is None
        assert (layer.running_mean == 0).all()
        assert (layer.num_batches_tracked == 0).all()
    for layer in task_specific(convert_model(plain, T, pretrained=False, variant="tsbn")).values():
        assert (layer.gates == 1).all()
        assert (layer.bias == 0).all()


@networks
@variants
def test_plain_checkpoints_load_strictly(variant: Any, name: str) -> None:
    plain = pretrained(name)
    expected = convert_model(plain, T, variant=variant)
    fresh = convert_model(NETWORKS[name](), T, variant=variant)
    fresh.load_state_dict(plain.state_dict(), strict=True)
    assert_same_state(fresh, expected, rtol=0, atol=0)
    renewed = convert_model(NETWORKS[name](), T, variant=variant)
    renewed.load_state_dict(fresh.state_dict(), strict=True)
    assert_same_state(renewed, expected, rtol=0, atol=0)


def test_checkpoints_without_batch_counters_load() -> None:
    """Those of before PyTorch 0.4.1, and many that were converted from other frameworks."""
    state = {key: tensor for key, tensor in nn.BatchNorm2d(4).state_dict().items() if key != "num_batches_tracked"}
    nn.BatchNorm2d(4).load_state_dict(state)
    FusedTSigmaBN2d(T, 4, bias=True).load_state_dict(state)


def test_plain_checkpoints_that_do_not_fit_are_errors() -> None:
    state = nn.BatchNorm2d(4).state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bias"):
        FusedTSigmaBN2d(T, 4).load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        FusedTSigmaBN2d(T, 5, bias="frozen").load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*running_mean"):
        FusedTSigmaBN2d(T, 4, bias=True).load_state_dict({"weight": torch.ones(4), "bias": torch.ones(4)})


def test_nothing_to_do_is_an_error() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="Sequential has no normalisation to convert"):
        convert_model(convert_model(model, T), T)
    with pytest.raises(ValueError, match="Sequential has no normalisation to convert"):
        convert_model(model, T, exclude=["1"])
    with pytest.raises(ValueError, match="Sequential has no task-specific layer to revert"):
        revert_model(model, 0)
    with pytest.raises(IndexError, match="task 3 is out of range for num_tasks=3"):
        revert_model(convert_model(model, T), 3)
    with pytest.raises(ValueError, match="variant must be one of ts_sigma_bn, tsbn, got 'sigma'"):
        convert_model(model, T, variant="sigma")  # type: ignore[arg-type]


# ---- where the tasks start from --------------------------------------------------------------------------------------


def new(weight: float = 1.0) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    nn.init.constant_(model[1].weight, weight)
    return model


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_new_layers_start_with_gates_that_learn(weight: float) -> None:
    plain = nn.Sequential(new(weight), look_trained(new()))
    converted: Any = convert_model(plain, T)
    assert (converted[0][1].gates == 0.5).all()
    torch.testing.assert_close(converted[1][1].gates[2], plain[1][1].weight)
    converted.load_state_dict(plain.state_dict(), strict=True)
    converted = convert_model(new(weight), T, pretrained=True)
    torch.testing.assert_close(converted[1].gates, torch.full((T, 4), weight).clamp(1e-5, 1 - 1e-5))


@pytest.mark.parametrize("seen", ["a batch", "a bias", "a mean"])
def test_what_has_been_trained_is_not_new_and_says_what_to_pass(seen: str) -> None:
    plain = new()
    if seen == "a batch":
        plain(torch.randn(N, 3, 5, 5))
    else:
        nn.init.ones_(plain[1].bias if seen == "a bias" else plain[1].running_mean)  # type: ignore[index]
    with pytest.warns(UserWarning, match=r"gates start at 0.99999, where they hardly learn, in '1'.*pretrained=False"):
        converted: Any = convert_model(plain, T)
    assert (converted[1].gates > 0.99).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for pretrained_ in (True, False):
            convert_model(plain, T, pretrained=pretrained_)


def test_clipped_scales_are_told_of_once() -> None:
    plain = look_trained(nn.Sequential(*(nn.BatchNorm2d(4) for _ in range(5))))
    for norm in plain[:4]:  # type: ignore[index]
        norm.weight.data[1:3] = torch.tensor([1.5, -0.25])
    plain[4].weight.data[0] = 1.0  # type: ignore[index]  # which a gate nearly is
    with pytest.warns(
        UserWarning, match=r"^8 scales of 4 layers, '0', '1', '2' and 1 more, .* by up to 0.5: .*variant='tsbn'"
    ) as told:
        convert_model(plain, T)
    assert len(told) == 1 and told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted = convert_model(plain, T, variant="tsbn").eval()
    x = torch.randn(N, 4, 3, 3)
    torch.testing.assert_close(converted(x.repeat(T, 1, 1, 1))[:N], plain.eval()(x), rtol=1e-4, atol=1e-4)
    fresh = convert_model(nn.Sequential(nn.BatchNorm2d(4)), T)
    with pytest.raises(UserWarning, match="scales of a plain checkpoint lie outside"):
        fresh.load_state_dict({f"0.{key}": tensor for key, tensor in plain[0].state_dict().items()})  # type: ignore[index]
