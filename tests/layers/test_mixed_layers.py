"""Layers of mixed batches: a module of T tasks beside a list of T plain layers that each see their own samples."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.mixed import T, mixes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tsbn_kernels import FusedTSigmaBN1d, FusedTSigmaBN2d, hold_absent_tasks

C = 5
INDEX = torch.tensor([2, 0, 2, 0, 0, 2, 3])


def layer(**options: Any) -> FusedTSigmaBN2d:
    torch.manual_seed(0)
    made = FusedTSigmaBN2d(T, C, bias=True, **options).double()
    with torch.no_grad():
        made.weight.normal_()
        assert made.bias is not None
        made.bias.normal_()
    return made


def run_each(twins: nn.ModuleList, x: Tensor, index: Tensor) -> Tensor:
    """Each layer of a list for its own samples."""
    y = torch.zeros_like(x)
    for task, twin in enumerate(twins):
        mask = (index == task).nonzero().flatten()
        if len(mask):
            y = y.index_copy(0, mask, twin(x.index_select(0, mask)))
    return y


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("tracked", [True, False])
def test_equals_a_list_of_layers(tracked: bool, momentum: float | None) -> None:
    module = layer(momentum=momentum, track_running_stats=tracked)
    twins = nn.ModuleList(module.task(task) for task in range(T))
    for index in mixes():
        x = torch.randn(len(index), C, 3, 2).double()
        torch.testing.assert_close(module(x, task_of_sample=index), run_each(twins, x, index), rtol=1e-12, atol=1e-12)
    for name in ("running_mean", "running_var", "num_batches_tracked") if tracked else ():
        wanted = torch.stack([getattr(twin, name) for twin in twins])
        torch.testing.assert_close(getattr(module, name), wanted, rtol=1e-12, atol=1e-12)
    module.eval()
    twins.eval()
    for index in mixes():
        x = torch.randn(len(index), C, 3, 2).double()
        torch.testing.assert_close(module(x, task_of_sample=index), run_each(twins, x, index), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_task_with_one_value_is_evaluated_where_asked(compiled: bool, residual: bool) -> None:
    """As a loop that calls ``eval()`` for such tasks: outputs, gradients and statistics."""
    torch.manual_seed(0)
    module = FusedTSigmaBN1d(T, C, bias=True, momentum=None, evaluate_single=True).double()
    nn.init.normal_(module.weight)
    twins = nn.ModuleList(module.task(task) for task in range(T))
    call = torch.compile(module, backend="eager", fullgraph=True, dynamic=True) if compiled else module
    for index in mixes():
        tensors = torch.randn(2 + residual, len(index), C).double()
        results = []
        for ours in (True, False):
            dy, *inputs = (tensor.clone() for tensor in tensors)
            inputs = [tensor.requires_grad_() for tensor in inputs]
            if ours:
                y = call(*inputs, task_of_sample=index)
            else:
                for task, twin in enumerate(twins):
                    twin.train(int((index == task).sum()) != 1)
                y = run_each(twins, inputs[0], index) + (inputs[1] if residual else 0)
            (module if ours else twins).zero_grad()
            y.backward(dy)
            results.append((y, *(tensor.grad for tensor in inputs)))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
        for name in ("weight", "bias"):
            gradients = [getattr(twin, name).grad for twin in twins]
            wanted = torch.stack([torch.zeros(C).double() if one is None else one for one in gradients])
            if name == "weight":
                wanted = wanted * module.gates * (1 - module.gates)
            torch.testing.assert_close(getattr(module, name).grad, wanted, rtol=1e-9, atol=1e-9)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        wanted = torch.stack([getattr(twin, name) for twin in twins])
        torch.testing.assert_close(getattr(module, name), wanted, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="needs running statistics"):
        FusedTSigmaBN1d(T, C, track_running_stats=False, evaluate_single=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_repeats_the_call_and_not_the_statistics(reentrant: bool) -> None:
    module, x = layer(), torch.randn(7, C, 3, 2).double().requires_grad_()
    twin, dy = copy.deepcopy(module), torch.randn(7, C, 3, 2).double()
    found = []
    for own, checkpointed in ((module, True), (twin, False)):
        call = lambda x, own=own: own(x, task_of_sample=INDEX)  # noqa: E731
        y = checkpoint(call, x, use_reentrant=reentrant) if checkpointed else call(x)
        y.backward(dy)
        found.append((x.grad, own.weight.grad, own.running_mean, own.num_batches_tracked))
        x.grad = None
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_the_optimiser_holds_tasks_without_a_sample(optimizer: type[torch.optim.Optimizer]) -> None:
    options: Any = {"lr": 0.1, "weight_decay": 0.1} | ({"momentum": 0.9} if optimizer is torch.optim.SGD else {})
    module = layer(gate="identity")
    twins = nn.ModuleList(module.task(task) for task in range(T))
    ours, theirs = optimizer(module.parameters(), **options), optimizer(twins.parameters(), **options)
    hold_absent_tasks(ours, module)
    for index in mixes():
        x, dy = (torch.randn(len(index), C, 3, 2).double() for _ in range(2))
        module(x, task_of_sample=index).backward(dy)
        run_each(twins, x, index).backward(dy)
        ours.step()
        theirs.step()
        ours.zero_grad()
        theirs.zero_grad()
        for name in ("weight", "bias"):
            wanted = torch.stack([getattr(twin, name) for twin in twins])
            torch.testing.assert_close(getattr(module, name), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_one_compiled_graph_for_all_mixes(training: bool) -> None:
    module = layer(activation="relu").train(training)
    twin = copy.deepcopy(module)
    graphs = 0

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=True)
    for index in mixes():
        x, dy = (torch.randn(len(index), C, 3, 2).double() for _ in range(2))
        x.requires_grad_()
        results = []
        for call in (compiled, twin):
            y = call(x, task_of_sample=index)
            y.backward(dy)
            results.append((y, x.grad))
            x.grad = None
        torch.testing.assert_close(*results)
    torch.testing.assert_close(module.state_dict(), twin.state_dict())
    assert graphs == 1


def test_transforms_and_forward_mode() -> None:
    module = layer(activation="silu")
    x, change = torch.randn(2, 7, C, 3, 2).double(), torch.randn(7, C, 3, 2).double()
    parameters = {name: tensor.detach() for name, tensor in module.named_parameters()}

    def call(x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,), {"task_of_sample": INDEX})

    each = torch.stack([call(one) for one in x])
    before = copy.deepcopy(module.state_dict())
    module.track_running_stats = False
    torch.testing.assert_close(torch.func.vmap(call)(x), each)
    _, tangent = torch.func.jvp(call, (x[0],), (change,))
    step = 1e-6
    torch.testing.assert_close(
        tangent, (call(x[0] + step * change) - call(x[0] - step * change)) / (2 * step), rtol=1e-5, atol=1e-6
    )
    with torch.autograd.forward_ad.dual_level():
        dual = call(torch.autograd.forward_ad.make_dual(x[0], change))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent)
    gradient = torch.func.grad(lambda x: (call(x) * change).sum())(x[0])
    own = x[0].clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(call(own), own, change)[0], gradient)
    assert list(before) == list(module.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"fan_out": True}, "takes no fan_out"), ({"tasks": [0, 1]}, "takes no tasks")],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer()(torch.randn(7, C, 3, 2).double(), task_of_sample=INDEX, **options)
    with pytest.raises(ValueError, match="no task axis"):
        layer()(torch.randn(T, 7, C, 3, 2).double(), task_of_sample=INDEX)
    with pytest.raises(ValueError, match="one sample of task 3"):
        FusedTSigmaBN1d(T, C)(torch.randn(7, C), task_of_sample=INDEX)
