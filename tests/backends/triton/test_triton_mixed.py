"""The Triton kernels of mixed batches: in Triton's interpreter, and as compiled for NVIDIA on the PTX machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.mixed import T
from support.problems import in_memory_format
from support.tolerances import BACKWARD, FORWARD, STATISTICS, Tolerance, assert_same_bits, assert_within
from torch import Tensor

pytest.importorskip("triton")
from support import compiled
from support.interpreter import device, interpreted, passes

from tools.ptxvm.launch import Violation
from tsbn_kernels.backends.plan import DEVICES
from tsbn_kernels.backends.plan.mixed import MixedPlan, MixedWork, plan, walks
from tsbn_kernels.backends.triton import mixed, passes_mixed
from tsbn_kernels.backends.triton import operator as find
from tsbn_kernels.backends.triton.passes_mixed import words_of
from tsbn_kernels.definition import mixed_batch_norm as reference
from tsbn_kernels.definition.options import Gradients, Needs, Normalized, Options, Saved
from tsbn_kernels.operator.mixed_ops import eager_operators

TOY = device(threads=64, multiprocessors=2)
SOME, MANY, ALL_OF_ONE = (3, 0, 5, 1), (6, 5, 24, 0), (0, 0, 9, 0)
EVERY = Needs(True, True, True, True)


def index_of(counts: tuple[int, ...]) -> Tensor:
    """The tasks of samples in a random order."""
    index = torch.repeat_interleave(torch.arange(T), torch.tensor(counts))
    return index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))]


class Call:
    """A call of the operators, and what the definition gives.

    Args:
        counts: the samples of each task.
        shape: of a sample.
    """

    def __init__(
        self,
        counts: tuple[int, ...],
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        activation: str = "none",
        memory_format: str = "contiguous",
        mean: float = 0.0,
    ) -> None:
        torch.manual_seed(1)
        self.index = index_of(counts)
        stacked = (torch.randn(len(self.index), *shape) for _ in range(3))
        x, self.residual, self.dy = (in_memory_format(t.to(dtype), "task_major", memory_format) for t in stacked)
        self.x = x + mean
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.weight, self.bias = (torch.randn(T, shape[0], dtype=wide) for _ in range(2))
        self.options = Options(T, 1e-5, "sigmoid", "task_major", activation)
        self.needs = EVERY._replace(dresidual=activation != "none")

    def permuted(self, order: Tensor) -> Call:
        """The same with its samples in another order."""
        other = Call.__new__(Call)
        rows = {name: getattr(self, name)[order] for name in ("index", "x", "residual", "dy")}
        vars(other).update(vars(self) | rows)
        return other

    def run(self, compute: Any = mixed, training: bool = True) -> tuple[Normalized, Gradients]:
        """A forward and a backward pass; in evaluation by the statistics of the batch too."""
        tensors = self.x, self.weight, self.bias, self.residual, self.dy
        x, weight, bias, residual, dy = (t.double() if compute is reference else t for t in tensors)
        found = compute.mixed_forward_training(x, self.index, weight, bias, residual, self.options)
        saved = Saved(x, weight, bias, residual, found.mean, found.var)
        if not training:
            found = found._replace(y=compute.mixed_forward_eval(saved, self.index, self.options))
        return found, compute.mixed_backward(dy, saved, self.index, training, self.needs, self.options)

    def check(self, training: bool = True) -> None:
        """Compares all results with those of the definition."""
        (y, mean, var), gradients = self.run(training=training)
        (exact, *statistics), expected = self.run(reference, training)
        dtype = self.x.dtype
        assert y.stride() == self.x.stride()
        assert_within(y, exact, FORWARD[dtype], scale=max(1.0, float(exact.abs().max()) / 4))
        for got, sought in zip((mean, var), statistics, strict=True):
            assert_within(got, sought, Tolerance(STATISTICS[dtype], 1), scale=1.0)
        for name, computed, wanted in zip(Needs._fields, gradients, expected, strict=True):
            assert (computed is None) == (wanted is None)
            if computed is None or wanted is None:
                continue
            if name in ("dweight", "dbias"):
                assert_within(computed, wanted, Tolerance(STATISTICS[dtype], 1), scale=4 * (y.numel() / 5) ** 0.5)
            else:
                assert_within(computed, wanted, BACKWARD[dtype], scale=max(1.0, float(wanted.abs().max()) / 4))


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "shape", "options"),
    [
        (SOME, (5,), {"dtype": torch.bfloat16}),
        (MANY, (37,), {"activation": "relu"}),
        (ALL_OF_ONE, (5, 3), {"activation": "silu", "dtype": torch.float64}),
        (SOME, (5, 2, 3), {"memory_format": "channels_last", "activation": "gelu"}),
        (MANY, (2, 7), {"dtype": torch.float16, "mean": 100.0}),
    ],
)
def test_equals_the_definition(counts: tuple[int, ...], shape: tuple[int, ...], options: dict[str, Any]) -> None:
    with interpreted(TOY, overflow=True):
        call = Call(counts, shape, **options)
        call.check()
        call.check(training=False)
        assert len(passes()) == 4


def test_no_order_of_the_samples_changes_a_bit() -> None:
    """Some samples of a task are equal in x, and differ in dy or the residual alone."""
    for call in (Call(MANY, (5,)), Call(MANY, (3, 2), torch.bfloat16, "silu")):
        call.x[::2] = call.x[0]
        order = torch.randperm(len(call.index))
        with interpreted(TOY):
            here, there = call.run(), call.permuted(order).run()
        for one, other in zip((*here[0], *here[1]), (*there[0], *there[1]), strict=True):
            if one is not None and other is not None:
                assert_same_bits(one[order] if one.shape == call.x.shape else one, other)


def test_gradients_that_are_not_needed() -> None:
    call = Call(SOME, (5,), activation="relu")
    for training, needs in ((True, (False, False, True, False)), (False, (True, False, False, True))):
        call.needs = Needs(*needs)
        with interpreted(TOY):
            call.check(training)


def test_what_is_not_dense_is_read_where_it_lies() -> None:
    call = Call(SOME, (5, 3))
    assert words_of(call.x, columns=False).shape == (9, 1, 15)
    memory = torch.full((9, 3, 7), torch.nan)
    memory[:, :, 1:6] = call.x.transpose(1, 2)
    call.x = memory[:, :, 1:6].transpose(1, 2)
    words = words_of(call.x, columns=True)
    assert (words.shape, words.data_ptr()) == ((9, 3, 5), call.x.data_ptr())
    with interpreted(TOY):
        found, _ = call.run()
    exact, _ = call.run(reference)
    assert_within(found.y, exact.y, FORWARD[torch.float32])


def test_words_are_as_wide_as_samples_are_aligned() -> None:
    for values, offset, wide in ((8, 0, torch.int64), (6, 0, torch.int32), (8, 2, torch.int32), (7, 0, torch.int16)):
        x = torch.randn(5 * values + offset).to(torch.bfloat16)[offset:].view(5, values)
        assert words_of(x, columns=True).dtype == wide
        assert words_of(x, columns=True).data_ptr() == x.data_ptr()


# ---- plans -----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=9).filter(any),
    st.integers(1, 200),
    st.sampled_from([(2, "columns", 64), (4, "columns", 32), (4, "rows", 32), (8, "rows", 16)]),
    st.data(),
)
def test_there_are_programs_for_every_mix(
    counts: list[int], channels: int, kind: tuple[int, Any, int], data: st.DataObject
) -> None:
    size, family, most = kind
    positions = data.draw(st.integers(1, most))
    made = plan(MixedWork(len(counts), sum(counts), channels, positions, size, family), DEVICES["H100"])
    assert made.block >= 1
    assert made.blocks >= sum(-(-samples // made.block) for samples in counts)
    index = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    keys = torch.randint(-9, 9, (len(index),))
    mix = passes_mixed.mix_of(index.flip(0), len(counts), keys, made)
    assert mix.task.shape == (made.blocks,)
    assert mix.order.sort().values.tolist() == list(range(len(index)))
    assert torch.equal(index.flip(0)[mix.order], index)
    for task, blocks in enumerate(-(-samples // made.block) for samples in counts):
        assert (mix.task == task).nonzero().flatten().tolist() == [int(mix.block[task]) + i for i in range(blocks)]
        own = mix.order[mix.sample[task] : mix.sample[task + 1]]
        assert keys[own].diff().ge(0).all()


def test_short_samples_have_kernels_of_their_own() -> None:
    sizes: tuple[tuple[tuple[int, ...], bool], ...] = (
        ((5, 3), True),
        ((5, 3, 8, 8), False),
        ((5, 3, 4, 8), True),
        ((0, 3), False),
    )
    for sample, short in sizes:
        assert walks(torch.empty(sample)) == short
    assert find("mixed_backward") is mixed.mixed_backward
    chosen = eager_operators("triton")
    with interpreted(TOY), mock.patch.object(mixed, "MixedForward", side_effect=AssertionError("walked")):
        call = Call(SOME, (5,))
        with pytest.raises(AssertionError, match="walked"):
            call.run(chosen)
        call = Call(SOME, (2, 6, 6))
        y = call.run(chosen)[0].y
        assert_within(y, call.run(reference)[0].y, FORWARD[torch.float32])


# ---- the compiled code -----------------------------------------------------------------------------------------------


def run_compiled(call: Call, gpu: str, schedule: str | int) -> None:
    """Checks results and traffic of a call on a GPU whose programs have few threads.

    Activations move as planned; vectors, keys and sums at most so much, whatever the mix.
    """
    with compiled.machine(replace(DEVICES[gpu], multiprocessors=2, block_threads=256), schedule) as done:
        call.check()
    reports = iter(done.reports)
    for one in done.plans:
        assert isinstance(one, MixedPlan)
        made = [next(reports) for _ in range(one.launches)]
        for what, claimed in (("load", one.activation_bytes_read), ("store", one.activation_bytes_written)):
            assert sum(compiled.moved(r, what, True).bytes for r in made) == claimed
        assert sum(compiled.moved(r, "store", False).bytes for r in made) <= one.vector_bytes_written
        sectors = sum(compiled.moved(r, "load", False).sectors for r in made)  # each warp reads them, one or more
        assert sectors <= one.vector_bytes_read // one.work.parameter_size * one.warps
    assert next(reports, None) is None


@pytest.mark.parametrize(
    ("gpu", "schedule", "counts", "shape", "options"),
    [
        ("H100", "reversed", (9, 0, 40, 1), (72,), {"dtype": torch.bfloat16}),
        ("A100", 3, (3, 0, 20, 1), (5, 7), {"activation": "relu"}),
        ("B200", "forward", (0, 0, 11, 0), (19, 3), {"memory_format": "channels_last", "activation": "silu"}),
    ],
)
def test_compiled(gpu: str, schedule: str | int, counts: tuple[int, ...], shape: tuple[int, ...], options: Any) -> None:
    run_compiled(Call(counts, shape, **options), gpu, schedule)


def test_the_same_bits_whatever_runs_first() -> None:
    call = Call((9, 0, 40, 1), (40,), activation="relu")
    results = []
    for schedule in ("forward", "reversed", 5):
        with compiled.machine(replace(DEVICES["H100"], multiprocessors=2, block_threads=256), schedule):
            found, gradients = call.run()
        results.append((*found, *gradients))
    for one, *others in zip(*results, strict=True):
        for other in others:
            assert one is not None
            assert other is not None
            assert_same_bits(one, other)


MUTANTS = {
    "a sample too many": ("(n < slab.N) & (s < slab.S)", "(n <= slab.N) & (s < slab.S)", "race|write count"),
    "blocks leave all in one place": ("row_of(first + block.number,", "row_of(first,", "race|write count|unwritten"),
    "a task begins where the first one does": ("tl.load(mix.sample + t) + before", "before", "race|write count"),
    "keys leave out the last words": ("inside = (n < N) & (i < inner)", "inside = (n < N) & (i < inner - 1)", "assert"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, broken, message = MUTANTS[name]
    compiled.break_kernel("mixed", text, broken, tmp_path, monkeypatch)
    call = Call((9, 0, 40, 1), (40,))
    with pytest.raises((Violation, AssertionError), match=message):
        run_compiled(call, "H100", "forward")
