"""What operators take for statistics that are known more exactly than they store them."""

from __future__ import annotations

import torch

from tsbn_kernels.definition import batch_norm as reference
from tsbn_kernels.definition.options import Options, Saved


def coefficients(saved: Saved, options: Options) -> tuple[Saved, Options]:
    """What the operators take for a joined batch: gate values, and statistics of their dtype.

    What that dtype cannot hold of the joined mean goes into the bias.
    """
    wide = reference.accumulate_dtype(saved.x.dtype)
    gates, narrow = reference.gate_values(saved.weight.to(wide), options.gate), saved.mean.to(wide)
    shift = (narrow - saved.mean) * (gates * torch.rsqrt(saved.var + options.eps))
    bias = (shift if saved.bias is None else shift + saved.bias).to(wide)
    given = saved._replace(weight=gates, bias=bias, mean=narrow, var=saved.var.to(wide))
    return given, options._replace(gate="identity")
