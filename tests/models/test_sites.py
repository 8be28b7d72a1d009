"""Activations that a forward calls at several places, or as functions: left out at some, in the code of the forward."""

from __future__ import annotations
import __future__

import copy
import linecache
import pickle
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from support.networks import look_trained
from test_fuse_activations import assert_same, both, edited, fused, standing
from torch import Tensor, nn

from tsbn_kernels import convert_model, export_task, revert_model

T, N = 2, 3


class Block(nn.Module):
    """Two normalisations, one activation that is no ReLU: twice is not once."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.other, self.act, self.slope = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.SiLU(inplace=True), 0.3
        self.calls: list[str] = []


class BehindAddition(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.calls.append("called")
        return self.act(self.act(self.bn(x)) + self.other(x))


class AddedInPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(x)
        out = self.act(out)
        out = self.other(out)
        out += x
        out = self.act(out)
        return out  # noqa: RET504


class InARow(Block):
    def forward(self, x: Tensor, twice: bool = True) -> Tensor:
        y = self.act(self.act(self.bn(x)) * 1.0)
        return self.other(y) if twice else y


class OnTheInput(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.act(x * 1.0)))


class Inherited(BehindAddition):
    pass


class Super(Block):
    """Needs the class that it stands in, and calls the activation by another name."""

    def __init__(self) -> None:
        super().__init__()
        self.other_name = self.act

    def forward(self, x: Tensor) -> Tensor:
        x = x + len(super().extra_repr())
        return self.act(self.act(self.bn(x)) + x)


def closed_over(scale: float) -> nn.Module:
    class Closed(Block):
        def forward(self, x: Tensor) -> Tensor:
            parts = [self.act(norm(x)) for norm in (self.bn, self.other)]
            return self.act(parts[0] + scale * parts[1])

    return Closed()


class Functions(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(x), inplace=True)
        return F.relu(nn.functional.leaky_relu(self.other(y), 0.3) + x)


class Methods(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.bn(x).relu_()).relu() + torch.relu(x)


class Computed(Block):
    """The slope is read when the forward runs; what it was in the trace is what the layer applies."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(F.leaky_relu(self.bn(x), self.slope) + x)


SITES: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "behind an addition": (BehindAddition, {"bn": "silu"}),
    "added in place": (AddedInPlace, {"bn": "silu"}),
    "in a row": (InARow, {"bn": "silu"}),
    "on the input first": (OnTheInput, {"bn": "silu"}),
    "inherited": (Inherited, {"bn": "silu"}),
    "super": (Super, {"bn": "silu"}),
    "closed over": (lambda: closed_over(0.5), {"bn": "silu", "other": "silu"}),
    "functions": (Functions, {"bn": "relu", "other": "leaky_relu"}),
    "methods": (Methods, {"bn": "relu", "other": "relu"}),
    "computed": (Computed, {"bn": "leaky_relu"}),
}


@pytest.mark.parametrize("site", SITES)
def test_one_place_of_several(site: str) -> None:
    make, layers = SITES[site]
    plain = make()
    model, unfused = both(plain)
    assert fused(model) == layers
    assert edited(model) == {""}
    assert not standing(model)
    assert type(model).__name__ == type(plain).__name__
    assert isinstance(model, type(plain))
    assert repr(model.act) == repr(plain.act)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not model.calls
    assert_same(model, unfused)
    assert model.calls == unfused.calls
    x = torch.randn(N, 3, 4, 4, dtype=torch.float64)
    back = revert_model(model, 1)
    assert type(back) is type(plain)
    assert repr(back) == repr(plain)
    assert vars(back).keys() == vars(plain).keys()
    for one in (back, export_task(model, 1)):
        torch.testing.assert_close(one(x), revert_model(unfused, 1)(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("make", [BehindAddition, Functions])
def test_copies(make: Any, duplicate: Any) -> None:
    plain = nn.Sequential(make(), make())
    model, unfused = both(plain)
    other = duplicate(model)
    assert_same(other, copy.deepcopy(unfused))
    assert repr(revert_model(other, 0)) == repr(plain)  # asks the copy's layers, not the model's
    if duplicate is not copy.copy:
        assert_same(model, unfused)


def test_a_pickle_of_another_forward_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = both(BehindAddition())
    dumped = pickle.dumps(model)
    monkeypatch.setattr(BehindAddition, "forward", AddedInPlace.forward)
    from tsbn_kernels.models import sites

    sites._definition.cache_clear()
    sites._subclass.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="the forward of BehindAddition is not what it was"):
            pickle.loads(dumped)
    finally:
        sites._definition.cache_clear()
        sites._subclass.cache_clear()


@pytest.mark.parametrize("make", [BehindAddition, Functions])
def test_compiled_and_exported(make: Any) -> None:
    model, unfused = both(nn.Sequential(make(), make()))
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    x = torch.randn(T * N, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(compiled(x), copy.deepcopy(unfused)(x))
    model.eval(), unfused.eval()
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), unfused(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), unfused(x))


def hook(model: Any) -> None:
    model.bn.register_forward_hook(lambda _, __, y: y * 1.0)


def block_hook(model: Any) -> None:
    model.register_forward_hook(lambda _, __, y: y * 1.0)


def activation_hook(model: Any) -> None:
    model.act.register_forward_hook(lambda _, __, y: y * 1.0)


def pre_hook(model: Any) -> None:
    model.bn.register_forward_pre_hook(lambda _, args: (args[0] * 1.0,))


def compiled_layer(model: Any) -> None:
    model.bn.compile(backend="aot_eager")


def compiled_block(model: Any) -> None:
    model.compile(backend="aot_eager")


def own_forward(model: Any) -> None:
    forward = model.bn.forward
    model.bn.forward = lambda *args, **options: forward(*args, **options) * 1.0


@pytest.mark.parametrize(
    "change", [hook, block_hook, activation_hook, pre_hook, compiled_layer, compiled_block, own_forward]
)
def test_an_activation_acts_once_whatever_replaces_the_output(change: Callable[[Any], None]) -> None:
    model, unfused = both(BehindAddition())
    change(model)
    assert_same(model, unfused)


def test_code_that_cannot_be_read_stays_and_says_so() -> None:
    source = "def forward(self, x):\n    return self.act(self.act(self.bn(x)) + x)\n"
    names: dict[str, Any] = {}
    exec(source, names)
    unread = type("Unread", (Block,), {"forward": names["forward"]})()
    with pytest.warns(
        UserWarning, match=r"unfused behind 'bn': .*; a module of its own for each place, such as nn.ReLU"
    ):
        model = convert_model(look_trained(unread.double()), T)
    assert not fused(model) and not edited(model)


def test_the_code_is_what_its_file_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file may have changed since it was imported, or a decorator may have put another function there."""
    from tsbn_kernels.models import sites

    monkeypatch.setattr(
        BehindAddition.forward,
        "__code__",
        AddedInPlace.forward.__code__.replace(co_firstlineno=BehindAddition.forward.__code__.co_firstlineno),
    )
    sites._definition.cache_clear()
    try:
        assert sites._definition(BehindAddition) is None
    finally:
        sites._definition.cache_clear()


CELL = """
class OfACell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(3), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.act(self.bn(x)) + x)
"""


def test_a_cell_of_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code is compiled with what an earlier cell has imported of the future, as here by this file."""
    cell = types.ModuleType("cell")
    cell.__file__ = "<cell>"
    vars(cell)["nn"] = nn
    monkeypatch.setitem(sys.modules, "cell", cell)
    monkeypatch.setitem(linecache.cache, "<cell>", (len(CELL), None, CELL.splitlines(keepends=True), "<cell>"))
    exec(compile(CELL, "<cell>", "exec", __future__.annotations.compiler_flag), vars(cell))
    model, unfused = both(nn.Sequential(cell.OfACell()))
    assert fused(model) == {"0.bn": "silu"}
    assert_same(model, unfused)


def test_blocks_are_told_from_each_other() -> None:
    """Of two blocks of one class one has a normalisation that is not converted."""
    plain = nn.Sequential(BehindAddition(), BehindAddition())
    model, unfused = both(plain, exclude="1.bn")
    assert fused(model) == {"0.bn": "silu"}
    assert edited(model) == {"0"}
    assert_same(model, unfused)
    later = convert_model(model, T)
    assert fused(later) == {"0.bn": "silu", "1.bn": "silu"}
    assert_same(later, convert_model(unfused, T, fuse_activation=False))
    assert repr(revert_model(later, 0)) == repr(plain)


def test_torchvision_blocks() -> None:
    models = pytest.importorskip("torchvision").models
    for make, count in ((models.resnet18, 9), (models.googlenet, 59)):
        options = {"init_weights": False} if make is models.googlenet else {}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(fused(convert_model(look_trained(make(**options)), T))) == count
