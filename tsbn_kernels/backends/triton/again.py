"""How a compiled kernel is launched again: by Triton's launcher, without what Triton's runner does around it.

The runner describes every launch to hooks, though nobody listens, and looks for scratch memory that a kernel does not
need. On the host this takes twice as long as the launch itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
from triton import knobs
from triton.runtime import driver

# The launcher is no public interface: it is called in those versions alone in which it takes what it is given here.
KNOWN = ("3.7.", "3.8.")


def launcher_of(compiled: Any, programs: int) -> Callable[..., None]:
    """What launches a compiled kernel on the device that is the current one now, and on its current stream.

    Where a hook listens, and where anything is not as it is known to be, that is Triton's runner.
    """
    by_runner: Callable[..., None] = compiled[programs, 1, 1]
    if not _is_known(compiled.run):
        return by_runner
    own, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    launch, attributes = own.launch, (own.launch_cooperative_grid, own.launch_pdl)
    description = own.arg_annotations, own.kernel_signature
    nothing = (None,) * 5  # what a hook is told, two hooks, and scratch memory of two kinds
    device, stream_of = driver.active.get_current_device(), driver.active.get_current_stream

    def run(*arguments: Any) -> None:
        if _hears(knobs.runtime.launch_enter_hook) or _hears(knobs.runtime.launch_exit_hook):
            by_runner(*arguments)
        else:
            launch(
                programs, 1, 1, stream_of(device), function, *attributes, metadata, *nothing, *description, arguments
            )

    return run


def _hears(hook: Any) -> bool:
    """Whether a hook is one: Triton's are chains, which may be empty."""
    return hook is not None and bool(getattr(hook, "calls", True))


def _is_known(launcher: Any) -> bool:
    """Whether a launcher is that of NVIDIA's GPUs, and calls for no more than the kernel's arguments."""
    if not triton.__version__.startswith(KNOWN) or type(launcher).__module__ != "triton.backends.nvidia.driver":
        return False
    scratch = launcher.global_scratch_size or launcher.profile_scratch_size
    # A launcher of tensor descriptors wraps the driver's.
    plain = launcher.launch is driver.active.utils.launch
    return plain and not scratch and not getattr(launcher, "gsan_enabled", False)
