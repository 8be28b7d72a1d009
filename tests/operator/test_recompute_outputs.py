"""Outputs of fused layers that are computed again in the backward pass, and not kept for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.layers import train
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from tsbn_kernels import (
    FusedTSigmaBN2d,
    FusedTSigmaLN,
    FusedTSigmaRMSNorm,
    LateFanOut,
    MultiTaskModel,
    convert_model,
    recompute_outputs,
)
from tsbn_kernels.definition.activations import ACTIVATIONS

T, N, C = 3, 2, 4


class Network(nn.Module):
    """Three blocks of convolution and fused layer; the first fans out, the last gets the residual of the second."""

    def __init__(self, activation: str | None = "relu", stacking: str = "task_major") -> None:
        super().__init__()
        options = {"activation": activation, "stacking": stacking, "bias": True}
        self.convolutions = nn.ModuleList(nn.Conv2d(C, C, 3, padding=1, bias=False) for _ in range(4))
        self.norms = nn.ModuleList(FusedTSigmaBN2d(T, C, fan_out=k == 0, **options) for k in range(3))
        for norm in self.norms:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.norms[0](self.convolutions[0](x)))
        x = self.norms[1](self.convolutions[1](x))
        x = self.norms[2](self.convolutions[2](x), x)
        return self.convolutions[3](x)


def network(*options: str | None, dtype: torch.dtype = torch.float64) -> Network:
    torch.manual_seed(3)
    return Network(*options).to(dtype)


def gradients(module: nn.Module, x: Tensor, recompute: bool) -> list[Tensor]:
    torch.manual_seed(4)
    x = x.clone().requires_grad_()
    with recompute_outputs() if recompute else nullcontext():
        y = module(x)
    return list(torch.autograd.grad(y, [x, *module.parameters()], torch.randn_like(y)))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(N, C, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize("stacking", ["task_major", "sample_major"])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_gradients_are_those_of_outputs_that_were_kept(activation: str | None, stacking: str, x: Tensor) -> None:
    module = network(activation, stacking)
    for got, wanted in zip(gradients(module, x, True), gradients(module, x, False), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_lower_precision(dtype: torch.dtype, x: Tensor) -> None:
    module = network("silu", dtype=dtype)
    for got, wanted in zip(gradients(module, x.to(dtype), True), gradients(module, x.to(dtype), False), strict=True):
        scale = float(wanted.abs().max())
        torch.testing.assert_close(got, wanted, rtol=0, atol=scale * (1e-5 if dtype == torch.float32 else 0.05))


class Transformer(nn.Module):
    """Linear layers behind layer normalisations, one of which fans out, and one of which adds a residual."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(C, C) for _ in range(4))
        self.norms = nn.ModuleList(train(kind(T, C, fan_out=k == 0)) for k in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linears[0](x)
        x = self.linears[1](self.norms[0](x))
        y, s = self.norms[1].add(x, x.tanh())  # type: ignore[operator]
        return self.linears[3](self.norms[2](s + self.linears[2](y)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [FusedTSigmaLN, FusedTSigmaRMSNorm])
def test_layer_normalisation(kind: Any) -> None:
    torch.manual_seed(3)
    module, x = Transformer(kind).double(), torch.randn(N, 5, C, dtype=torch.float64)
    for got, wanted in zip(gradients(module, x, True), gradients(module, x, False), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    for recompute in (True, False):
        memory = outputs_of(module)
        with recompute_outputs() if recompute else nullcontext():
            y = module(x)
        assert [one.expired() for one in memory[-2:]] == 2 * [recompute]  # add() calls no hook
        assert y.requires_grad


def outputs_of(module: Network) -> list[StorageWeakRef]:
    """Filled in the forward pass: the memory of each fused layer's output."""
    memory: list[StorageWeakRef] = []
    for norm in module.norms:
        norm.register_forward_hook(lambda _, __, y: memory.append(StorageWeakRef(y.untyped_storage())))
    return memory


@pytest.mark.parametrize("recompute", [True, False])
def test_outputs_are_freed_in_the_forward_pass(recompute: bool, x: Tensor) -> None:
    module = network("silu")
    module.norms[2].forward = lambda x, _, norm=module.norms[2]: FusedTSigmaBN2d.forward(norm, x)  # keeps no residual
    memory = outputs_of(module)
    with recompute_outputs() if recompute else nullcontext():
        y = module(x)
    assert len(memory) == 3
    assert [one.expired() for one in memory] == 3 * [recompute]
    assert y.requires_grad


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Bytes that are kept for the backward pass, by address."""
    kept: dict[int, int] = {}
    plain = torch.autograd.graph.saved_tensors_hooks

    def counting(pack: Callable[[Tensor], object], unpack: Callable[[object], Tensor]) -> object:
        def count(tensor: Tensor) -> object:
            result = pack(tensor)
            if isinstance(result, Tensor):
                kept[result.untyped_storage().data_ptr()] = result.untyped_storage().nbytes()
            return result

        return plain(count, unpack)

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", counting)
    return kept


def test_a_block_keeps_one_activation_in_place_of_two(saved: dict[int, int]) -> None:
    layers = [FusedTSigmaBN2d(T, C, activation="relu") for _ in range(3)]
    convolutions = [nn.Conv2d(C, C, 1, bias=False) for _ in range(3)]
    x = torch.randn(T * N, C, 16, 16, requires_grad=True)

    def forward() -> Tensor:
        y = x
        for convolution, layer in zip(convolutions, layers, strict=True):
            y = layer(convolution(y))
        return y.square().sum()

    with recompute_outputs():
        forward()
    less = sum(size for size in saved.values() if size >= x.nbytes)
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        forward()
    more = sum(size for size in saved.values() if size >= x.nbytes)
    assert (less, more) == (4 * x.nbytes, 7 * x.nbytes)  # the input, and of each block x, and y unless recomputed


def test_a_converted_model_keeps_one_activation_of_a_block(saved: dict[int, int]) -> None:
    """With its ReLU left outside it keeps two: what the convolution and the ReLU need is not the layer's output."""
    plain = nn.Sequential(*(m for _ in range(3) for m in (nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU())))
    x = torch.randn(N, C, 16, 16)
    kept = []
    for fuse in (True, False):
        backbone = convert_model(plain, T, fuse_activation=fuse)
        model = MultiTaskModel(backbone, {f"task{t}": nn.Flatten() for t in range(T)}, recompute=True)
        saved.clear()
        loss = torch.cat(list(model(x).values())).sum()
        kept.append(sum(size for size in saved.values() if size >= x.nbytes))
        loss.backward()
    # The images and the first layer's input once; of each task the inputs of two layers, and the outputs of the ReLUs.
    assert kept == [(2 + 2 * T) * x.nbytes, (2 + 5 * T) * x.nbytes]


def test_an_output_that_is_changed_in_place_is_kept(x: Tensor) -> None:
    class InPlace(Network):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norms[0](self.convolutions[0](x))
            return self.convolutions[1](y.mul_(2).relu_())

    torch.manual_seed(3)
    module = InPlace(None).double()
    x.requires_grad_()
    parameters = [module.convolutions[0].weight, module.norms[0].weight, module.convolutions[1].weight]
    results = []
    for context in (recompute_outputs(), nullcontext()):
        with context:
            y = module(x)
        results.append(torch.autograd.grad(y, [x, *parameters], torch.ones_like(y)))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "mT": lambda y: y.flatten(2).mT,
    "some": lambda y: y[:, 1:3],
    "step": lambda y: y[::2].transpose(2, 3),
    "complex": torch.view_as_complex,  # rotary embeddings
    "conj": lambda y: torch.view_as_complex(y).conj(),
    "imag": lambda y: torch.view_as_complex(y).imag,
    "neg": lambda y: torch.view_as_complex(y).conj().imag,
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_of_an_output(view: Callable[[Tensor], Tensor]) -> None:
    layer = FusedTSigmaBN2d(T, C, activation="gelu", dtype=torch.float64)
    x = torch.randn(T * N, C, 5, 2, dtype=torch.float64, requires_grad=True)
    results = []
    for context in (recompute_outputs(), nullcontext()):
        with context:
            y = (view(layer(x)) ** 4).sum().real
        results.append(torch.autograd.grad(y, [x, layer.weight]))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


def test_an_input_that_is_changed_in_place_is_an_error() -> None:
    layer = FusedTSigmaBN2d(T, C)
    x = torch.randn(T * N, C, 3, 3, requires_grad=True)
    with recompute_outputs():
        z = x * 1
        y = layer(z).square().sum()
    with torch.no_grad():
        z.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.backward()


def test_second_derivatives() -> None:
    layer = FusedTSigmaBN2d(T, C, activation="silu", dtype=torch.float64, track_running_stats=False)
    x = torch.randn(T * 2, C, 2, 1, dtype=torch.float64, requires_grad=True)

    def forward(x: Tensor, weight: Tensor) -> Tensor:
        with recompute_outputs():
            return torch.func.functional_call(layer, {"weight": weight}, (x,)).square()

    assert torch.autograd.gradgradcheck(forward, (x, layer.weight))


def test_the_context_ends(x: Tensor) -> None:
    module = network()
    with pytest.raises(ZeroDivisionError), recompute_outputs():
        raise ZeroDivisionError
    memory = outputs_of(module)
    y = module(x)
    assert not any(one.expired() for one in memory)
    del y


def test_contexts_nest(x: Tensor) -> None:
    module = network()
    memory = outputs_of(module)
    with recompute_outputs():
        with recompute_outputs():
            y = module(x)
        assert memory[0].expired()
        z = module(x)
    assert memory[3].expired()
    assert torch.equal(*(torch.autograd.grad(out.sum(), module.norms[0].weight)[0] for out in (y, z)))


def test_threads_have_contexts_of_their_own(x: Tensor) -> None:
    module = network()
    with recompute_outputs():
        memory = outputs_of(module)
        kept: list[Tensor] = []
        thread = threading.Thread(target=lambda: kept.append(module(x)))
        thread.start()
        thread.join()
    assert not any(one.expired() for one in memory)


def test_evaluation_and_late_fan_out(x: Tensor) -> None:
    torch.manual_seed(5)
    module = nn.Sequential(
        LateFanOut(T, C, conv=nn.Conv2d(C, C, 1), stacking="sample_major"),
        FusedTSigmaBN2d(T, C, activation="relu", stacking="sample_major"),
        nn.Conv2d(C, C, 1),
    ).double()
    for training in (True, False):
        module.train(training)
        for got, wanted in zip(gradients(module, x, True), gradients(module, x, False), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_a_graph_that_is_kept_gives_the_same_twice(x: Tensor) -> None:
    module = network("gelu")
    x.requires_grad_()
    with recompute_outputs():
        y = module(x).square().sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y, x)[0], first)
