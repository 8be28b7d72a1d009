"""What a backbone may return beside one tensor: any structure, and values that are no batch."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from tsbn_kernels import MultiTaskModel, convert_model, revert_model

TASKS = ("a", "b", "c")
T, N, C = 3, 2, 4
Pair = namedtuple("Pair", "low high")


class Typed(NamedTuple):
    low: Tensor
    rest: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    low: Tensor
    high: Any
    count: int = dataclasses.field(default=7, init=False)


class Output(OrderedDict[str, Any]):
    """As the outputs of Hugging Face's models: items are attributes too."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)


class Checked(Pair):
    """Takes one argument, and computes the other."""

    def __new__(cls, low: Tensor) -> Checked:
        return super().__new__(cls, low, low * 2)


class Rows(list[Any]):
    """A list of a user's own."""


def output(**items: Any) -> Output:
    result = Output()
    for key, value in items.items():
        result[key] = value
    return result


class Backbone(nn.Module):
    """Returns whatever ``make`` makes of itself and its features ``[N, C, 4, 4]``."""

    def __init__(self, make: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, C, 1), nn.BatchNorm2d(C)
        self.parameter = nn.Parameter(torch.arange(float(T)))
        self.register_buffer("buffer", torch.arange(float(2 * T)))
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(self, self.norm(self.conv(x)))


def build(make: Callable[[Any, Tensor], Any]) -> MultiTaskModel:
    backbone = convert_model(Backbone(make), T, pretrained=False, fuse_activation=False)
    nn.init.normal_(backbone.norm.weight)
    return MultiTaskModel(backbone, {task: nn.Identity() for task in TASKS})


def assert_equal(got: Any, wanted: Any) -> None:
    """Values and classes, all the way down."""
    if isinstance(wanted, Tensor):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        return
    assert type(got) is type(wanted)
    if isinstance(wanted, Mapping):
        assert list(got) == list(wanted)
        for key in wanted:
            assert_equal(got[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            assert_equal(one, other)
    elif dataclasses.is_dataclass(wanted):
        for field in dataclasses.fields(wanted):
            assert_equal(getattr(got, field.name), getattr(wanted, field.name))
    else:
        assert got == wanted


STRUCTURES: dict[str, Callable[[Any, Tensor], Any]] = {
    "tuple": lambda _, y: (y, y[..., ::2]),
    "list": lambda _, y: [y, [y.mean((2, 3))]],
    "named tuple": lambda _, y: Pair(y, y[..., ::2]),
    "typed tuple": lambda _, y: Typed(y),
    "named tuple with a constructor of its own": lambda _, y: Checked(y),
    "what max returns": lambda _, y: y.flatten(2).max(2),
    "dict": lambda _, y: {"low": y, "more": {"high": y * 2, 3: None}},
    "ordered dict": lambda _, y: OrderedDict(low=y, high=[y * 2]),
    "default dict": lambda _, y: defaultdict(list, low=y),
    "model output": lambda _, y: output(low=y, hidden=(y, y * 2)),
    "read-only mapping": lambda _, y: MappingProxyType({"low": y}),
    "list of a class": lambda _, y: Rows([y, y * 2]),
    "dataclass": lambda _, y: Frozen(y, {"high": Pair(y, y.flatten(1))}),
    "one tensor twice": lambda _, y: (y, y),
    "what is no tensor": lambda _, y: (y, None, True, 3, 2.5, "text", torch.float32, y.shape[1:], y.device),
    "scalar": lambda b, y: (y, b.parameter.sum(), torch.tensor(3.0)),
    "tokens in the batch": lambda _, y: y.flatten(2).transpose(1, 2).flatten(0, 1),
    "tokens beside": lambda _, y: {"map": y, "tokens": y.flatten(2).transpose(1, 2).flatten(0, 1)},
}
SHARED: dict[str, Callable[[Any], Any]] = {
    "parameter": lambda b: b.parameter,
    "part of a parameter": lambda b: b.parameter[:1],
    "detached parameter": lambda b: b.parameter.detach(),
    "view of a buffer": lambda b: b.buffer.view(T, 2),
    "buffer": lambda b: b.buffer,
    "computed from a parameter": lambda b: b.parameter.softmax(0),
    "rows of it": lambda b: b.parameter.repeat(2).view(2 * T, 1) * 2,
}


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("name", STRUCTURES)
def test_heads_get_the_structure_of_the_backbone(name: str, stacked: bool) -> None:
    """Of the type that it returns, whether or not gradients are wanted."""
    model = build(STRUCTURES[name])
    x = torch.randn(N, 3, 4, 4)
    for training in (True, False):
        model.train(training)
        plain = [revert_model(model.backbone, t) for t in range(T)]
        with torch.set_grad_enabled(training):
            if name == "read-only mapping":
                for one in plain:
                    one.make = lambda _, y: {"low": y}
            if stacked and "beside" in name and not training:
                continue  # without a graph nothing tells tokens from what is no batch
            if stacked and "beside" in name:
                with pytest.raises(ValueError, match="2 samples for each of 3 tasks"):
                    model(dict.fromkeys(TASKS, x))
                continue
            if "beside" in name and not training:
                with pytest.raises(ValueError, match="2 samples for each of 3 tasks"):
                    model(x)
                continue
            got = model(dict.fromkeys(TASKS, x) if stacked else x)
            for task, one in zip(TASKS, plain, strict=True):
                assert_equal(got[task], one(x))


@pytest.mark.parametrize("samples", [1, 2, 3, 4])
@pytest.mark.parametrize("name", SHARED)
def test_what_is_no_batch_goes_to_every_task_as_it_is(name: str, samples: int) -> None:
    make = SHARED[name]
    model = build(lambda b, y: {"features": y, "extra": make(b)})
    wanted, x = make(model.backbone), torch.randn(samples, 3, 4, 4)
    if wanted.grad_fn is not None and not wanted._is_view() and len(wanted) % (T * samples) == 0:
        with pytest.raises(ValueError, match=r"may hold a batch of .* or what all of them share\."):
            model(x)
        return
    for task, features in model(x).items():
        assert torch.equal(features["extra"], wanted), task
        assert features["features"].shape[0] == samples


def test_what_a_stop_gradient_hides_is_not_handed_on_whole() -> None:
    model = build(lambda b, y: (y, b.conv(y[:, :3].detach()))).eval()
    x = torch.randn(N, 3, 4, 4)
    with pytest.raises(ValueError, match="give every task the input"):
        model(x)
    plain = revert_model(model.backbone, 1)
    assert_equal(model(dict.fromkeys(TASKS, x))["b"], plain(x))


@pytest.mark.parametrize("name", [name for name in SHARED if "of" not in name.split() and "from" not in name])
def test_the_same_without_gradients(name: str) -> None:
    make = SHARED[name]
    model = build(lambda b, y: (y, make(b))).eval()
    with torch.no_grad():
        for samples in (1, 2):
            for _, extra in model(torch.randn(samples, 3, 4, 4)).values():
                assert torch.equal(extra, make(model.backbone))


def test_what_may_be_either_is_an_error() -> None:
    """One value of each task, or T values that all share: a graph tells, and without one nothing does."""
    model = build(lambda b, y: (y, y.mean((1, 2, 3)))).eval()
    plain, x = revert_model(model.backbone, 1), torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(model(x)["b"][1], plain(x)[1])
    with (
        torch.no_grad(),
        pytest.raises(
            ValueError, match=r"batch of 1 for each of 3 tasks, .* as \[1, 3\] where they share it, else as \[3, 1\]"
        ),
    ):
        model(x)
    with torch.no_grad():
        assert torch.equal(model(x, tasks=["b"])["b"][1], plain(x)[1])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda _, y: SimpleNamespace(y=y), TypeError, "returned a SimpleNamespace, and it is not known"),
        (lambda _, y: {y}, TypeError, "returned a set"),
        (
            lambda _, y: pack_padded_sequence(y.flatten(2), [16] * len(y), batch_first=True),
            TypeError,
            "returned a PackedSequence, and it is not known",
        ),
        (lambda _, y: len(y), TypeError, "must return a tensor, or a dict, list, tuple or dataclass with one, got int"),
        (lambda _, y: [None], TypeError, "must return a tensor, .* got list"),
        (lambda _, y: (y, y[:4]), ValueError, "2 samples for each of 3 tasks, got a tensor of shape"),
    ],
)
def test_what_is_not_known_is_an_error(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        build(make)(torch.randn(N, 3, 4, 4))


def test_named_tuples_and_dicts_in_a_graph() -> None:
    for name in ("named tuple", "dict", "ordered dict", "list", "scalar"):
        model = build(STRUCTURES[name]).eval()
        x = torch.randn(N, 3, 4, 4)
        torch._dynamo.reset()
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
        assert_equal(compiled(x), model(x))
