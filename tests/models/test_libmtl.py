"""The LibMTL architecture, in LibMTL where it is installed and else in a stand-in of its interface."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from support.libmtl_stand_in import TaskGradients, install
from support.networks import NETWORKS, pretrained
from support.processes import python_output
from torch import Tensor, nn

from tsbn_kernels import revert_model

TASKS = ["age", "smile", "hat"]
T, N = len(TASKS), 4


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Builds the architecture as LibMTL's trainer does: one class of the architecture and a weighting."""
    install(monkeypatch)
    architecture = importlib.import_module("tsbn_kernels.models.libmtl").TSSigmaBN

    class MTLmodel(architecture, TaskGradients):
        pass

    def make(*, rep_grad: bool = False, multi_input: bool = False, **arch_args: Any) -> Any:
        decoders = nn.ModuleDict({task: nn.Linear(16, 1) for task in TASKS})
        encoder = lambda: pretrained("celeba")  # noqa: E731
        return MTLmodel(TASKS, encoder, decoders, rep_grad, multi_input, torch.device("cpu"), **arch_args)

    return make


def images() -> Tensor:
    return torch.randn(N, 3, 16, 16)


def shared_gradients(model: Any) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.get_share_params()]


def test_each_decoder_gets_the_representation_of_its_task(build: Any) -> None:
    model, x = build(), images()
    plain = [revert_model(model.encoder.backbone, t) for t in range(T)]
    y = model(x)
    assert list(y) == TASKS
    for task, encoder in zip(TASKS, plain, strict=True):
        torch.testing.assert_close(y[task], model.decoders[task](encoder(x)), rtol=1e-4, atol=1e-5)


def test_inputs_of_each_task(build: Any) -> None:
    model = build(multi_input=True)
    plain = [revert_model(model.encoder.backbone, t) for t in range(T)]
    for task, encoder in zip(TASKS, plain, strict=True):
        x = images()
        y = model(x, task)
        assert list(y) == [task]
        torch.testing.assert_close(y[task], model.decoders[task](encoder(x)), rtol=1e-4, atol=1e-5)


def test_arch_args_are_those_of_the_conversion(build: Any) -> None:
    assert build().encoder.backbone[5].activation == "relu"
    model = build(variant="tsbn", exclude=["1"], fuse_activation=False)
    assert type(model.encoder.backbone[1]) is nn.BatchNorm2d
    assert model.encoder.backbone[5].gate == "identity"
    assert model.encoder.backbone[5].activation is None


def test_shared_parameters_are_those_of_the_plain_encoder_without_its_norms(build: Any) -> None:
    model = build(variant="tsbn")
    model.encoder.backbone[0].weight.requires_grad_(False)
    shared = {id(parameter) for parameter in model.get_share_params()}
    expected = [module for module in NETWORKS["celeba"]() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len(shared) == len(expected) - 1
    assert not shared & {id(p) for module in model.modules() if hasattr(module, "gates") for p in module.parameters()}


def test_a_backward_for_each_task_and_weighted_shared_gradients(build: Any) -> None:
    """Gates and decoders get the gradients of their task, the shared parameters the weighted sum."""
    model, x = build(), images()
    losses = [y.square().sum() for y in model(x).values()]
    single = [torch.autograd.grad(loss, model.get_share_params(), retain_graph=True) for loss in losses]
    gates = model.encoder.backbone[5].weight
    expected = torch.autograd.grad(sum(losses), gates, retain_graph=True)[0]
    model.backward(torch.stack(losses))
    for index, gradient in enumerate(shared_gradients(model)):
        wanted = sum((t + 1) * single[t][index] for t in range(T))
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gates.grad, expected, rtol=1e-3, atol=1e-4)
    assert all(decoder.weight.grad is not None for decoder in model.decoders.values())


def test_gradients_of_the_representations(build: Any) -> None:
    model, x = build(), images()
    losses = torch.stack([y.square().sum() for y in model(x).values()])
    model.backward(losses)
    expected = shared_gradients(model)
    cut = build(rep_grad=True)
    cut.load_state_dict(model.state_dict())
    cut.backward(torch.stack([y.square().sum() for y in cut(x).values()]))
    assert list(cut.rep) == TASKS
    for gradient, wanted in zip(shared_gradients(cut), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-3)


class Labels:
    def compute_loss(self, predictions: Tensor, labels: Tensor) -> Tensor:
        return (predictions * labels).sum()


def trainer(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    install(monkeypatch)
    adapter = importlib.import_module("tsbn_kernels.models.libmtl")
    architecture = importlib.import_module("LibMTL.architecture")
    monkeypatch.setattr(architecture, "TSSigmaBN", adapter.TSSigmaBN, raising=False)
    return adapter.Trainer(
        task_dict={task: {"metrics": [], "metrics_fn": None, "loss_fn": Labels(), "weight": []} for task in TASKS},
        weighting="EW",
        architecture="TSSigmaBN",
        encoder_class=lambda: pretrained("celeba"),
        decoders=nn.ModuleDict({task: nn.Linear(16, 1) for task in TASKS}),
        rep_grad=False,
        multi_input=False,
        weight_args={},
        arch_args={},
        **{"optim_param": {"optim": "sgd", "lr": 1e-3, "weight_decay": 1e-4}, "scheduler_param": None} | options,
    )


def test_the_trainer_makes_the_groups_and_the_schedule_drives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(monkeypatch, scheduler_param={"scheduler": "step", "step_size": 1, "gamma": 0.1})
    rates = [(group["name"], group["lr"], group["weight_decay"]) for group in made.optimizer.param_groups]
    assert rates == [("base", 1e-3, 1e-4), ("gates", pytest.approx(0.1), 0.0)]
    assert made.scheduler.optimizer is made.optimizer
    listed = {parameter for group in made.optimizer.param_groups for parameter in group["params"]}
    assert listed == set(made.model.parameters())  # which is a method again
    before = made.model.encoder.backbone[1].weight.detach().clone()
    loader = [(images(), {task: torch.randn(N, 1) for task in TASKS})]
    made.train(loader, loader, epochs=1)
    assert (made.model.encoder.backbone[1].weight != before).any()
    assert [group["lr"] for group in made.optimizer.param_groups] == [pytest.approx(1e-4), pytest.approx(1e-2)]


def test_options_of_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(monkeypatch, optim_param={"optim": "adam", "lr": 1e-2, "gate_lr_multiplier": 5, "eps": 1e-6})
    assert [group["lr"] for group in made.optimizer.param_groups] == [1e-2, pytest.approx(5e-2)]
    assert {group["eps"] for group in made.optimizer.param_groups} == {1e-6}


def test_a_rate_must_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="optim_param must have 'lr'"):
        trainer(monkeypatch, optim_param={"optim": "adam"})


def test_only_the_adapter_needs_libmtl() -> None:
    code = (
        "import sys; sys.modules['LibMTL'] = None; import tsbn_kernels\n"
        "try: import tsbn_kernels.models.libmtl\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    assert "LibMTL" in python_output(code)
