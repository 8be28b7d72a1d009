"""Fused kernels for task-specific sigmoid normalisation (TS-sigma-BN, TS-sigma-LN)."""

from tsbn_kernels import functional, memory
from tsbn_kernels.backends import use_backend
from tsbn_kernels.layers.batch_norm import FusedTSigmaBN, FusedTSigmaBN1d, FusedTSigmaBN2d, FusedTSigmaBN3d
from tsbn_kernels.layers.late_fan_out import LateFanOut
from tsbn_kernels.layers.layer_norm import FusedTSigmaLN, FusedTSigmaLN2d, FusedTSigmaRMSNorm
from tsbn_kernels.layers.mixing import task_index
from tsbn_kernels.models.convert import convert_model, revert_model
from tsbn_kernels.models.earlier_names import find_earlier_names
from tsbn_kernels.models.expand import expand_state_dict
from tsbn_kernels.models.export import export_task, fold_into_conv
from tsbn_kernels.models.grow import add_task, remove_task
from tsbn_kernels.models.hold import hold_absent_tasks
from tsbn_kernels.models.multitask import MultiTaskModel
from tsbn_kernels.models.parameter_groups import parameter_groups, split_parameters, task_vector_names
from tsbn_kernels.models.prune import Pruning, prune
from tsbn_kernels.models.sync_conversion import convert_sync_batchnorm, extend_sync_conversion
from tsbn_kernels.operator.recompute_outputs import recompute_outputs
from tsbn_kernels.sharding import shard_tasks

find_earlier_names()
extend_sync_conversion()

__version__ = "0.1.0"

__all__ = [
    "FusedTSigmaBN",
    "FusedTSigmaBN1d",
    "FusedTSigmaBN2d",
    "FusedTSigmaBN3d",
    "FusedTSigmaLN",
    "FusedTSigmaLN2d",
    "FusedTSigmaRMSNorm",
    "LateFanOut",
    "MultiTaskModel",
    "Pruning",
    "add_task",
    "convert_model",
    "convert_sync_batchnorm",
    "expand_state_dict",
    "export_task",
    "fold_into_conv",
    "functional",
    "hold_absent_tasks",
    "memory",
    "parameter_groups",
    "prune",
    "recompute_outputs",
    "remove_task",
    "revert_model",
    "shard_tasks",
    "split_parameters",
    "task_index",
    "task_vector_names",
    "use_backend",
]
