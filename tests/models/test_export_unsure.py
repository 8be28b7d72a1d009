"""What must not be folded, because something else uses it or nobody knows what it computes, and what still is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.folding import TASKS, TOLERANCES, N, T, assert_close, export, normalisations, randomise, stream_of
from support.networks import pretrained
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tsbn_kernels import (
    FusedTSigmaBN,
    FusedTSigmaBN2d,
    MultiTaskModel,
    convert_model,
    export_task,
    fold_into_conv,
    use_backend,
)


class Awkward(nn.Module):
    """``uses`` says what else becomes of the convolution, or of the normalisation."""

    def __init__(self, uses: str) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.uses = uses
        if uses == "tied":
            self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        more = {
            "output": lambda: y,
            "conv twice": lambda: self.conv(2 * x),
            "norm twice": lambda: self.norm(self.other(x)),
            "weight": lambda: 2 * self.conv.weight.sum(),
            "gate": lambda: self.norm.weight.sum() * 0,
            "function": lambda: nn.functional.conv2d(x, self.conv.weight),
            "before": lambda: y,
            "relu": lambda: 0,
            "training": lambda: y if self.training else 0,
        }.get(self.uses, lambda: self.other(x))()
        if self.uses == "relu":
            y = y.relu()
        return self.norm(x if self.uses == "before" else y) + more


@pytest.mark.parametrize(
    "uses",
    [
        "output",
        "relu",
        "conv twice",
        "norm twice",
        "weight",
        "gate",
        "function",
        "before",
        "tied",
        "training",
        "nothing",
    ],
)
def test_only_what_a_normalisation_alone_uses_is_folded(uses: str) -> None:
    model = randomise(convert_model(Awkward(uses), T)).double()
    exported = export(copy.deepcopy(model).train(), 2)
    assert len(normalisations(exported)) == (uses not in ("tied", "training", "nothing"))
    x = torch.randn(N, 3, 6, 6, dtype=torch.float64)
    assert_close(exported(x), stream_of(model, x, 2))


def test_hooks_parametrisations_and_batch_statistics_stay() -> None:
    hooked, weight_normed = nn.Conv2d(3, 3, 1), parametrizations.weight_norm(nn.Conv2d(3, 3, 1))
    hooked.register_forward_hook(lambda _module, _args, y: 2 * y)
    plain = nn.Sequential(hooked, nn.BatchNorm2d(3), weight_normed, nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    model = randomise(convert_model(nn.Sequential(*plain, nn.BatchNorm2d(3)), T)).double()
    exported = export(model, 0)
    assert [type(exported[i]) for i in (1, 3, 5)] == [nn.BatchNorm2d, nn.BatchNorm2d, nn.Identity]
    x = torch.randn(N, 3, 6, 6, dtype=torch.float64)
    assert_close(exported(x), stream_of(model, x, 0))
    untracked = convert_model(
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)), T
    ).double()
    exported = export(untracked.eval(), 1)
    assert isinstance(exported[1], nn.BatchNorm2d)
    assert_close(exported(x), stream_of(untracked, x, 1))


def test_a_linear_layer_over_another_axis_is_an_error_and_never_folded_into_2d() -> None:
    model = randomise(convert_model(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm2d(3)), T)).double()
    exported = export(model, 0)
    assert isinstance(exported[1], nn.BatchNorm2d)
    x = torch.randn(N, 3, 6, 5, dtype=torch.float64)
    assert_close(exported(x), stream_of(model, x, 0))
    plain = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(3, 3), nn.BatchNorm1d(3))
    model = randomise(convert_model(plain, T)).double()
    exported = export(model, 0)  # what the first is given may have more axes
    assert [type(exported[i]) for i in (1, 4)] == [nn.BatchNorm1d, nn.Identity]
    x = torch.randn(N, 5, dtype=torch.float64)
    assert_close(exported(x), stream_of(model, x, 0))
    model = randomise(convert_model(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), T)).double()
    x = torch.randn(N, 3, 5, dtype=torch.float64)
    assert_close(export(model, 0)(x), stream_of(model, x, 0))


class Residual(nn.Module):
    def __init__(self, layer: FusedTSigmaBN, *, convolve: bool, of_itself: bool = False) -> None:
        super().__init__()
        self.of_itself = of_itself
        self.conv = nn.Conv2d(3, 3, 1) if convolve else nn.Identity()
        self.norm = layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y, residual=y if self.of_itself else x)


@pytest.mark.parametrize("convolve", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_residuals_are_added_before_the_activation(activation: Any, convolve: bool) -> None:
    model = randomise(Residual(FusedTSigmaBN2d(T, 3, activation=activation), convolve=convolve)).double()
    exported = export(model, 1)
    assert bool(normalisations(exported)) is not convolve
    x = torch.randn(N, 3, 6, 6, dtype=torch.float64)
    assert_close(exported(x), stream_of(model, x, 1))
    assert_close(torch.export.export(exported, (x,)).module()(x), exported(x))


def test_a_convolution_that_is_its_own_residual_stays() -> None:
    model = randomise(Residual(FusedTSigmaBN2d(T, 3), convolve=True, of_itself=True)).double()
    exported = export(model, 1)
    assert normalisations(exported)
    x = torch.randn(N, 3, 6, 6, dtype=torch.float64)
    assert_close(exported(x), stream_of(model, x, 1))


class FansOut(nn.Module):
    """Its first layer is told to fan one input out, which one stream of one task does into itself."""

    def __init__(self, *, convolve: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1) if convolve else nn.Identity()
        self.norm = FusedTSigmaBN2d(T, 3)
        self.next = nn.Sequential(nn.Conv2d(3, 4, 1), FusedTSigmaBN2d(T, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.next(self.norm(self.conv(x), fan_out=True))


@pytest.mark.parametrize("convolve", [True, False])
def test_one_stream_fans_out_into_itself(convolve: bool) -> None:
    model = randomise(FansOut(convolve=convolve)).double()
    x = torch.randn(N, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad(), use_backend("reference"):
        streams = model(x).chunk(T)
    for task, expected in enumerate(streams):
        exported = export(model, task)
        assert bool(normalisations(exported)) is not convolve
        assert_close(exported(x), expected)


class BatchNormAct2d(nn.BatchNorm2d):
    """What timm's class of that name adds to nn.BatchNorm2d; it is known by where it comes from."""

    __module__ = "timm.layers.norm_act"

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.drop, self.act = nn.Dropout(0.5), nn.PReLU(init=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_batch_norm_act_keeps_its_activation(dtype: torch.dtype) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4), BatchNormAct2d(4))
    model = randomise(convert_model(plain, T).to(dtype))
    exported = export(model, 1)
    assert [type(module) for module in exported] == [nn.Conv2d, nn.Sequential, BatchNormAct2d]
    assert {tensor.dtype for tensor in exported.parameters()} == {dtype}
    assert {"1.act.weight", "2.act.weight"} <= set(exported.state_dict())
    x = torch.randn(N, 3, 6, 6, dtype=dtype)
    assert_close(exported(x), stream_of(model, x, 1))


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.norm(self.conv(x))
        return y if y.sum() > 0 else -y


def test_a_model_that_cannot_be_traced_stays_correct_and_says_so() -> None:
    model = randomise(convert_model(Untraceable(), T, fuse_activation=False)).double()
    with pytest.warns(
        UserWarning, match=r"cannot trace Untraceable, its norm.* unfolded in 'norm': TraceError"
    ) as told:
        exported = export_task(model, 1)
    assert len(told) == 1 and told[0].filename == __file__
    assert isinstance(exported.norm, nn.BatchNorm2d)
    assert model.calls == exported.calls == 0
    x = torch.randn(N, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(exported(x).abs(), stream_of(model, x, 1).abs())
    multitask = MultiTaskModel(model, {name: Untraceable() for name in TASKS})
    with pytest.warns(UserWarning, match="cannot trace Untraceable.*; torch.fx cannot trace Untraceable") as told:
        export_task(multitask, "hat")
    assert len(told) == 1


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.norm(self.conv(x))
        return self.last


def test_tracing_leaves_nothing_behind() -> None:
    model = randomise(convert_model(Remembers(), T))
    exported = export(model, 0)
    assert model.last is exported.last is None
    assert not normalisations(exported)


def test_shared_modules_are_folded_where_they_stand() -> None:
    block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    plain = nn.Sequential(block, nn.ReLU())
    plain.alias = block  # another name, not another call: nn.Sequential runs it too
    model = randomise(convert_model(plain, T)).double()
    exported = export(model, 0)
    assert exported.alias[0] is exported[0][0] and exported.alias[1] is exported[0][1]
    x = torch.randn(N, 3, 6, 6, dtype=torch.float64)
    assert_close(exported(x), stream_of(model, x, 0))


def test_nothing_to_export_is_an_error() -> None:
    model = MultiTaskModel(convert_model(pretrained("celeba"), T), {name: nn.Identity() for name in TASKS})
    with pytest.raises(ValueError, match="task must be one of age, smile, hat, or an index, got 'shoe'"):
        export_task(model, "shoe")
    for exportable in (model, model.backbone):
        with pytest.raises(IndexError, match="task 3 is out of range for num_tasks=3"):
            export_task(exportable, 3)
    with pytest.raises(TypeError, match="CelebA has no heads to be named, task must be an index, got 'age'"):
        export_task(model.backbone, "age")
    with pytest.raises(ValueError, match="Sequential has no task-specific layer; convert it with convert_model"):
        export_task(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), 0)
    with pytest.raises(ValueError, match="Sequential has a MultiTaskModel inside; export that one"):
        export_task(nn.Sequential(model), 0)


@pytest.mark.parametrize("kind", ["layer hook", "forward of the convolution", "subclass"])
def test_only_what_is_known_is_folded(kind: str) -> None:
    model = randomise(convert_model(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), T, fuse_activation=False))
    conv, norm = model.double()
    if kind == "layer hook":
        norm.register_forward_hook(lambda _, __, y: 2 * y)
    elif kind == "forward of the convolution":
        forward = conv.forward
        conv.forward = lambda x: 2 * forward(x)
    else:
        conv.__class__ = type("Own", (nn.Conv2d,), {"forward": lambda self, x: 2 * nn.Conv2d.forward(self, x)})
    x = torch.randn(N, 3, 6, 6, dtype=torch.float64)
    exported = export(model, 1)
    assert isinstance(exported[1], nn.BatchNorm2d)
    assert_close(exported(x), stream_of(model, x, 1))
    error = TypeError if kind == "subclass" else ValueError
    with pytest.raises(error, match="cannot fold"):
        fold_into_conv(conv, norm, 1)


class FoldsItself(nn.Module):
    """As timm's RepVGG block: two branches that it makes one convolution of, reading what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(2))

    def reparameterize(self) -> None:
        folded = [nn.utils.fuse_conv_bn_eval(conv, bn) for conv, bn in self.branches]
        conv = copy.deepcopy(folded[0])
        conv.weight.data += folded[1].weight
        conv.bias.data += folded[1].bias
        self.branches = nn.ModuleList([conv])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = sum(branch(x) for branch in self.branches)
        return y


def test_blocks_that_fold_themselves_can() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), FoldsItself())
    model = randomise(convert_model(plain, T)).double()
    exported = export(model, 1)
    assert type(exported[1]) is nn.Identity
    exported[2].reparameterize()
    assert not normalisations(exported)
    x = torch.randn(N, 3, 6, 6, dtype=torch.float64)
    assert_close(exported(x), stream_of(model, x, 1))
