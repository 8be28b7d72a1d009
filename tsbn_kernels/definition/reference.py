"""The definitions of all operators by their names: the backend that lacks none, and runs on every device."""

from tsbn_kernels.definition.batch_norm import (
    backward,
    forward_eval,
    forward_tracked,
    forward_training,
    input_gradient,
    moments,
)
from tsbn_kernels.definition.double_backward import double_backward, double_backward_sums
from tsbn_kernels.definition.layer_norm import layer_norm, layer_norm_backward, layer_norm_double_backward
from tsbn_kernels.definition.mixed_batch_norm import (
    mixed_backward,
    mixed_forward_eval,
    mixed_forward_tracked,
    mixed_forward_training,
)
from tsbn_kernels.definition.mixed_layer_norm import mixed_layer_norm, mixed_layer_norm_backward

__all__ = [
    "backward",
    "double_backward",
    "double_backward_sums",
    "forward_eval",
    "forward_tracked",
    "forward_training",
    "input_gradient",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_double_backward",
    "mixed_backward",
    "mixed_forward_eval",
    "mixed_forward_tracked",
    "mixed_forward_training",
    "mixed_layer_norm",
    "mixed_layer_norm_backward",
    "moments",
]
