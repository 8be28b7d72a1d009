"""Penalties against their papers' formulas, written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import config
from torch.func import functional_call

from tsbn_kernels import FusedTSigmaBN2d, FusedTSigmaLN
from tsbn_kernels.regularizers import l1_of_gates, orthogonal_gradients, receding_importance


def model_of(num_tasks: int) -> nn.Module:
    """Batch and layer norms with random gates, and one layer whose gates are no sigmoids."""
    torch.manual_seed(num_tasks)
    model = nn.ModuleList(
        [
            FusedTSigmaBN2d(num_tasks, 5),
            FusedTSigmaLN(num_tasks, (2, 3)),
            FusedTSigmaLN(num_tasks, 4, gate="identity", bias=True),
        ]
    ).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=3)
    return model


def by_hand(model: nn.Module, term: Callable[[float], float], factors: list[float]) -> float:
    weights = [model[0].weight, model[1].weight]
    return sum(
        factors[t] * term(value.item()) for weight in weights for t, row in enumerate(weight) for value in row.flatten()
    )


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize("num_tasks", [1, 40])
@pytest.mark.parametrize("weighted", [False, True])
def test_penalties_of_gates_are_their_formulas(num_tasks: int, weighted: bool) -> None:
    model = model_of(num_tasks)
    factors = [1.0 + t for t in range(num_tasks)]
    given = factors if weighted else None
    factors = factors if weighted else [1.0] * num_tasks

    def receding(value: float) -> float:
        s = sigmoid(value + 0.5)
        return 0.01 * s * (1 - math.log(s))

    found = receding_importance(model, 0.01, 0.5, given)
    torch.testing.assert_close(found.item(), by_hand(model, receding, factors), rtol=1e-12, atol=0)
    found = l1_of_gates(model, 0.01, given)
    torch.testing.assert_close(found.item(), by_hand(model, lambda v: 0.01 * sigmoid(v), factors), rtol=1e-12, atol=0)


@pytest.mark.parametrize("penalty", [receding_importance, l1_of_gates])
def test_their_gradients(penalty: Callable[[nn.Module], Tensor]) -> None:
    class Penalty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model_of(3)

        def forward(self) -> Tensor:
            return penalty(self.model)

    module = Penalty()
    names, values = zip(*module.named_parameters(), strict=True)
    values = tuple(value.detach().requires_grad_() for value in values)

    def called(*given: Tensor) -> Tensor:
        found: Tensor = functional_call(module, dict(zip(names, given, strict=True)), ())
        return found

    assert torch.autograd.gradcheck(called, values)
    assert torch.autograd.gradgradcheck(called, values)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), module(), rtol=1e-14, atol=0)


def test_closed_gates_have_finite_gradients() -> None:
    layer = FusedTSigmaBN2d(2, 3)
    nn.init.constant_(layer.weight, -500)
    receding_importance(layer).backward()
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()


def two_headed(x: Tensor, weight: Tensor, gates: Tensor) -> tuple[list[Tensor], Tensor]:
    layer = FusedTSigmaBN2d(3, 2).double()
    return losses_of(lambda y: functional_call(layer, {"weight": gates}, (y,)), x, weight), weight


def losses_of(layer: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> list[Tensor]:
    y = layer(nn.functional.conv2d(x, weight).repeat(3, 1, 1, 1))
    return [part.tanh().square().mean() * (1 + part[0, 0, 0, 0]) for part in y.chunk(3)]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = (2, 2, 3, 3), (2, 2, 1, 1), (3, 2)
    x, weight, gates = (torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes)
    return x, weight, gates


def test_orthogonal_gradients_are_their_formula() -> None:
    losses, weight = two_headed(*inputs())
    columns = [torch.autograd.grad(loss, weight, retain_graph=True)[0].flatten() for loss in losses]
    expected = sum(
        ((columns[i] @ columns[j]) / (columns[i].norm() * columns[j].norm()) - float(i == j)) ** 2
        for i in range(3)
        for j in range(3)
    )
    found = orthogonal_gradients(losses, weight, alpha=0.7)
    torch.testing.assert_close(found, 0.7 / 6 * expected, rtol=1e-12, atol=0)


def test_their_second_derivative_goes_through_the_layer() -> None:
    assert torch.autograd.gradcheck(lambda *given: orthogonal_gradients(*two_headed(*given)), inputs(), atol=1e-7)


@pytest.mark.skipif(not hasattr(config, "trace_autograd_ops"), reason="this PyTorch cannot trace torch.autograd.grad")
def test_a_step_with_orthogonal_gradients_compiles_to_one_graph() -> None:
    layer = FusedTSigmaBN2d(3, 2).double()
    x, weight, _ = inputs()

    def step() -> Tensor:
        losses = losses_of(layer, x, weight)
        return torch.stack(losses).sum() + orthogonal_gradients(losses, weight, alpha=0.7)

    wanted = [x, weight, layer.weight]
    expected = step()
    gradients = torch.autograd.grad(expected, wanted)
    with config.patch(trace_autograd_ops=True):
        found = torch.compile(step, fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, wanted), gradients)


def test_a_loss_without_a_gradient_changes_nothing() -> None:
    weight = torch.randn(4, requires_grad=True)
    losses = {"a": weight[:2].square().sum(), "b": (weight * 0).sum()}
    penalty = orthogonal_gradients(losses, weight, alpha=2.0)
    assert penalty.item() == pytest.approx(1)  # that of a column of zeros
    (found,) = torch.autograd.grad(penalty, weight)
    assert found.isfinite().all()


def test_errors_say_what_came() -> None:
    loss = torch.ones((), requires_grad=True) * 2
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got 3"):
        receding_importance(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Linear has no layer with sigmoid gates"):
        receding_importance(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="same number of tasks, got 2, 3"):
        l1_of_gates(nn.ModuleList([FusedTSigmaBN2d(2, 4), FusedTSigmaBN2d(3, 4)]))
    with pytest.raises(ValueError, match=r"a number for each of 2 tasks, got shape \[3\]"):
        receding_importance(FusedTSigmaBN2d(2, 4), task_weights=[1, 2, 3])
    with pytest.raises(ValueError, match=r"strength must be a finite number of 0\.0 or more, got -1"):
        receding_importance(FusedTSigmaBN2d(2, 4), -1)
    with pytest.raises(ValueError, match="two losses or more and a parameter, got 1 and 1"):
        orthogonal_gradients([loss], loss)
    with pytest.raises(ValueError, match="must be a scalar with a graph"):
        orthogonal_gradients([loss, torch.ones(())], loss)
