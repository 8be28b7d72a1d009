"""Functions in processes of their own: the most memory that one has taken is that of the process's life."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
_FORKS = "forkserver" in multiprocessing.get_all_start_methods()


def in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """Calls a function, which is pickled as its arguments and result are, in a process that ends afterwards.

    The processes are forks of one that has imported PyTorch and done nothing else: to import it takes seconds.
    """
    context = multiprocessing.get_context("forkserver" if _FORKS else "spawn")
    context.set_forkserver_preload(["torch"])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()
