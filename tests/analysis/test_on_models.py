"""What runs a model: conflicts of gradients, pruning, representations."""

from __future__ import annotations

import pytest
import torch
from support.runs import OwnNorm, T, every_layer, late, multitask, random_gates
from torch import Tensor, nn

from tsbn_kernels import FusedTSigmaBN2d, split_parameters
from tsbn_kernels.analysis import gradient_conflicts, importance, specialization_test, task_representations

IMAGES = (4, 3, 6, 5)


def losses_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: (y * torch.randn_like(y)).sum() for name, y in model(torch.randn(IMAGES)).items()}


def test_conflicts_are_cosines_of_whole_gradients() -> None:
    model = multitask().double()
    torch.set_default_dtype(torch.float64)
    try:
        losses = losses_of(model)
    finally:
        torch.set_default_dtype(torch.float32)
    shared = split_parameters(model)[0]
    whole = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared, retain_graph=True)])
            for loss in losses.values()
        ]
    )
    found = gradient_conflicts(model, losses)
    expected = torch.nn.functional.cosine_similarity(whole[:, None], whole[None], dim=2)
    torch.testing.assert_close(found.cosine, expected)
    torch.testing.assert_close(found.norms, whole.norm(dim=1))
    assert found.tasks == ("age", "hat", "smile")
    assert all(parameter.grad is None for parameter in model.parameters())
    convolution = model.backbone[0].weight  # type: ignore[union-attr,index]
    (one,) = gradient_conflicts(model, {"age": losses["age"]}, [convolution]).norms.tolist()
    assert one == pytest.approx(float(torch.autograd.grad(losses["age"], convolution)[0].norm()))


def test_known_conflicts() -> None:
    model = nn.Linear(2, 1, bias=False)
    w = model.weight[0]
    losses = [w @ torch.tensor(direction) for direction in ([1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [1.0, 1.0])]
    found = gradient_conflicts(model, [*losses, (model.weight * 0).sum()])
    half = 0.5**0.5
    expected = [
        [1, 0, -1, half, 0],
        [0, 1, 0, half, 0],
        [-1, 0, 1, -half, 0],
        [half, half, -half, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    torch.testing.assert_close(found.cosine, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(found.norms, torch.tensor([1, 2, 3, 2**0.5, 0], dtype=torch.float64))
    other = nn.Linear(1, 1)
    apart = gradient_conflicts(other, [other.weight.sum(), other.bias.sum()])  # each has no part in the other
    assert apart.cosine.tolist() == [[1, 0], [0, 1]]


def test_no_more_than_one_gradient_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """T gradients of a group are as much as one of all parameters; of a single parameter it may be T of them."""
    tasks, groups = 40, []
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(50)), nn.Linear(16, tasks))
    losses = list(model(torch.randn(2, 16)).square().sum(0))
    grad = torch.autograd.grad

    def watched(loss, inputs, **options):
        groups.append(sum(parameter.numel() for parameter in inputs))
        return grad(loss, inputs, **options)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    monkeypatch.setattr("tsbn_kernels.analysis.conflicts._FREE", 0)
    gradient_conflicts(model, losses)
    parameters = [parameter.numel() for parameter in model.parameters()]
    assert tasks * max(groups) <= max(sum(parameters), tasks * max(parameters))
    assert sum(groups) == tasks * sum(parameters)
    groups.clear()
    gradient_conflicts(model, losses[:2])
    assert len(groups) < 2 * 5  # few passes where there is room
    groups.clear()
    monkeypatch.undo()
    monkeypatch.setattr(torch.autograd, "grad", watched)
    gradient_conflicts(model, losses)
    assert len(groups) == tasks  # one for each loss of a small model


@pytest.mark.parametrize(
    ("losses", "kind", "message"),
    [
        ({}, ValueError, "0 losses"),
        ({"a": torch.ones(())}, ValueError, "'a' must be a scalar with a graph"),
        ({"a": torch.ones(2, requires_grad=True)}, ValueError, r"shape \[2\]"),
        ({"a": 1.0}, TypeError, "the loss of 'a'"),
    ],
)
def test_bad_losses_are_refused(losses, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        gradient_conflicts(nn.Linear(2, 2), losses)


def test_bad_parameters_are_refused() -> None:
    model = nn.Linear(2, 2)
    loss = model(torch.ones(1, 2)).sum()
    with pytest.raises(ValueError, match="0 parameters"):
        gradient_conflicts(model, [loss], [])
    with pytest.raises(ValueError, match="leave out those that are frozen"):
        gradient_conflicts(model, [loss], [torch.ones(2)])


@pytest.mark.parametrize("make", [every_layer, late])
def test_pruning_takes_the_largest_gates_of_a_task_from_all(make) -> None:
    model = make().eval()
    x = torch.randn(*((2, 3, 6, 5) if make is late else (T * 2, 3, 6, 5)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    y = model(x)
    seen: list[Tensor] = []

    def metric(pruned: nn.Module) -> list[float]:
        seen.append(importance(pruned).matrix)
        return pruned(x).unflatten(0, (T, -1)).detach().abs().sum((1, *range(2, y.dim() + 1))).tolist()

    k = 3
    drops = specialization_test(model, metric, k)
    whole = importance(model).matrix
    assert len(seen) == T + 1 and torch.equal(seen[0], whole)
    for task, pruned in enumerate(seen[1:]):
        top = sorted(range(whole.shape[1]), key=lambda column: -float(whole[task, column]))[:k]
        expected = whole.clone()
        expected[:, top] = 0
        torch.testing.assert_close(pruned, expected)
    assert drops.shape == (T, T) and drops.dtype == torch.float64 and bool((drops != 0).any())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(model(x), y)


def test_a_pruned_filter_is_silent_and_what_it_does_not_reach_stays() -> None:
    layer = FusedTSigmaBN2d(2, 3, bias="frozen").eval()
    layer.bias.normal_()
    layer.weight.data = torch.tensor([[2.0, 0.0, -2.0], [-1.0, -2.0, 1.5]])
    x = torch.randn(4, 3, 2, 2)
    outputs: list[Tensor] = []

    def metric(model: nn.Module) -> dict[str, float]:
        outputs.append(model(x).detach())
        return {"task 1": 10.0 + len(outputs), "task 0": 20.0}

    drops = specialization_test(layer, metric, 1)
    assert drops.tolist() == [[0, -1], [0, -2]]
    for pruned, gone in zip(outputs[1:], (0, 2), strict=True):
        assert float(pruned[:, gone].abs().max()) < 1e-30
        kept = [channel for channel in range(3) if channel != gone]
        assert torch.equal(pruned[:, kept], outputs[0][:, kept])


class NotOfWeight(OwnNorm):
    gate = "identity"  # which is wrong: they are sigmoids


class NoWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Parameter(torch.rand(2, 3))


def raising(_: nn.Module) -> list[float]:
    raise RuntimeError("out of images")


@pytest.mark.parametrize(
    ("model", "metric", "k", "kind", "message"),
    [
        (FusedTSigmaBN2d(2, 3), lambda _: [0, 0], 4, ValueError, "at most the 3 filters"),
        (FusedTSigmaBN2d(2, 3), lambda _: [0], 1, ValueError, r"must score 2 tasks, got shape \[1\]"),
        (FusedTSigmaBN2d(2, 3), lambda _: {"age": 1, "hat": 1}, 1, ValueError, "must score task 0, task 1, got age"),
        (NotOfWeight(2, 3), lambda _: [0, 0], 1, TypeError, "set gate = 'sigmoid'"),
        (NoWeight(), lambda _: [0, 0], 1, TypeError, "needs a weight of the shape of its gates"),
        (FusedTSigmaBN2d(2, 3), raising, 1, RuntimeError, "out of images"),
    ],
)
def test_bad_pruning_is_refused_and_leaves_the_model_alone(model, metric, k, kind, message: str) -> None:
    random_gates(model) if not isinstance(model, NoWeight) else None
    before = importance(model).matrix
    with pytest.raises(kind, match=message):
        specialization_test(model, metric, k)
    assert torch.equal(importance(model).matrix, before)


def test_representations_are_what_the_heads_get() -> None:
    model = multitask().eval()
    images = torch.randn(IMAGES)
    found = task_representations(model, images)
    assert found.shape == (T, 4, 6)
    predictions = model(images)
    for task, (name, head) in zip(found, model.heads.items(), strict=True):
        torch.testing.assert_close(head[2](task), predictions[name])  # type: ignore[index,operator]
    torch.testing.assert_close(task_representations(model, images, "backbone"), found)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_representations_of_other_models_are_of_the_last_layer() -> None:
    model = every_layer().eval()
    x = torch.randn(T * 2, 3, 6, 5)
    torch.testing.assert_close(task_representations(model, x), model(x).mean(1).unflatten(0, (T, 2)))
    first = model[:2](x).mean((2, 3)).unflatten(0, (T, 2))
    torch.testing.assert_close(task_representations(model, x, "1"), first)
    sample_major = nn.Sequential(nn.Conv2d(3, 4, 1), FusedTSigmaBN2d(T, 4, stacking="sample_major")).eval()
    expected = sample_major(x).mean((2, 3)).unflatten(0, (2, T)).transpose(0, 1)
    torch.testing.assert_close(task_representations(sample_major, x), expected)


@pytest.mark.parametrize(
    ("layer", "message"), [("7", "no module '7'"), ("0", "name a layer behind the fan-out"), ("spare", "did not run")]
)
def test_layers_without_representations_are_refused(layer: str, message: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), FusedTSigmaBN2d(T, 4, fan_out=True))
    if layer == "spare":
        model[1].spare = nn.Identity()
        layer = "1.spare"
    with pytest.raises(ValueError, match=message):
        task_representations(model, torch.randn(4, 3, 2, 2), layer)
    with pytest.raises(ValueError, match="no layer with gates"):
        task_representations(nn.Linear(2, 2), torch.randn(4, 2))
