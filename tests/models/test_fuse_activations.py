"""Activations inside the layers of a converted model, against the same conversion with the activations left outside."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.networks import NETWORKS, ResNet, pretrained
from torch import Tensor, nn

from tsbn_kernels import (
    FusedTSigmaBN,
    MultiTaskModel,
    convert_model,
    export_task,
    fold_into_conv,
    revert_model,
    task_index,
)
from tsbn_kernels.definition.activations import TABLE
from tsbn_kernels.models.fuse_activations import FusedActivation

T, N = 2, 3


def fused(model: nn.Module) -> dict[str, str]:
    """The layers with an activation inside."""
    layers = ((name, m) for name, m in model.named_modules() if isinstance(m, FusedTSigmaBN))
    return {name: layer.activation for name, layer in layers if layer.activation is not None}


def standing(model: nn.Module) -> set[str]:
    """The places of activations that layers apply."""
    return {name for name, module in model.named_modules() if isinstance(module, FusedActivation)}


def edited(model: nn.Module) -> set[str]:
    """The modules whose forward does without some calls."""
    return {name for name, module in model.named_modules() if "_tsbn_origin" in vars(type(module))}


def outcome(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Of training and of evaluation: the output and all gradients; then the state."""
    results = []
    for training in (True, False):
        model.train(training)
        x = x.clone().requires_grad_()
        y = model(x)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
        results += [y, *(g for g in torch.autograd.grad(y, leaves, upstream, allow_unused=True) if g is not None)]
    return results + list(model.state_dict().values())


def assert_same(model: nn.Module, other: nn.Module, size: int = 6) -> None:
    x = torch.randn(T * N, 3, size, size, dtype=torch.float64)
    for got, wanted in zip(outcome(model, x), outcome(other, x), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def both(plain: nn.Module, **options: Any) -> tuple[Any, Any]:
    """A conversion that is as silent as it should be, and one without fused activations."""
    plain = randomise(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return convert_model(plain, T, **options), convert_model(plain, T, fuse_activation=False, **options)


def randomise(plain: nn.Module) -> nn.Module:
    for module in plain.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.2, 0.95)
            nn.init.normal_(module.bias)
    return plain.double()


LAYERS = {
    "resnet18": {"bn1", *(f"stages.{s}.{b}.bn1" for s in range(4) for b in range(2))},
    "bottleneck": {"bn1", *(f"stages.{s}.{b}.bn{k}" for s in range(2) for b in range(2) for k in (1, 2))},
    "segnet": {"encoder.0.1", "encoder.1.1", "decoder.0.1", "decoder.1.1"},
    "celeba": {name for name, module in NETWORKS["celeba"]().named_modules() if hasattr(module, "running_mean")},
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("stacking", ["task_major", "sample_major"])
def test_networks(stacking: str, name: str) -> None:
    model, unfused = both(NETWORKS[name](), stacking=stacking)
    assert set(fused(model)) == LAYERS[name]
    blocks = {path.rpartition(".")[0] for path in LAYERS[name]} - {""}
    if "stages" in "".join(LAYERS[name]):  # one ReLU in several places; that of the stem is in one
        assert standing(model) == {"relu"}
        assert edited(model) == blocks
    else:
        assert len(standing(model)) == len(LAYERS[name])
        assert not any(isinstance(module, nn.ReLU) for module in model.modules())
    assert not fused(unfused)
    assert list(model.state_dict()) == list(NETWORKS[name]().state_dict())
    assert_same(model, unfused, 32)
    assert not any(module.training for module in revert_model(model, 1).modules())  # after evaluation


class Chain(nn.Module):
    """What ``way`` makes of a normalisation and an activation."""

    def __init__(self, way: Callable[[Any, Tensor], Tensor], act: nn.Module) -> None:
        super().__init__()
        self.norm, self.act, self.way = nn.BatchNorm2d(3), act, way
        self.other, self.more, self.drop = nn.BatchNorm2d(3), nn.SiLU(), nn.Dropout(0.0)
        self.inside, self.gelu = nn.Sequential(self.other), nn.GELU()
        self.nothing, self.calls = nn.Identity(), 0

    def forward(self, x: Tensor, plain: bool = False) -> Tensor:
        self.calls += 1
        return self.norm(x) if plain else self.way(self, x)


def _in_place(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    m.act(y)
    return y * 2


class Twice(Chain):
    """Its activation is called behind each of two layers."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__(lambda _, x: x, act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.other(self.act(self.norm(x))))


class BehindAnAddition(Chain):
    """Its activation is called behind a layer and elsewhere, as in torchvision's residual blocks."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__(lambda _, x: x, act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.other(self.act(self.norm(x))) + x)


@pytest.mark.parametrize(
    ("act", "activation"),
    [
        *((row.module(0.3), name) for name, row in TABLE.items()),
        (nn.ReLU(inplace=True), "relu"),
        (nn.Hardtanh(0.0, 6.0), "relu6"),
        (nn.Hardtanh(0.0, 20.0), None),
        (nn.PReLU(), None),
    ],
    ids=repr,
)
def test_activations(act: nn.Module, activation: str | None) -> None:
    plain = Chain(lambda m, x: m.act(m.norm(x)), act)
    model, unfused = both(plain)
    assert fused(model) == ({} if activation is None else {"norm": activation})
    assert isinstance(model.act, nn.Identity) is (activation is not None)
    assert_same(model, unfused)
    assert repr(revert_model(model, 0)) == repr(plain)


def _keep(model: Any, x: Tensor) -> Tensor:
    model.kept = {"features": [model.norm(x)]}
    return model.act(model.kept["features"][0])  # type: ignore[no-any-return]


WAYS: dict[str, tuple[Callable[[Any, Tensor], Tensor], set[str], set[str]]] = {
    "twice": (lambda m, x: m.act(m.norm(m.act(m.norm(x)))), {"norm"}, {"act"}),
    "identity between": (lambda m, x: m.act(m.nothing(m.norm(x))), {"norm"}, {"act"}),
    "out of a container": (lambda m, x: m.act(m.inside(x)), {"other"}, {"act"}),
    "two layers": (lambda m, x: m.act(m.norm(x)) + m.act(m.other(x)), {"norm", "other"}, {"act"}),
    "only evaluation": (lambda m, x: m.act(m.norm(x) if m.training else m.other(x)), {"norm", "other"}, {"act"}),
    "skip": (lambda m, x: (y := m.norm(x)) + m.act(y), set(), set()),
    "in place, of what is read": (_in_place, set(), set()),
    "kept as an attribute": (_keep, set(), set()),
    "drop between": (lambda m, x: m.act(m.drop(m.norm(x))), set(), set()),
    "addition between": (lambda m, x: m.act(m.norm(x) + x), set(), set()),
    "one of two calls": (lambda m, x: m.norm(m.act(m.norm(x))), set(), set()),
    "two activations of one kind": (lambda m, x: m.more(m.norm(m.act(m.norm(x)))), {"norm"}, {"act", "more"}),
    "two kinds": (lambda m, x: m.gelu(m.norm(m.act(m.norm(x)))), set(), set()),
    "only in training": (lambda m, x: m.act(m.norm(x)) if m.training else m.norm(x), set(), set()),
    "one of two kinds in training": (
        lambda m, x: m.act(m.norm(x)) if m.training else m.gelu(m.norm(x)),
        set(),
        set(),
    ),
    "none": (lambda m, x: m.norm(x), set(), set()),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("inplace", [True, False])
def test_only_what_an_activation_alone_follows_is_fused(inplace: bool, way: str) -> None:
    forward, layers, stands = WAYS[way]
    plain = Chain(forward, nn.SiLU(inplace=inplace))
    model, unfused = both(plain)
    assert set(fused(model)) == layers
    assert standing(model) == stands
    assert model.calls == 0
    assert_same(model, unfused)
    x = torch.randn(T * N, 3, 4, 4, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), unfused(x))
    torch.testing.assert_close(getattr(model, "kept", None), getattr(unfused, "kept", None))
    vars(model).pop("kept", None), vars(unfused).pop("kept", None)
    back, expected = revert_model(model, 1), revert_model(unfused, 1)
    assert repr(back) == repr(expected)
    assert list(back.state_dict()) == list(expected.state_dict())
    torch.testing.assert_close(back(x[:N]), expected(x[:N]), rtol=0, atol=0)


@pytest.mark.parametrize("place", ["act", "inside", "nothing"])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_between_sees_what_it_saw(register: str, place: str) -> None:
    plain = Chain(lambda m, x: m.act(m.nothing(m.inside(x))), nn.SiLU())
    seen: list[Tensor] = []
    getattr(plain.get_submodule(place), register)(lambda *args: seen.append(args[-1][0]))
    model, _ = both(plain)
    assert not fused(model)
    assert not seen


def test_a_hook_around_does_not_matter() -> None:
    plain = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))
    seen: list[Tensor] = []
    plain[0].register_forward_hook(lambda _, __, y: seen.append(y))
    model, unfused = both(plain)
    assert fused(model) == {"0.1": "relu"}
    assert not seen
    x = torch.randn(T * N, 3, 4, 4, dtype=torch.float64)
    model(x), unfused(x)
    torch.testing.assert_close(*seen)


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("place", ["norm", "act"])
def test_backward_hooks_on_the_converted_model(place: str, register: str) -> None:
    """They put an operator of their own between the layer and the activation."""
    model, unfused = both(BehindAnAddition(nn.SiLU()))
    called: list[nn.Module] = []
    getattr(model.get_submodule(place), register)(lambda module, *_: called.append(module))
    assert_same(model, unfused)
    assert called


def test_excluded_modules_stay() -> None:
    plain = BehindAnAddition(nn.SiLU())
    model, unfused = both(plain, exclude="other")
    assert fused(model) == {"norm": "silu"}
    assert edited(model) == {""}
    assert_same(model, unfused)
    model, _ = both(plain, exclude="act")
    assert not fused(model)
    assert type(model.act) is nn.SiLU


def test_converted_in_two_steps() -> None:
    plain = Twice(nn.SiLU())
    first, unfused = both(plain, exclude="other")
    assert fused(first) == {"norm": "silu"}
    model = convert_model(first, T)
    unfused = convert_model(unfused, T, fuse_activation=False)
    assert fused(model) == {"norm": "silu", "other": "silu"}
    assert_same(model, unfused)
    assert repr(revert_model(model, 0)) == repr(plain)


def test_in_place() -> None:
    plain = randomise(Chain(lambda m, x: m.act(m.norm(x)), nn.SiLU()))
    _, unfused = both(plain)
    assert type(plain.act) is nn.SiLU
    assert convert_model(plain, T, inplace=True) is plain
    assert fused(plain) == {"norm": "silu"}
    assert_same(plain, unfused)
    assert type(plain) is Chain


def untraceable(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.act(m.norm(x))
    return y if y.sum() > 0 else m.inside(y)


def test_a_model_that_cannot_be_traced_is_converted_and_says_so() -> None:
    plain = randomise(Chain(untraceable, nn.ReLU()))
    with pytest.warns(UserWarning, match=r"unfused behind 'norm', 'other': torch.fx cannot trace Chain: Tr") as told:
        model = convert_model(plain, T)
    assert len(told) == 1 and told[0].filename == __file__
    assert not fused(model) and not standing(model) and model.calls == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unfused = convert_model(plain, T, fuse_activation=False)
    assert_same(model, unfused)


@pytest.mark.parametrize(
    "function",
    [*(function for row in TABLE.values() for function in row.functions), lambda y: y.relu_()],
)
def test_functions_are_left_and_named(function: Any) -> None:
    plain = randomise(Chain(lambda m, x: m.act(m.other(function(m.norm(x)))), nn.SiLU()))
    with pytest.warns(
        UserWarning, match="unfused behind 'norm': what calls them calls them elsewhere too, or its code"
    ) as told:
        model = convert_model(plain, T)
    assert len(told) == 1 and told[0].filename == __file__
    assert fused(model) == {"other": "silu"}
    assert_same(model, convert_model(plain, T, fuse_activation=False))


class BatchNormAct2d(nn.BatchNorm2d):
    """What timm's class of that name adds to nn.BatchNorm2d; it is known by where it comes from."""

    __module__ = "timm.layers.norm_act"

    def __init__(self, num_features: int, act: nn.Module, drop: nn.Module) -> None:
        super().__init__(num_features)
        self.drop, self.act = drop, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


@pytest.mark.parametrize(
    ("act", "drop", "activation"),
    [
        (nn.SiLU(inplace=True), nn.Identity(), "silu"),
        (nn.SiLU(), nn.Dropout(0.0), None),
        (nn.PReLU(), nn.Identity(), None),
    ],
    ids=repr,
)
def test_the_activation_of_batch_norm_act(act: nn.Module, drop: nn.Module, activation: str | None) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4, act, drop), nn.ReLU())
    model, unfused = both(plain)
    assert model[1].activation == activation
    assert list(model.state_dict()) == list(plain.state_dict())
    assert_same(model, unfused)
    x = torch.randn(N, 3, 4, 4, dtype=torch.float64)
    for copied in (model, unfused):
        assert repr(revert_model(copied, 1)) == repr(plain)
        assert repr(copied[1].task(1)) == repr(plain[1])
    expected = revert_model(unfused.eval(), 1)(x)
    with task_index(torch.ones(N, dtype=torch.int64)):
        for one in (model.eval(), unfused):
            torch.testing.assert_close(one(x), expected)
    folded = fold_into_conv(model[0], model[1], 1)
    for one in (revert_model(model.eval(), 1), export_task(model, 1), nn.Sequential(folded, nn.ReLU())):
        torch.testing.assert_close(one(x), expected)


def test_a_hooked_activation_of_batch_norm_act_stays() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4, nn.SiLU(), nn.Identity()))
    plain[1].act.register_forward_hook(lambda *_: None)
    model, _ = both(plain)
    assert not fused(model)


def test_an_activation_inside_of_another_layer_stays() -> None:
    act = nn.SiLU()
    plain = nn.Sequential(BatchNormAct2d(3, act, nn.Identity()), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), act)
    model, unfused = both(plain)
    assert fused(model) == {"0": "silu"}
    assert_same(model, unfused)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_equal_and_separate(duplicate: Any) -> None:
    plain = pretrained("resnet18", torch.float64)
    model = convert_model(plain, T)
    other = duplicate(model)
    assert fused(other) == fused(model) and standing(other) == standing(model)
    back = revert_model(other, 0)  # asks the copy's layers, not the model's
    assert repr(back) == repr(plain)
    assert_same(model, other, 32)
    assert fused(model) == fused(other) != {}


def test_a_multi_task_model_under_compile() -> None:
    tasks = [f"task{t}" for t in range(T)]
    backbones = both(ResNet((1, 1)))
    model, unfused = (MultiTaskModel(backbone, dict.fromkeys(tasks, nn.Identity())) for backbone in backbones)
    assert edited(model)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    x = torch.randn(N, 3, 32, 32, dtype=torch.float64)
    for task, expected in unfused(x).items():
        for streams in (model(x), compiled(x)):
            torch.testing.assert_close(streams[task], expected)


def test_vmap_over_shared_activations() -> None:
    model, unfused = both(BehindAnAddition(nn.SiLU()))
    x = torch.randn(2, T * N, 3, 4, 4, dtype=torch.float64)
    results = [torch.func.vmap(m.eval())(x) for m in (model, unfused)]
    torch.testing.assert_close(*results)


def test_a_model_is_converted_in_two_parts() -> None:
    plain = ResNet((1, 1))
    half = convert_model(plain, T, exclude="stages.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fused(convert_model(half, T)) == fused(convert_model(plain, T))
