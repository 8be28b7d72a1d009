"""Which forward pass a layer of a backbone is part of: the one that its thread runs, or the one that is repeated.

Nothing of a call lives on a module. What runs forward is kept for each thread. What a backward pass repeats (activation
checkpointing runs parts of a backbone again, in any thread, after any number of other forward passes) is found by the
node of the graph that is being differentiated: the run that made it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from types import CodeType
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

_CHECKPOINT = "torch.utils.checkpoint"
_ENGINE: CodeType = torch.autograd.graph._engine_run_backward.__code__
_APPLY: set[CodeType] = {  # what the engine calls of an autograd.Function
    getattr(BackwardCFunction, name).__code__ for name in ("apply", "apply_boxed") if hasattr(BackwardCFunction, name)
}


class RowsError(ValueError):
    """The rows that a layer gets are neither those that all tasks share, nor those of their streams."""


class Run:
    """One pass of a backbone: ``count`` tasks (their ``indices``, None for all) with ``batch`` samples each.

    Attributes:
        owner: whose pass it is.
        shared: one input for all tasks, which the layers that it reaches fan out; else the streams stacked.
        fanned_out: a layer has done so, or what it lies in.
        parted: the numbers of rows that a module got that fanned out in the place of its layers.
        flattened: numbers of rows, other than ``batch``, that such layers got: tokens or windows of the shared input.
        first, last: sequence numbers of the nodes of its graph.
        passes: which of its streams a backward pass comes from (``participation.Passes``), where a layer is watched
            that has run.
    """

    fanned_out = False
    parted: tuple[int, ...] = ()
    flattened: tuple[int, ...] = ()
    outer: Run | None = None
    backward = first = last = -1
    passes: Any = None

    def __init__(self, owner: Any, indices: Tensor | None, count: int, batch: int, shared: bool) -> None:
        self.owner, self.indices, self.count, self.batch, self.shared = owner, indices, count, batch, shared

    def fan_out(self, rows: int) -> None:
        """Notes that the streams part where the shared input has so many rows."""
        self.fanned_out = True
        if rows != self.batch:
            self.flattened = (*self.flattened, rows)


class Router(Protocol):
    """Tells the layers of a backbone whose streams they get."""

    def route(self, layer: nn.Module, x: Tensor) -> tuple[Tensor | None, bool] | None:
        """The tasks of a call, and whether it fans out; None where nothing is known of it."""


class Graph(Protocol):
    """The graph of a run, by the nodes that its outputs come from; it lives as long as the graph."""

    run: Run
    last: Sequence[Any]


class _Running(threading.local):
    def __init__(self) -> None:
        self.run: Run | None = None


_running = _Running()
_graphs: set[ref[Graph]] = set()  # those that are alive


def innermost() -> Run | None:
    """What this thread runs, if it runs anything."""
    return _running.run


def enter(run: Run) -> None:
    """Makes ``run`` what this thread runs, until it leaves it."""
    run.outer = _running.run
    if not torch.compiler.is_compiling():
        run.backward, run.first = torch._C._current_graph_task_id(), torch._C._autograd._get_sequence_nr()
    _running.run = run


def leave(run: Run) -> None:
    """What ran before runs again."""
    _running.run = run.outer
    if not torch.compiler.is_compiling():
        run.last = torch._C._autograd._get_sequence_nr()


def remember(graph: Graph) -> None:
    """Lets the run of a graph be found by what that repeats, as long as it lives."""
    _graphs.add(ref(graph, _graphs.discard))


def current(owner: Any) -> tuple[Run | None, bool]:
    """The run of ``owner`` that a layer called now is part of, and whether that is repeated.

    Raises:
        RuntimeError: something is repeated, and nothing says of which run.
    """
    run = _running.run
    while run is not None and run.owner is not owner:
        run = run.outer
    if torch.compiler.is_compiling():
        return run, False
    backward = torch._C._current_graph_task_id()
    if backward == -1 or (run is not None and run.backward == backward):
        return run, False
    return _repeated(owner), True


def _repeated(owner: Any) -> Run | None:
    doubtful = False
    for node in executing():
        number = node._sequence_nr()
        for reference in list(_graphs):
            graph = reference()
            if graph is not None and graph.run.owner is owner and graph.run.first <= number < graph.run.last:
                if any(below is node for below in graph_below(graph.last, oldest=number)):
                    return graph.run
                doubtful = True
    if doubtful and is_repetition():
        raise RuntimeError(
            "a part of the backbone is computed again in a backward pass that comes from none of its outputs, so that "
            "nothing says which tasks it ran with; let the backbone return what the gradient comes from, or do not "
            "checkpoint that part"
        )
    return None


def executing() -> Iterator[Any]:
    """The nodes that a backward pass is executing: the innermost one, and those that started what encloses it."""
    node: Any = torch._C._current_autograd_node()
    if node is not None:
        yield node
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code in _APPLY and frame.f_locals["self"] is not node:
            yield frame.f_locals["self"]
        frame = frame.f_back


def graph_below(nodes: Sequence[Any], oldest: int = -1) -> Iterator[Any]:
    """The nodes of a graph: these, and what they pass their gradients to, apart from what is older than a number.

    What a node gets its gradient from was made after it.
    """
    waiting, seen = [*nodes], {*nodes}
    while waiting:
        node = waiting.pop()
        yield node
        for below, _ in node.next_functions:
            if below is not None and below not in seen and below._sequence_nr() >= oldest:
                seen.add(below)
                waiting.append(below)


def is_repetition() -> bool:
    """Whether activation checkpointing runs the forward pass again, in a backward pass.

    That of ``torch.utils.checkpoint`` is known, and any ``autograd.Function`` with "Checkpoint" in its name is taken
    for one. Any other forward pass inside a backward pass, a user's hook for example, counts as a new one.
    """
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return False
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code is not _ENGINE:
        if frame.f_code in _APPLY:
            if "Checkpoint" in type(frame.f_locals["self"]).__name__:
                return True
        elif frame.f_code.co_name == "unpack_hook" and frame.f_globals.get("__name__") == _CHECKPOINT:
            return True
        frame = frame.f_back
    return False
