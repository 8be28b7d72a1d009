"""Fused kernels for task-specific sigmoid batch normalisation (TS-sigma-BN)."""

from tsbn_kernels import functional, memory
from tsbn_kernels.backends import use_backend
from tsbn_kernels.modules import FusedTSigmaBN1d, FusedTSigmaBN2d, FusedTSigmaBN3d

__version__ = "0.1.0"

__all__ = [
    "FusedTSigmaBN1d",
    "FusedTSigmaBN2d",
    "FusedTSigmaBN3d",
    "functional",
    "memory",
    "use_backend",
]
