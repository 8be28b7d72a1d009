"""An architecture for the trainer of LibMTL, and a trainer that knows of gates; importing this module needs LibMTL.

https://github.com/median-research-group/LibMTL. Its newer trainers look architectures up by name in
``LibMTL.architecture``, older ones take the class: docs/tutorial.md shows both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import LibMTL
import torch
from LibMTL.architecture.abstract_arch import AbsArchitecture
from torch import Tensor, nn

from tsbn_kernels.models.convert import convert_model
from tsbn_kernels.models.multitask import MultiTaskModel
from tsbn_kernels.models.parameter_groups import parameter_groups, split_parameters

_GROUP_OPTIONS = ("lr", "weight_decay", "gate_lr_multiplier", "layer_norm_lr_multiplier")


class TSSigmaBN(AbsArchitecture):  # type: ignore[misc]  # LibMTL has no types
    """One encoder whose normalisation is specific to each task; the rest of it is shared.

    Args:
        task_name: the names of the tasks.
        encoder_class: makes the plain encoder, whose batch normalisations are converted.
        decoders: a module for each task by its name.
        rep_grad: LibMTL takes gradients of the representations, one for each task.
        multi_input: each task has its own inputs.
        device: of the model.
        kwargs: LibMTL's ``arch_args``: ``variant``, ``fuse_activation``, ``pretrained`` and ``exclude`` of
            :func:`~tsbn_kernels.convert_model`.
    """

    def __init__(
        self,
        task_name: Sequence[str],
        encoder_class: Callable[[], nn.Module],
        decoders: Mapping[str, nn.Module],
        rep_grad: bool,
        multi_input: bool,
        device: torch.device,
        **kwargs: Any,
    ) -> None:
        super().__init__(task_name, encoder_class, decoders, rep_grad, multi_input, device, **kwargs)
        # The decoders stay outside: between them and the encoder LibMTL cuts the graph where rep_grad is set.
        representations = {task: nn.Identity() for task in task_name}
        backbone = convert_model(encoder_class(), len(task_name), inplace=True, **kwargs)
        self.encoder = MultiTaskModel(backbone, representations)

    def forward(self, inputs: Tensor, task_name: str | None = None) -> dict[str, Any]:
        """Gives predictions by task name: of all tasks, or of ``task_name`` alone, whose inputs these are."""
        representations = self.encoder(inputs, None if task_name is None else [task_name])
        return {
            task: self.decoders[task](self._prepare_rep(representation, task, same_rep=False))
            for task, representation in representations.items()
        }

    def get_share_params(self) -> list[nn.Parameter]:
        """Gives the encoder's trainable parameters without those of the task-specific layers."""
        shared, _ = split_parameters(self.encoder)
        return shared

    def zero_grad_share_params(self) -> None:
        """Zeroes the gradients of :meth:`get_share_params`; those of the gates, as the decoders', go on adding up."""
        for parameter in self.get_share_params():
            if parameter.grad is not None:  # LibMTL writes the weighted gradients into what is here: zero, not None
                parameter.grad.zero_()


class Trainer(LibMTL.Trainer):  # type: ignore[misc]
    """LibMTL's trainer, whose optimiser has the groups of :func:`~tsbn_kernels.parameter_groups`.

    ``optim_param`` needs ``lr``, and takes the multipliers of that function too. The schedule of ``scheduler_param``
    multiplies the rate of every group.

    Raises:
        ValueError: ``optim_param`` has no ``lr``.
    """

    def _prepare_optimizer(self, optim_param: Mapping[str, Any], scheduler_param: Mapping[str, Any] | None) -> None:
        if "lr" not in optim_param:
            raise ValueError(f"optim_param must have 'lr', of which the gates' rate is a multiple; got {optim_param!r}")
        options = {key: optim_param[key] for key in _GROUP_OPTIONS if key in optim_param}
        groups = parameter_groups(self.model, **options)
        self.model.parameters = lambda: groups  # LibMTL hands on to the optimiser what this returns
        try:
            rest = {key: value for key, value in optim_param.items() if key not in _GROUP_OPTIONS or key == "lr"}
            super()._prepare_optimizer(rest, scheduler_param)
        finally:
            del self.model.parameters
