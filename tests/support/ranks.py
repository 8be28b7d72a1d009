"""Functions run on several processes of torch.distributed (gloo), which are started once and serve many cases."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed

_CONTEXT: Any = multiprocessing.get_context("forkserver")
# The server imports once what its forks have from then on.
_CONTEXT.set_forkserver_preload(["torch.distributed.checkpoint", "torch.distributed.fsdp", "pytest", "support"])
_ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
_TIMEOUT = 120.0  # seconds in which a case must end
_pool: list[tuple[Any, Connection]] = []


def run(case: Callable[..., Any], world_size: int, *args: Any, timeout: float = _TIMEOUT / 2) -> list[Any]:
    """Calls a function of a module with the same arguments on every rank; returns what they return, in their order.

    Each rank has a fresh default process group, whose collectives wait for ``timeout`` seconds, one thread and the seed
    0. What goes in and out must be picklable.

    Raises:
        AssertionError: a rank raised, with the tracebacks of all that did; or it died, or did not end in time.
    """
    while len(_pool) < world_size:
        _start()
    with tempfile.TemporaryDirectory() as folder:
        for rank, (_, pipe) in enumerate(_pool[:world_size]):
            pipe.send_bytes(pickle.dumps((case, args, rank, world_size, Path(folder, "store").as_uri(), timeout)))
        answers = [_answer(rank) for rank in range(world_size)]
    if complaints := [f"rank {rank}: {result}" for rank, (good, result) in enumerate(answers) if not good]:
        _restart()
        raise AssertionError("\n".join(complaints))
    return [result for _, result in answers]


def _start() -> None:
    here, there = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_serve, args=(there,), daemon=True)
    with mock.patch.dict(os.environ, _ENVIRONMENT):
        process.start()
    there.close()
    _pool.append((process, here))


def _answer(rank: int) -> tuple[bool, Any]:
    process, pipe = _pool[rank]
    try:
        if pipe.poll(_TIMEOUT):
            good, result = pickle.loads(pipe.recv_bytes())
            return good, result
    except (EOFError, ConnectionError):
        process.join(_TIMEOUT)
        return False, f"died with exit status {process.exitcode}"
    return False, f"did not end in {_TIMEOUT} s"


def _restart() -> None:
    """A rank that has failed may have left anything behind."""
    for process, pipe in _pool:
        process.kill()
        process.join()
        pipe.close()
    _pool.clear()


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            case, args, rank, world_size, store, timeout = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the tests have ended
            return
        torch.manual_seed(0)
        try:
            distributed.init_process_group(
                "gloo", init_method=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
            )
            answer = True, case(*args)
        except Exception:
            answer = False, traceback.format_exc()
        finally:
            if distributed.is_initialized():
                distributed.destroy_process_group()
        pipe.send_bytes(pickle.dumps(answer))
