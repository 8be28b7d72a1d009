"""The definitions of all operators by their names: the backend that lacks none, and runs on every device."""

from tsbn_kernels.definition.batch_norm import (
    backward,
    forward_eval,
    forward_tracked,
    forward_training,
    input_gradient,
    moments,
)
from tsbn_kernels.definition.layer_norm import layer_norm, layer_norm_backward

__all__ = [
    "backward",
    "forward_eval",
    "forward_tracked",
    "forward_training",
    "input_gradient",
    "layer_norm",
    "layer_norm_backward",
    "moments",
]
