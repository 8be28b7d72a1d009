"""A minimal stand-in of LibMTL: the interface between its trainer, a weighting and an architecture, in its names.

Written after the public repository as of May 2025. ``install()`` puts it where ``import LibMTL`` finds it, unless
LibMTL itself is there.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class AbsArchitecture(nn.Module):
    def __init__(
        self,
        task_name: Any,
        encoder_class: Any,
        decoders: Any,
        rep_grad: Any,
        multi_input: Any,
        device: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.task_name, self.task_num = task_name, len(task_name)
        self.encoder_class, self.decoders = encoder_class, decoders
        self.rep_grad, self.multi_input, self.device, self.kwargs = rep_grad, multi_input, device, kwargs
        if rep_grad:
            self.rep_tasks, self.rep = {}, {}

    def _prepare_rep(self, rep: Tensor, task: str, same_rep: bool | None = None) -> Tensor:
        if not self.rep_grad:
            return rep
        if same_rep:
            self.rep = rep
        else:
            self.rep[task] = rep
        self.rep_tasks[task] = rep.detach().clone().requires_grad_()
        return self.rep_tasks[task]


class HPS(AbsArchitecture):
    """Hard parameter sharing: one encoder, one representation for all tasks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.encoder = self.encoder_class()

    def forward(self, inputs: Tensor, task_name: str | None = None) -> dict[str, Tensor]:
        representation = self.encoder(inputs)
        names = self.task_name if task_name is None else [task_name]
        return {task: self.decoders[task](representation) for task in names}

    def get_share_params(self) -> Any:
        return self.encoder.parameters()

    def zero_grad_share_params(self) -> None:
        self.encoder.zero_grad(set_to_none=False)


class EW(nn.Module):
    """Equal weights."""

    def init_param(self) -> None:
        """Weightings make their parameters here."""

    def backward(self, losses: Tensor, **kwargs: Any) -> Any:
        losses.sum().backward()
        return np.ones(self.task_num)


class TaskGradients(EW):
    """As the gradient-balancing weightings: one backward a task, then weights, and shared gradients written back."""

    def backward(self, losses: Tensor, **kwargs: Any) -> Any:
        weights = np.arange(1, self.task_num + 1)
        if self.rep_grad:
            for loss in losses:
                loss.backward(retain_graph=True)
            for weight, task in zip(weights, self.task_name, strict=True):
                self.rep[task].backward(float(weight) * self.rep_tasks[task].grad, retain_graph=True)
            return weights
        gradients = []
        for loss in losses:
            loss.backward(retain_graph=True)
            gradients.append([parameter.grad.clone() for parameter in self.get_share_params()])
            self.zero_grad_share_params()
        for parameter, *rows in zip(self.get_share_params(), *gradients, strict=True):
            parameter.grad.data = sum(float(weight) * row for weight, row in zip(weights, rows, strict=True))
        return weights


class CELoss:
    def compute_loss(self, predictions: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(predictions, labels)


class AccMetric:
    """Metrics are not part of what is tested."""


class Trainer(nn.Module):
    def __init__(
        self,
        task_dict: dict[str, Any],
        weighting: str,
        architecture: str,
        encoder_class: Any,
        decoders: nn.ModuleDict,
        rep_grad: bool,
        multi_input: bool,
        optim_param: dict[str, Any],
        scheduler_param: dict[str, Any] | None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.task_dict, self.multi_input, self.kwargs = task_dict, multi_input, kwargs

        architecture_class: Any = vars(sys.modules["LibMTL.architecture"])[architecture]
        weighting_class: Any = vars(sys.modules["LibMTL.weighting"])[weighting]

        class MTLmodel(architecture_class, weighting_class):
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options)
                self.init_param()

        names, device = list(task_dict), torch.device("cpu")
        self.model = MTLmodel(names, encoder_class, decoders, rep_grad, multi_input, device, **kwargs["arch_args"]).to(
            device
        )
        self._prepare_optimizer(optim_param, scheduler_param)

    def _prepare_optimizer(self, optim_param: dict[str, Any], scheduler_param: dict[str, Any] | None) -> None:
        options = {key: value for key, value in optim_param.items() if key != "optim"}
        optimisers = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
        self.optimizer = optimisers[optim_param["optim"]](self.model.parameters(), **options)
        self.scheduler = None
        if scheduler_param is not None:
            options = {key: value for key, value in scheduler_param.items() if key != "scheduler"}
            schedulers = {"step": torch.optim.lr_scheduler.StepLR, "exp": torch.optim.lr_scheduler.ExponentialLR}
            self.scheduler = schedulers[scheduler_param["scheduler"]](self.optimizer, **options)

    def train(self, train_dataloaders: Any, test_dataloaders: Any, epochs: int) -> None:  # type: ignore[override]
        for _ in range(epochs):
            self.model.train()
            loaders = train_dataloaders if self.multi_input else {None: train_dataloaders}
            for batches in zip(*loaders.values(), strict=True):
                losses = {}
                for task, (data, label) in zip(loaders, batches, strict=True):
                    predictions = self.model(data, task)
                    labels = {task: label} if self.multi_input else label
                    for name, prediction in predictions.items():
                        losses[name] = self.task_dict[name]["loss_fn"].compute_loss(prediction, labels[name])
                self.optimizer.zero_grad(set_to_none=False)
                self.model.backward(torch.stack(list(losses.values())), **self.kwargs["weight_args"])
                self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()


def install(monkeypatch: Any) -> None:
    """Makes ``LibMTL`` importable for one test."""
    if importlib.util.find_spec("LibMTL") is not None:
        return
    contents: dict[str, dict[str, Any]] = {
        "LibMTL": {"Trainer": Trainer},
        "LibMTL.architecture": {"HPS": HPS},
        "LibMTL.architecture.abstract_arch": {"AbsArchitecture": AbsArchitecture},
        "LibMTL.loss": {"CELoss": CELoss},
        "LibMTL.metrics": {"AccMetric": AccMetric},
        "LibMTL.weighting": {"EW": EW, "PCGrad": TaskGradients, "CAGrad": TaskGradients},
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        module.__dict__.update(attributes, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "tsbn_kernels.models.libmtl", raising=False)
