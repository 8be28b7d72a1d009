"""Fused kernels for task-specific sigmoid batch normalisation (TS-sigma-BN)."""

from tsbn_kernels import functional, memory
from tsbn_kernels.backends import use_backend
from tsbn_kernels.convert import convert_model, convert_sync_batchnorm, revert_model
from tsbn_kernels.fold import export_task, fold_into_conv
from tsbn_kernels.hold import hold_absent_tasks
from tsbn_kernels.late import LateFanOut
from tsbn_kernels.modules import FusedTSigmaBN, FusedTSigmaBN1d, FusedTSigmaBN2d, FusedTSigmaBN3d
from tsbn_kernels.multitask import MultiTaskModel
from tsbn_kernels.optim import parameter_groups, split_parameters, task_vector_names
from tsbn_kernels.recompute import recompute_outputs
from tsbn_kernels.sharding import shard_tasks
from tsbn_kernels.states import expand_state_dict
from tsbn_kernels.tools import extend_sync_conversion

extend_sync_conversion()

__version__ = "0.1.0"

__all__ = [
    "FusedTSigmaBN",
    "FusedTSigmaBN1d",
    "FusedTSigmaBN2d",
    "FusedTSigmaBN3d",
    "LateFanOut",
    "MultiTaskModel",
    "convert_model",
    "convert_sync_batchnorm",
    "expand_state_dict",
    "export_task",
    "fold_into_conv",
    "functional",
    "hold_absent_tasks",
    "memory",
    "parameter_groups",
    "recompute_outputs",
    "revert_model",
    "shard_tasks",
    "split_parameters",
    "task_vector_names",
    "use_backend",
]
