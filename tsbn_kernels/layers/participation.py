"""Which tasks take part in a backward pass: a gradient of zero does not tell, for a task that ran may have one too.

A layer that is watched passes its weight through an identity with a second input, a vector of T zeros whose gradient is
one for each task that the pass comes from. So autograd itself reports it, wherever the pass runs: of several calls, in
several threads, behind checkpoints, and inside of compiled graphs.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from tsbn_kernels.layers import concurrent
from tsbn_kernels.operator import mixed_checks, runs


class Participation:
    """The rows of a layer's parameters that took part since their gradient was last None or zero.

    Within a backward pass autograd may report the rows first or the gradient first: only when both are known does it
    count, for the gradient tells whether what went before is still in it.

    Args:
        parameter: one that the layer trains; its gradient stands for those of all.
        rows: how many there are.
    """

    def __init__(self, parameter: Tensor, rows: int) -> None:
        self.leaf = torch.zeros(rows, device=parameter.device, requires_grad=True)
        self.rows: Tensor | None = None  # a bool for each; None: no pass has said anything of what is in the gradient
        self._reported: dict[int, Tensor] = {}  # by passes whose gradient has not come yet
        self._passes: set[int] = set()  # whose gradient has come
        self._version = -1  # of the gradient when a pass last added to it
        self._lock = Lock()
        # Hooks have no reference to what has hooks: Python's collector does not see autograd's, and would not free it.
        self.leaf.register_hook(self._take)  # its own grad is of no use, and not safe to take while threads add to it
        parameter.register_hook(partial(self._receive, weakref.ref(parameter)))
        parameter.register_post_accumulate_grad_hook(self._note)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of a layer belongs to no optimiser."""
        return type(None), ()

    def take_part(self, weight: Tensor, tasks: Tensor | None, own_streams: bool) -> tuple[Tensor, Passes | None]:
        """Gives the weight ``[K, C]`` of a call, whose backward pass reports that its rows took part.

        Args:
            weight: the rows of ``tasks``.
            tasks: the K rows of T; None stands for all.
            own_streams: whether the call returns its streams as tensors of their own.

        Returns:
            The weight, and what tells which of the streams take part: those of the call, or of the model that runs the
            layer. It is None where nothing does, and all take part: a compiled graph has one backward pass of all.
        """
        run, passes = runs.innermost(), None
        if not torch.compiler.is_compiling() and (run is not None or own_streams):
            passes = Passes() if run is None or run.passes is None else run.passes
            if run is not None:
                run.passes = passes
        leaf = self.leaf.to(weight.device)
        reporting: Tensor = _TakePart.apply(weight, leaf if tasks is None else concurrent.rows(leaf, tasks), passes)
        return reporting, passes

    def take_part_of(self, weight: Tensor, task_of_sample: Tensor, x: Tensor) -> Tensor:
        """Gives the weight ``[T, *]`` of a mixed batch x, whose backward pass reports the tasks that have a sample."""
        present = mixed_checks.samples_of(task_of_sample, x, len(weight)) > 0
        leaf = self.leaf.to(weight.device)
        reporting: Tensor = _TakePart.apply(weight, concurrent.product(leaf, present), None)
        return reporting

    def _take(self, gradient: Tensor) -> None:
        rows = gradient != 0
        this = torch._C._current_graph_task_id()
        with self._lock:
            if this in self._passes:
                self._add(rows)
            else:
                self._reported[this] = rows

    def _add(self, rows: Tensor) -> None:
        self.rows = rows if self.rows is None else self.rows | rows

    def _receive(self, reference: weakref.ref[Tensor], _: Tensor) -> None:
        """A gradient is about to be added to that of the parameter."""
        parameter = reference()
        before = None if parameter is None or parameter.grad is None else local(parameter.grad)
        this = torch._C._current_graph_task_id()
        with self._lock:
            if before is None:
                self.rows = None
                self._passes.clear()
            elif self.rows is not None and before._version != self._version:  # it may have been zeroed
                self.rows = self.rows & before.any().to(self.rows.device)
            self._passes.add(this)
            if this in self._reported:
                self._add(self._reported.pop(this))

    def _note(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._version = local(parameter.grad)._version


def local(tensor: Any) -> Tensor:
    """What this process has of a DTensor; all of a plain one."""
    own: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own


class Passes:
    """Which of the streams of a call the last backward pass came from; of a model's, where it runs several layers."""

    def __init__(self) -> None:
        self._last: dict[int, int] = {}

    def watch(self, index: int, tensors: Iterable[Tensor]) -> None:
        """Notes each backward pass that comes from the tensors of a stream."""
        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(partial(self._note, index))

    def _note(self, index: int, gradient: Tensor | None) -> None:
        if gradient is not None:
            self._last[index] = torch._C._current_graph_task_id()

    def rows(self, like: Tensor) -> Tensor:
        """One for each stream that the pass comes from that runs now, zero for the others."""
        this = torch._C._current_graph_task_id()
        return like.new_tensor([float(self._last.get(index) == this) for index in range(len(like))])


class _TakePart(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, leaf: Tensor, passes: Passes | None) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, ctx.passes = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        ones = gradient.new_ones(gradient.shape[0])
        return gradient, ones if ctx.passes is None else ctx.passes.rows(ones), None
