"""How a compiled kernel is launched again: by Triton's launcher, without what Triton's runner does around it.

The runner describes every launch to hooks, though nobody listens, and looks for scratch memory that a kernel does not
need. On the host this takes twice as long as the launch itself.
"""

from __future__ import annotations

from collections.abc import Callable
from types import BuiltinFunctionType
from typing import Any

import triton
from triton import knobs
from triton.runtime import driver

# The launcher is no public interface: it is called in those versions alone in which it takes what it is given here.
KNOWN = ("3.6.", "3.7.", "3.8.")


def launcher_of(compiled: Any, programs: int) -> Callable[..., None]:
    """What launches a compiled kernel on the device that is the current one now, and on its current stream.

    Where a hook listens, and where anything is not as it is known to be, that is Triton's runner.
    """
    by_runner: Callable[..., None] = compiled[programs, 1, 1]
    if not _is_known(compiled.run):
        return by_runner
    own, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    launch, nothing = own.launch, (None,) * 3  # what a hook is told, and two hooks
    of_kernel: tuple[Any, ...] = own.launch_cooperative_grid, own.launch_pdl
    scratch = None, None
    one_for_all = hasattr(own, "kernel_signature")  # from 3.7 on; before each kernel has a launcher of its own
    if one_for_all:
        of_kernel += metadata, *nothing, *scratch, own.arg_annotations, own.kernel_signature
    else:
        of_kernel += *scratch, metadata, *nothing
    device, stream_of = driver.active.get_current_device(), driver.active.get_current_stream

    def run(*arguments: Any) -> None:
        if _hears(knobs.runtime.launch_enter_hook) or _hears(knobs.runtime.launch_exit_hook):
            by_runner(*arguments)
        else:
            given = (arguments,) if one_for_all else arguments
            launch(programs, 1, 1, stream_of(device), function, *of_kernel, *given)

    return run


def _hears(hook: Any) -> bool:
    """Whether a hook is one: Triton's are chains, which may be empty."""
    return hook is not None and bool(getattr(hook, "calls", True))


def _is_known(launcher: Any) -> bool:
    """Whether a launcher is that of NVIDIA's GPUs, and calls for no more than the kernel's arguments."""
    if not triton.__version__.startswith(KNOWN) or type(launcher).__module__ != "triton.backends.nvidia.driver":
        return False
    scratch = launcher.global_scratch_size or launcher.profile_scratch_size
    plain = isinstance(launcher.launch, BuiltinFunctionType)  # one of tensor descriptors wraps the driver's
    return plain and not scratch and not getattr(launcher, "gsan_enabled", False)
