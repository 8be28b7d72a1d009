"""A virtual machine for PTX: runs compiled GPU kernels on a CPU under a memory model stricter than a GPU's."""

from .compilers import compile_cuda, compile_triton, find_nvcc, launch_cuda, launch_triton
from .launch import Struct, Violation, launch
from .memory import Out
from .ptx import PTXError, parse
from .report import Report, Row, Traffic

__all__ = [
    "Out",
    "PTXError",
    "Report",
    "Row",
    "Struct",
    "Traffic",
    "Violation",
    "compile_cuda",
    "compile_triton",
    "find_nvcc",
    "launch",
    "launch_cuda",
    "launch_triton",
    "parse",
]
