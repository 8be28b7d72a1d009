"""What PyTorch's own conversions must be told about these layers.

``nn.SyncBatchNorm.convert_sync_batchnorm`` asks for subclasses of ``_BatchNorm`` (which these layers are, for
``update_bn`` and FSDP look for that too), and would put one plain layer in the place of T. It offers no hook, so it is
extended here: importing the package changes nothing for layers of other classes.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from tsbn_kernels.layers.batch_norm import FusedTSigmaBN
from tsbn_kernels.models.convert import convert_sync_batchnorm


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
