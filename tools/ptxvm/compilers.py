"""Compiling kernels offline, from Triton and from CUDA C++, and running what the compilers made."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .build import cache_directory, digest, missing
from .launch import Dim, launch
from .memory import Memory, Out, is_array
from .report import Report


class _Pointer:
    """What Triton looks at in a tensor: its dtype, and its address as the machine will see it."""

    def __init__(self, array: Any) -> None:
        import torch

        self._address = Memory().add(array, "")
        self.dtype = getattr(torch, str(array.dtype)) if isinstance(array, np.ndarray) else array.dtype

    def data_ptr(self) -> int:
        return self._address


def compile_triton(kernel: Any, args: Sequence[Any], *, target: int = 80, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Compiles a `@triton.jit` function for a compute capability (80, 90, 100) as its launcher would specialise it.

    Returns Triton's compiled kernel and the arguments by name. `options` are constexprs and num_warps and the like.
    """
    from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped, unused-ignore]
    from triton.compiler import ASTSource, compile, make_backend  # type: ignore[import-untyped, unused-ignore]
    from triton.runtime.jit import create_function_from_signature  # type: ignore[import-untyped, unused-ignore]

    gpu = GPUTarget("cuda", target, 32)
    backend = make_backend(gpu)
    arrays = [a.array if isinstance(a, Out) else a for a in args]
    stand_ins = [_Pointer(a) if is_array(a) else a for a in arrays]
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, rest = binder(*stand_ins, **options)
    rest["debug"] = False
    parsed, signature, constants, attributes = kernel._pack_args(backend, rest, bound, specialization, rest)
    compiled = compile(ASTSource(kernel, signature, constants, attributes), target=gpu, options=parsed.__dict__)
    values = bound | dict(zip(bound, args, strict=False))
    return compiled, {name: value for name, value in values.items() if signature[name] != "constexpr"}


def launch_triton(
    kernel: Any,
    grid: Dim | Callable[[Mapping[str, Any]], Dim],
    *args: Any,
    target: int = 80,
    schedule: str | int = "forward",
    **options: Any,
) -> Report:
    """Compiles a `@triton.jit` function offline and runs its PTX: `launch_triton(f, (8,), x, Out(y), n, B=128)`.

    Triton lets threads that hold copies of a sum store it to the same place, though contraction to fma may have made
    the copies differ in the last bit: such collisions are counted, not refused.
    """
    compiled, values = compile_triton(kernel, args, target=target, **options)
    meta = compiled.metadata
    sizes = grid({**options, **values}) if callable(grid) else grid
    blocks = int(np.prod(sizes)) * meta.num_ctas
    scratch_sizes = (meta.global_scratch_size, meta.profile_scratch_size)
    scratch = [np.zeros(size * blocks, np.uint8) if size else None for size in scratch_sizes]
    return launch(
        compiled.asm["ptx"],
        meta.name,
        sizes,
        meta.num_warps * 32,
        [*values.values(), *scratch],
        shared=meta.shared,
        cooperative=meta.launch_cooperative_grid,
        schedule=schedule,
        stores_may_collide=True,
        names=[*values, "global_scratch", "profile_scratch"],
    )


def find_nvcc() -> str | None:
    """Nvcc of the PATH, of CUDA_HOME, or of the wheels that the `dev` extra installs."""
    if found := shutil.which("nvcc"):
        return found
    wheels = Path(sysconfig.get_path("purelib")) / "nvidia"
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), *sorted(wheels.glob("cu*"), reverse=True)]
    candidates = [Path(home) / "bin" / "nvcc" for home in homes if home]
    return next((str(c) for c in candidates if c.exists()), None)


def compile_cuda(source: str, *, target: int | str = 80, flags: Sequence[str] = ()) -> str:
    """The PTX that nvcc makes of CUDA C++, for compute_<target>; kept in the cache."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("no nvcc on the PATH, in CUDA_HOME, or in a wheel (see the dev extra)")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    command = [nvcc, "-ptx", "-lineinfo", "-std=c++17", f"-arch=compute_{target}", *flags]
    kept = cache_directory() / "ptx" / f"{digest(source, version, ' '.join(command[1:]))}.ptx"
    with missing(kept, kept.with_suffix(".lock")) as needed:
        if needed:
            _compile(command, source, kept)
    return kept.read_text()


def _compile(command: Sequence[str], source: str, kept: Path) -> None:
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        file, made = Path(scratch) / "kernel.cu", Path(scratch) / "kernel.ptx"
        file.write_text(source)
        done = subprocess.run([*command, str(file), "-o", str(made)], check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc does not compile it:\n{done.stderr}")
        made.replace(kept)


def launch_cuda(
    source: str,
    name: str,
    grid: Dim,
    block: Dim,
    args: Sequence[Any],
    *,
    target: int | str = 80,
    flags: Sequence[str] = (),
    **options: Any,
) -> Report:
    """Compiles CUDA C++ with nvcc and runs one of its kernels; `options` are those of `launch`."""
    return launch(compile_cuda(source, target=target, flags=flags), name, grid, block, args, **options)
