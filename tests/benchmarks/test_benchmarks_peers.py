"""Peers: what each is given, where each can run, and those of packages that are not installed here, by stand-ins."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.nn import functional

from benchmarks.layers.cases import Case
from benchmarks.layers.peers import ACTIVATIONS, CuDNN, Loop
from benchmarks.layers.peers_compiled import COMPILED
from benchmarks.layers.registry import NAMES, PEERS, defaults, runnable, why_not
from benchmarks.layers.run import run_cases
from benchmarks.layers.verify import Expected, MismatchError, check, outcome_of
from benchmarks.records.workloads import (
    BALANCED,
    BATCH_NORM,
    LAYER_NORM,
    MIXED_BATCH_NORM,
    MIXES,
    NO_FORMAT,
    NORMS,
    SORTED,
    ZIPF,
    Layer,
)
from benchmarks.timing.measure import Effort

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def small(dtype="float32", memory_format="contiguous", size=(3, 5), activation="none") -> Case:
    return Case(Layer.of(8, size or ()), 3, 4, dtype, memory_format if size else NO_FORMAT, CPU, activation)


def rows(dtype="float32", width=37, tokens=5) -> Case:
    return Case(Layer.of_rows(width, tokens), 3, 4, dtype, NO_FORMAT, CPU)


def mixed(dtype="float32", memory_format="contiguous", size=(3, 5), mix=BALANCED, activation="none") -> Case:
    layer = Layer.of_mix(8, size or (), mix)
    return Case(layer, 3, 6, dtype, memory_format if size else NO_FORMAT, CPU, activation)


def errors_of(impl: str, case: Case) -> dict[str, float]:
    inputs = case.inputs()
    expected = Expected.of(case, inputs)
    return check(impl, case, outcome_of(PEERS[case.norm][impl](case, inputs)), expected)


def test_names_are_those_of_the_registry():
    for norm in NORMS:
        assert [(peer.norm, name) for name, peer in PEERS[norm].items()] == [(norm, one) for one in PEERS[norm]]
        assert [peer.name for peer in PEERS[norm].values()] == list(PEERS[norm])
    assert [len(PEERS[norm]) for norm in NORMS] == [17, 8, 11]
    assert set(NAMES) == {name for norm in NORMS for name in PEERS[norm]}


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.parametrize("impl", ["fused", "separate", "loop", "folded", "vmap"])
def test_every_activation(impl, activation):
    errors_of(impl, small(activation=activation))
    errors_of(impl, small("float64", "channels_last", activation=activation))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("impl", ["fused", "equal", "loop", "sorted", "grouped"])
def test_mixed_batches(impl, mix):
    cases = [
        mixed("bfloat16", mix=mix, activation="relu"),
        mixed("float64", "channels_last", mix=mix),
        mixed(size=None, mix=mix, activation="relu"),
    ]
    for case in cases:
        assert (why_not(impl, case) is None) == (impl != "equal" or mix == SORTED)
        if why_not(impl, case) is None:
            errors_of(impl, case)


@pytest.mark.parametrize("impl", ["fused", "loop", "sorted", "grouped"])
def test_another_index_is_found(impl):
    case = mixed(mix=ZIPF)
    inputs = case.inputs()
    expected = Expected.of(case, inputs)
    other = replace(inputs, task_of_sample=inputs.task_of_sample.roll(1))
    with pytest.raises(MismatchError, match=f"{impl} is wrong: y of"):
        check(impl, case, outcome_of(PEERS[MIXED_BATCH_NORM][impl](case, other)), expected)


@pytest.mark.parametrize("impl", ["fused", "separate", "loop", "folded"])
def test_another_activation_is_found(impl):
    case = small(activation="gelu")
    inputs = case.inputs()
    expected = Expected.of(case, inputs)
    peer = PEERS[BATCH_NORM][impl](Case(**vars(case) | {"activation": "silu"}), inputs)
    with pytest.raises(MismatchError, match=f"{impl} is wrong: y of"):
        check(impl, case, outcome_of(peer), expected)


@pytest.mark.skipif(bool(COMPILED[0].unavailable(CPU)), reason="no C++ compiler")
@pytest.mark.parametrize(
    ("norm", "impl"),
    [
        (BATCH_NORM, "compiled_loop"),
        (BATCH_NORM, "compiled_vmap"),
        (BATCH_NORM, "autotuned_folded"),
        (LAYER_NORM, "compiled_scaled"),
    ],
)
def test_compiled_peers_do_the_same_work(norm, impl):
    torch.compiler.reset()
    case = rows("bfloat16") if norm == LAYER_NORM else small("bfloat16", "channels_last", activation="gelu")
    assert why_not(impl, case) is None
    errors_of(impl, case)


def test_compiled_peers_are_those_that_are_not(monkeypatch):
    given = []
    monkeypatch.setattr(torch, "compile", lambda step, **options: given.append((step, options)) or step)
    cases = {BATCH_NORM: small(), LAYER_NORM: rows(), MIXED_BATCH_NORM: mixed()}
    for peer in COMPILED:
        plain, case = peer.name.partition("_")[2], cases[peer.norm]
        assert isinstance(peer(case, case.inputs()), peer.__mro__[2])
        assert peer.__mro__[2].name == plain
    assert len({step for step, _ in given}) == 9
    assert {options["mode"] for _, options in given} == {"default", "max-autotune-no-cudagraphs"}
    assert all(options["dynamic"] is False for _, options in given)


def test_folded_input_is_copied_once():
    case = small(memory_format="channels_last")
    inputs = case.inputs()
    peers = [PEERS[BATCH_NORM][name](case, inputs) for name in ("folded", "cudnn", "compiled_folded")]
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
    assert PEERS[BATCH_NORM][impl].unavailable(CUDA) is PEERS[BATCH_NORM][impl].unsupported(case) is None
    errors_of(impl, case)


@pytest.mark.parametrize("activation", ["none", "leaky_relu"])
@pytest.mark.parametrize("size", [(3, 5), None])
def test_inplace_abn_writes_over_its_input_and_no_other(packages, size, activation):
    case = small(size=size, activation=activation)
    assert (
        PEERS[BATCH_NORM]["inplace_abn"].unavailable(CPU) is PEERS[BATCH_NORM]["inplace_abn"].unsupported(case) is None
    )
    errors_of("inplace_abn", case)
    inputs = case.inputs()
    before = inputs.x.clone()
    peer = PEERS[BATCH_NORM]["inplace_abn"](case, inputs)
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
    PEERS[BATCH_NORM]["inplace_abn"](case, inputs).step()
    assert torch.equal(inputs.x, before)


class LigerNorm(torch.autograd.Function):
    """Stands for Liger's layer normalisation: it insists on a bias, and gives gradients of all three."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        assert x.is_contiguous()
        assert weight.shape == bias.shape == x.shape[-1:]
        with torch.enable_grad():
            ctx.inputs = [one.detach().requires_grad_() for one in (x, weight, bias)]
            ctx.y = functional.layer_norm(ctx.inputs[0].float(), x.shape[-1:], *ctx.inputs[1:], eps).to(x.dtype)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx, dy):
        return (*torch.autograd.grad(ctx.y, ctx.inputs, dy), None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_liger_in_the_loop_of_the_tasks(monkeypatch, dtype):
    for path in ("liger_kernel", "liger_kernel.ops.layer_norm"):
        monkeypatch.setitem(sys.modules, path, ModuleType(path))
    liger, case = PEERS[LAYER_NORM]["liger"], rows(dtype)
    sys.modules["liger_kernel"].__spec__ = ModuleSpec("liger_kernel", None)
    assert liger.unavailable(CUDA).startswith("the installed liger_kernel has no liger_kernel.ops.layer_norm.Liger")
    sys.modules["liger_kernel.ops.layer_norm"].LigerLayerNormFunction = LigerNorm
    assert liger.unavailable(CUDA) is liger.unsupported(case) is None
    errors_of("liger", case)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert liger.unavailable(CUDA) == "liger_kernel is not installed"


def test_a_peer_of_another_norm_has_no_part():
    assert why_not("folded", rows()) == "it is no way to run layer_norm"
    assert why_not("scaled", small()) == "it is no way to run batch_norm"
    assert runnable(["fused", "folded", "scaled"], [rows()]) == (
        ["fused", "scaled"],
        {"folded": "it is no way to run layer_norm"},
    )
    effort = Effort(1, 1, 0.0, 0.0, visits=1)
    records = run_cases([small(), rows()], ["fused", "folded", "scaled"], effort, lambda *_: None, print)
    assert {(record.norm, record.impl) for record in records} == {
        (BATCH_NORM, "fused"),
        (BATCH_NORM, "folded"),
        (LAYER_NORM, "fused"),
        (LAYER_NORM, "scaled"),
    }


def test_what_is_not_installed_is_said(monkeypatch, packages):
    monkeypatch.delattr(sys.modules["apex.parallel"], "SyncBatchNorm")
    message = PEERS[BATCH_NORM]["apex_syncbn"].unavailable(CUDA)
    assert message.startswith("the installed apex has no apex.parallel.SyncBatchNorm: ")
    for package in ("apex", "inplace_abn"):
        monkeypatch.setitem(sys.modules, package, None)
    assert PEERS[BATCH_NORM]["apex_groupbn"].unavailable(CUDA) == "apex is not installed"
    assert PEERS[BATCH_NORM]["inplace_abn"].unavailable(CPU) == "inplace_abn is not installed"
    assert PEERS[BATCH_NORM]["apex_syncbn"].unavailable(CPU) == "apex runs on CUDA alone"


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
        ("liger", rows("float64"), "it computes in float32 alone"),
    ],
)
def test_what_a_peer_cannot_do_is_said(impl, case, why):
    assert PEERS[case.norm][impl].unsupported(case) == why


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
    assert set(defaults(CUDA)) == set(PEERS[BATCH_NORM])
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
    kept = ["fused", "loop", "scaled", "compiled_loop", "compiled_scaled", "liger"]  # a loop of rows compiles quickly
    assert defaults(CPU, [LAYER_NORM]) == kept
    of_mixed = ["fused", "equal", "loop", "sorted", "grouped", "compiled_grouped"]
    assert defaults(CPU, [MIXED_BATCH_NORM]) == of_mixed
    assert defaults(CPU, NORMS) == list(dict.fromkeys([*defaults(CPU), *kept, *of_mixed]))


@pytest.mark.parametrize("impl", ["loop", "fused"])
def test_a_peer_that_fails_is_left_out_but_ours(impl, monkeypatch):
    class Failing(Loop):
        def forward(self):
            raise RuntimeError("no kernel image")

    monkeypatch.setitem(PEERS[BATCH_NORM], impl, Failing)
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
