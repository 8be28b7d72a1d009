"""Statistics over several processes: the conversion of these layers, and what PyTorch's own must be told about them.

``nn.SyncBatchNorm.convert_sync_batchnorm`` asks for subclasses of ``_BatchNorm`` (which these layers are, for
``update_bn`` and FSDP look for that too), and would put one plain layer in the place of T. It offers no hook, so it is
extended here: importing the package changes nothing for layers of other classes.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from tsbn_kernels.layers.batch_norm import FusedTSigmaBN


def convert_sync_batchnorm(model: nn.Module, process_group: Any = None) -> nn.Module:
    """Lets every task-specific layer of a model synchronise its statistics over the ranks of a process group.

    The counterpart of ``nn.SyncBatchNorm.convert_sync_batchnorm``, which is for the plain layers of a model.

    Args:
        model: is changed in place.
        process_group: a ``torch.distributed.ProcessGroup``; None stands for all ranks.

    Returns:
        ``model``.

    Raises:
        ValueError: the model has no task-specific layer, or one of them has ``recover_input=True``.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FusedTSigmaBN)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no task-specific layer to synchronise")
    if recovering := [name for name, layer in layers.items() if layer.recover_input]:
        raise ValueError(
            f"{recovering[0]!r} has recover_input=True, which does not work with a process_group; set it False"
        )
    for layer in layers.values():
        layer.process_group = process_group or "world"
    return model


def extend_sync_conversion() -> None:
    """Lets ``nn.SyncBatchNorm.convert_sync_batchnorm`` give task-specific layers the process group, in their place."""
    plain: Any = nn.SyncBatchNorm.convert_sync_batchnorm.__func__  # type: ignore[attr-defined]

    @functools.wraps(plain)
    def convert(cls: Any, module: nn.Module, process_group: Any = None) -> nn.Module:
        if isinstance(module, FusedTSigmaBN):
            return convert_sync_batchnorm(module, process_group)
        converted: nn.Module = plain(cls, module, process_group)
        return converted

    nn.SyncBatchNorm.convert_sync_batchnorm = classmethod(convert)  # type: ignore[assignment]
