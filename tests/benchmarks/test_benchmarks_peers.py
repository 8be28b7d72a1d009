"""Peers: what each is given, where each can run, and those of packages that are not installed here, by stand-ins."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional

from benchmarks.layers.cases import Case
from benchmarks.layers.peers import ACTIVATIONS, CuDNN, Loop
from benchmarks.layers.peers_compiled import COMPILED
from benchmarks.layers.registry import PEERS, defaults, runnable
from benchmarks.layers.run import run_cases
from benchmarks.layers.verify import Expected, MismatchError, check, outcome_of
from benchmarks.records.workloads import NO_FORMAT, Layer
from benchmarks.timing.measure import Effort

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def small(dtype="float32", memory_format="contiguous", size=(3, 5), activation="none") -> Case:
    return Case(Layer.of(8, size or ()), 3, 4, dtype, memory_format if size else NO_FORMAT, CPU, activation)


def errors_of(impl: str, case: Case) -> dict[str, float]:
    inputs = case.inputs()
    expected = Expected.of(case, inputs)
    return check(impl, case, outcome_of(PEERS[impl](case, inputs)), expected)


def test_names_are_those_of_the_registry():
    assert [peer.name for peer in PEERS.values()] == list(PEERS)
    assert len(PEERS) == 17


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.parametrize("impl", ["fused", "separate", "loop", "folded", "vmap"])
def test_every_activation(impl, activation):
    errors_of(impl, small(activation=activation))
    errors_of(impl, small("float64", "channels_last", activation=activation))


@pytest.mark.parametrize("impl", ["fused", "separate", "loop", "folded"])
def test_another_activation_is_found(impl):
    case = small(activation="gelu")
    inputs = case.inputs()
    expected = Expected.of(case, inputs)
    peer = PEERS[impl](Case(**vars(case) | {"activation": "silu"}), inputs)
    with pytest.raises(MismatchError, match=f"{impl} is wrong: y of"):
        check(impl, case, outcome_of(peer), expected)


@pytest.mark.skipif(bool(COMPILED[0].unavailable(CPU)), reason="no C++ compiler")
@pytest.mark.parametrize("impl", ["compiled_loop", "compiled_vmap", "autotuned_folded"])
def test_compiled_peers_do_the_same_work(impl):
    torch.compiler.reset()
    case = small("bfloat16", "channels_last", activation="gelu")
    assert PEERS[impl].unsupported(case) is None
    errors_of(impl, case)


def test_compiled_peers_are_those_that_are_not(monkeypatch):
    given = []
    monkeypatch.setattr(torch, "compile", lambda step, **options: given.append((step, options)) or step)
    case = small()
    inputs = case.inputs()
    for peer in COMPILED:
        plain = peer.name.partition("_")[2]
        assert isinstance(peer(case, inputs), peer.__mro__[2])
        assert peer.__mro__[2].name == plain
    assert len({step for step, _ in given}) == 4
    assert {options["mode"] for _, options in given} == {"default", "max-autotune-no-cudagraphs"}
    assert all(options["dynamic"] is False for _, options in given)


def test_folded_input_is_copied_once():
    case = small(memory_format="channels_last")
    inputs = case.inputs()
    peers = [PEERS[name](case, inputs) for name in ("folded", "cudnn", "compiled_folded")]
    assert len({peer.x.data_ptr() for peer in peers}) == len({peer.dy.data_ptr() for peer in peers}) == 1
    assert peers[0].x.is_contiguous(memory_format=torch.channels_last)
    assert peers[0].x.shape == (4, 24, 3, 5)
    narrow = Case(Layer.of(1, (3, 5)), 3, 4, "float32", "contiguous", CPU).inputs()
    assert narrow.folded[0].is_contiguous()  # one channel is also in channels_last


def test_cudnn_is_what_pytorch_says_it_takes(monkeypatch):
    assert CuDNN.unavailable(CPU) == "cuDNN runs on NVIDIA's GPUs alone"
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    assert CuDNN.unavailable(CUDA) == "this PyTorch has no cuDNN"
    case = small(memory_format="channels_last")
    assert CuDNN.unsupported(case) == "PyTorch does not take cuDNN for float32 [4, 24, 3, 5]"
    asked = []

    def chosen(x, weight, bias, *_):
        asked.append((x.shape, x.dtype, weight.dtype, bias.shape))
        return torch._C._BatchNormBackend.Cudnn

    monkeypatch.setattr(torch._C, "_select_batch_norm_backend", chosen)
    assert CuDNN.unsupported(case) is None
    assert CuDNN.unsupported(small("float16", size=None)) is None
    assert asked == [
        ((4, 24, 3, 5), torch.float32, torch.float32, (24,)),
        ((4, 24), torch.float16, torch.float32, (24,)),
    ]
    given = []
    plain = functional.batch_norm
    monkeypatch.setattr(functional, "batch_norm", lambda *args: given.append(args[4]) or plain(*args))
    errors_of("cudnn", case)
    assert torch.equal(given[-1], torch.zeros(24))  # without a bias PyTorch does not take it


class Nhwc(nn.BatchNorm2d):
    """Stands for apex's layers: NHWC sizes, a ReLU inside, every gradient of the weight through a tensor of its own."""

    def __init__(self, num_features, eps=1e-5, momentum=0.1, *, fuse_relu=False, channel_last=True):
        super().__init__(num_features, eps, momentum)
        assert channel_last
        self.fuse_relu = fuse_relu

    def forward(self, x):
        assert x.is_contiguous()
        statistics = self.running_mean, self.running_var
        y = functional.batch_norm(x.permute(0, 3, 1, 2), *statistics, self.weight, self.bias, True, 0.1, 1e-5)
        return (torch.relu(y) if self.fuse_relu else y).permute(0, 2, 3, 1)


class OverX(torch.autograd.Function):
    """Stands for inplace_abn: y is written over x, and the gradients are computed from y."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, training, momentum, eps, activation, slope):
        assert training
        dims = [0, *range(2, x.dim())]
        var, mean = torch.var_mean(x, dims, correction=0)
        count = x.numel() // x.shape[1]
        running_mean.mul_(1 - momentum).add_(momentum * mean)
        running_var.mul_(1 - momentum).add_(momentum * var * count / (count - 1))
        shape = [1, -1] + [1] * (x.dim() - 2)
        scale = (weight.abs() + eps).view(shape)
        xhat = (x - mean.view(shape)) * torch.rsqrt(var + eps).view(shape)
        x.copy_(xhat * scale + bias.view(shape))
        if activation != "identity":
            functional.leaky_relu_(x, slope)
        ctx.save_for_backward(x, scale, torch.rsqrt(var + eps).view(shape))
        ctx.slope, ctx.dims = (slope if activation != "identity" else 1.0), dims
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, dy):
        y, scale, rstd = ctx.saved_tensors
        dy = torch.where(y > 0, dy, dy * ctx.slope)
        xhat = torch.where(y > 0, y, y / ctx.slope) / scale
        product = (dy * xhat).mean(ctx.dims, keepdim=True)
        dx = scale * rstd * (dy - dy.mean(ctx.dims, keepdim=True) - xhat * product)
        return (dx, (dy * xhat).sum(ctx.dims), *[None] * 8)


@pytest.fixture
def packages(monkeypatch):
    """All three are installed."""
    contents = {
        "apex": {"__spec__": ModuleSpec("apex", None)},
        "inplace_abn": {"__spec__": ModuleSpec("inplace_abn", None)},
        "apex.contrib.groupbn": {"BatchNorm2d_NHWC": Nhwc},
        "apex.parallel": {"SyncBatchNorm": Nhwc},
        "inplace_abn.functions": {"inplace_abn": OverX.apply},
    }
    for path, names in contents.items():
        module = ModuleType(path)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, path, module)


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize(
    ("impl", "dtype"), [("apex_groupbn", "float16"), ("apex_syncbn", "float16"), ("apex_syncbn", "float32")]
)
def test_apex_on_its_own_layout(packages, impl, dtype, activation):
    case = small(dtype, "channels_last", activation=activation)
    assert PEERS[impl].unavailable(CUDA) is PEERS[impl].unsupported(case) is None
    errors_of(impl, case)


@pytest.mark.parametrize("activation", ["none", "leaky_relu"])
@pytest.mark.parametrize("size", [(3, 5), None])
def test_inplace_abn_writes_over_its_input_and_no_other(packages, size, activation):
    case = small(size=size, activation=activation)
    assert PEERS["inplace_abn"].unavailable(CPU) is PEERS["inplace_abn"].unsupported(case) is None
    errors_of("inplace_abn", case)
    inputs = case.inputs()
    before = inputs.x.clone()
    peer = PEERS["inplace_abn"](case, inputs)
    for _ in range(3):
        y = peer.forward()
        assert y.data_ptr() == peer.x.data_ptr()
        dx, dgamma = peer.backward(y)
        assert dx.isfinite().all()
        assert dgamma.abs().sum() > 0
    assert torch.equal(inputs.x, before)


def test_inplace_abn_of_one_task_leaves_the_others_their_input(packages):
    case = Case(Layer.of(8, (3, 5)), 1, 4, "float32", "contiguous", CPU)  # folding copies nothing
    inputs = case.inputs()
    before = inputs.x.clone()
    PEERS["inplace_abn"](case, inputs).step()
    assert torch.equal(inputs.x, before)


def test_what_is_not_installed_is_said(monkeypatch, packages):
    monkeypatch.delattr(sys.modules["apex.parallel"], "SyncBatchNorm")
    message = PEERS["apex_syncbn"].unavailable(CUDA)
    assert message.startswith("the installed apex has no apex.parallel.SyncBatchNorm: ")
    for package in ("apex", "inplace_abn"):
        monkeypatch.setitem(sys.modules, package, None)
    assert PEERS["apex_groupbn"].unavailable(CUDA) == "apex is not installed"
    assert PEERS["inplace_abn"].unavailable(CPU) == "inplace_abn is not installed"
    assert PEERS["apex_syncbn"].unavailable(CPU) == "apex runs on CUDA alone"


@pytest.mark.parametrize(
    ("impl", "case", "why"),
    [
        ("apex_groupbn", small("float16"), "it takes channels_last alone"),
        ("apex_groupbn", small("float32", "channels_last"), "it takes float16 alone"),
        ("apex_syncbn", small("bfloat16", "channels_last"), "it takes float32 and float16 alone"),
        ("apex_syncbn", small("float16", "channels_last", activation="gelu"), "of the activations it knows ReLU alone"),
        ("inplace_abn", small("float32", "channels_last"), "it takes contiguous input alone"),
        ("inplace_abn", small("float16"), "it takes no float16 on cpu"),
        ("inplace_abn", small(activation="relu"), "of the activations it knows none, leaky_relu"),
        ("separate", small(), "it is the fused layer where no activation follows"),
    ],
)
def test_what_a_peer_cannot_do_is_said(impl, case, why):
    assert PEERS[impl].unsupported(case) == why


def test_a_peer_with_a_part_in_one_case_is_kept():
    whole, half = small(), small("bfloat16")
    assert runnable(["fused", "vmap"], [whole, half]) == (["fused", "vmap"], {})
    found, reasons = runnable(["fused", "vmap", "cudnn"], [half])
    assert found == ["fused"]
    assert reasons["vmap"].startswith("on a CPU F.batch_norm under vmap takes no half precision")
    assert reasons["cudnn"] == "cuDNN runs on NVIDIA's GPUs alone"
    records = run_cases([half], ["fused", "vmap"], Effort(1, 1, 0.0, 0.0, visits=1), lambda *_: None, print)
    assert {record.impl for record in records} == {"fused"}


def test_what_is_slow_to_compile_is_no_default_on_a_cpu():
    assert set(defaults(CUDA)) == set(PEERS)
    left = {
        "vmap",
        "compiled_vmap",
        "compiled_loop",
        "autotuned_loop",
        "autotuned_reference",
        "autotuned_folded",
        "autotuned_vmap",
    }
    assert set(defaults(CUDA)) - set(defaults(CPU)) == left


@pytest.mark.parametrize("impl", ["loop", "fused"])
def test_a_peer_that_fails_is_left_out_but_ours(impl, monkeypatch):
    class Failing(Loop):
        def forward(self):
            raise RuntimeError("no kernel image")

    monkeypatch.setitem(PEERS, impl, Failing)
    told = []

    def run():
        return run_cases(
            [small()], ["fused", "loop", "folded"], Effort(1, 1, 0.0, 0.0, visits=1), lambda *_: None, told.append
        )

    if impl == "fused":
        with pytest.raises(RuntimeError, match="no kernel image"):
            run()
        return
    assert {record.impl for record in run()} == {"fused", "folded"}
    assert told == ["loop is left out of 8@3x5 float32 contiguous: RuntimeError: no kernel image"]
