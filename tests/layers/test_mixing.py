"""Mixed batches of row norms, and routed to the layers of a backbone that passes on its input alone."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support.layers import LAYERS, SHAPE, T, gradients, train, trained
from support.layers import C as CHANNELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tsbn_kernels import FusedTSigmaBN2d, FusedTSigmaLN, functional, task_index
from tsbn_kernels.layers import mixing

ROWS = SHAPE[0]
INDEX = torch.tensor([0, 2, 2, 0, 2, 0, 0, 2, 2, 2, 0, 2])
ROW_NORMS = [kind for kind in LAYERS if kind != "BN"]


def each_task(module: nn.Module, x: Tensor, index: Tensor) -> Tensor:
    """The plain layer of each task for its own samples."""
    y = torch.zeros_like(x)
    for task in index.unique().tolist():
        mask = (index == task).nonzero().flatten()
        y = y.index_copy(0, mask, module.task(task)(x.index_select(0, mask)))  # type: ignore[operator]
    return y


@pytest.mark.parametrize("kind", ROW_NORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_row_norms_equal_the_plain_layers(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = trained(kind).to(dtype)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
    for index in (INDEX, INDEX[:1], torch.ones(5, dtype=torch.int64)):
        x, dy = (torch.randn(len(index), *SHAPE[1:]).to(dtype) for _ in range(2))
        torch.testing.assert_close(module(x, task_of_sample=index), each_task(module, x, index), **tolerance)
        dx, dweight, *_ = gradients(module, x, dy, lambda module, x, index=index: module(x, task_of_sample=index))
        own = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(each_task(module, own, index), own, dy)
        torch.testing.assert_close(dx, expected, **tolerance)
        absent = torch.bincount(index, minlength=T) == 0
        assert not dweight[absent].any()
        assert dweight[~absent].any()
        with task_index(index):
            torch.testing.assert_close(module(x), module(x, task_of_sample=index))


def test_functional_row_norms() -> None:
    x, residual, index = torch.randn(4, 3, 5).double(), torch.randn(4, 3, 5).double(), torch.tensor([1, 0, 1, 1])
    weight, bias = torch.randn(2, 5).double(), torch.randn(2, 5).double()
    how: Any = {"num_tasks": 2, "task_of_sample": index}
    gates = torch.sigmoid(weight)[index].unsqueeze(1)
    y, s = functional.add_task_layer_norm(x, residual, weight, bias, **how)
    wanted = torch.nn.functional.layer_norm(x + residual, (5,)) * gates + bias[index].unsqueeze(1)
    torch.testing.assert_close((y, s), (wanted, x + residual))
    wanted = torch.nn.functional.rms_norm(x, (5,)) * gates
    torch.testing.assert_close(functional.task_rms_norm(x, weight, **how), wanted)
    assert functional.task_layer_norm(x[:0], weight, num_tasks=2, task_of_sample=index[:0]).shape == (0, 3, 5)
    tensors = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    call = lambda x, weight, bias: functional.task_layer_norm(x, weight, bias, **how)  # noqa: E731
    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)
    with pytest.raises(ValueError, match="got 1 for sample 0"):
        functional.task_layer_norm(x, weight[:1], num_tasks=1, task_of_sample=index)
    with pytest.raises(ValueError, match="weight must have shape"):
        functional.task_layer_norm(x, weight[:1], num_tasks=2, task_of_sample=index)


class Backbone(nn.Module):
    """Two blocks, each with a path around it; checkpointed or not."""

    reentrant: bool | None = None

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), FusedTSigmaBN2d(T, CHANNELS, bias=True), nn.ReLU()
            )
            for _ in range(2)
        )
        self.norm = FusedTSigmaLN(T, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            again = self.reentrant
            x = x + (block(x) if again is None else checkpoint(block, x, use_reentrant=again))
        x = x.movedim(1, -1).flatten(0, 1)  # rows of each sample, one after the other
        return self.norm(x.mean(-1))


def backbone() -> Backbone:
    torch.manual_seed(1)
    model = Backbone()
    for module in model.modules():
        train(module)
    return model


def explicit(model: Backbone, x: Tensor, index: Tensor) -> Tensor:
    """The backbone with the index given to each layer."""
    x = model.stem(x)
    for conv, norm, act in model.blocks:  # type: ignore[attr-defined]
        x = x + act(norm(conv(x), task_of_sample=index))
    x = x.movedim(1, -1).flatten(0, 1)
    return model.norm(x.mean(-1), task_of_sample=index.repeat_interleave(4))


def routed(model: nn.Module, x: Tensor, index: Tensor) -> Tensor:
    with task_index(index):
        return model(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_backbone_gets_the_index(reentrant: bool | None) -> None:
    model, twin = backbone(), backbone()
    model.reentrant = reentrant
    x, dy = torch.randn(ROWS, 3, 6, 6), torch.randn(ROWS * 4, 4)
    found = gradients(model, x, dy, lambda model, x: routed(model, x, INDEX))  # the backward pass is outside
    expected = gradients(twin, x, dy, lambda twin, x: explicit(twin, x, INDEX))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_of_layers_that_take_samples_and_rows(reentrant: bool) -> None:
    """What is repeated asks first for the layers of samples, behind which one took several rows of each."""
    model, twin = backbone(), backbone()
    x, dy = torch.randn(ROWS, 3, 6, 6), torch.randn(ROWS * 4, 4)

    def whole(model: nn.Module, x: Tensor) -> Tensor:
        with task_index(INDEX):
            return checkpoint(model, x, use_reentrant=reentrant)  # type: ignore[no-any-return]

    found = gradients(model, x, dy, whole)
    expected = gradients(twin, x, dy, lambda twin, x: explicit(twin, x, INDEX))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_contexts_nest_and_end() -> None:
    model = backbone().eval()
    x, other = torch.randn(ROWS, 3, 6, 6), INDEX.flip(0)
    with task_index(INDEX):
        with task_index(other):
            torch.testing.assert_close(model(x), explicit(model, x, other))
        torch.testing.assert_close(model(x), explicit(model, x, INDEX))
        with pytest.raises(RuntimeError, match="inside"), task_index(other):
            raise RuntimeError("inside")
        torch.testing.assert_close(model(x), explicit(model, x, INDEX))
    assert not torch.equal(model(x), explicit(model, x, INDEX))  # stacked, as ever
    with pytest.raises(TypeError, match="must be int64"), task_index(INDEX.int()):
        pass
    with pytest.raises(ValueError, match="no streams"), task_index(INDEX):
        model.blocks[0][1].streams(torch.randn(SHAPE))  # type: ignore[index]


def test_threads_have_contexts_of_their_own() -> None:
    model = backbone().eval()
    x = torch.randn(ROWS, 3, 6, 6)
    indices = [torch.randint(T, (ROWS,)) for _ in range(8)]
    with task_index(INDEX), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda index: routed(model, x, index), indices))
        (stacked,) = pool.map(model, [x])
    for index, y in zip(indices, found, strict=True):
        torch.testing.assert_close(y, explicit(model, x, index))
    torch.testing.assert_close(stacked, model(x))


@pytest.mark.parametrize("inside", [True, False])
def test_one_compiled_graph_for_all_indices(inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "_routed", type(mixing._routed)())  # as in a thread that has routed nothing yet
    model, twin = backbone(), backbone()
    graphs = 0

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    if inside:
        call = torch.compile(lambda x, index: routed(model, x, index), backend=backend, fullgraph=True)
    else:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        call = lambda x, index: routed(compiled, x, index)  # noqa: E731
    for _ in range(3):
        index, x = torch.randint(T, (ROWS,)), torch.randn(ROWS, 3, 6, 6)
        torch.testing.assert_close(call(x, index), explicit(twin, x, index))
    assert graphs == 1
    assert copy.deepcopy(model) is not model
