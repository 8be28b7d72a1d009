"""The rules of the CUDA kernels: what they choose on paper devices, and what holds for every cut."""

from __future__ import annotations

import ctypes
import dataclasses
import re

import pytest
from cuda_machine import CSRC
from hypothesis import assume, given
from hypothesis import strategies as st
from support import python

from tsbn_kernels.activations import ACTIVATIONS, NONE
from tsbn_kernels.plan import DEVICES, Device, Work
from tsbn_kernels.plan import cuda as rules

H100, A100 = DEVICES["H100"], DEVICES["A100"]
NVIDIA = [device for device in DEVICES.values() if device.target.startswith("sm_")]
SIZES = st.sampled_from([1, 2, 3, 7, 8, 31, 33, 49, 64, 255, 1000, 4096, 70001])
WORKS = st.builds(
    Work, st.sampled_from([1, 3, 40]), SIZES, SIZES, SIZES, st.sampled_from([2, 4, 8]),
    st.sampled_from(["rows", "columns"]), st.sampled_from(["forward", "backward"]), st.booleans(), st.booleans(),
    st.booleans(), st.booleans(), st.booleans(), activation=st.sampled_from([NONE, *ACTIVATIONS]),
    residual=st.booleans(), needs_dresidual=st.booleans(), fan_out=st.booleans(),
)  # fmt: skip
CELEBA = {1: (64, 4096), 2: (128, 1024), 4: (256, 256), 6: (512, 64)}


@given(WORKS, st.sampled_from(NVIDIA))
def test_every_choice(work: Work, device: Device) -> None:
    problem = rules.dense(work)
    assume(work.values < 1 << 32)  # runs and slabs beyond what the kernels read are errors
    assume(rules.cut(problem).slots <= rules.MOST_SLOTS * rules.SPLITS[-1])
    pieces, launch = rules.cut(problem), rules.choose(problem, device)
    assert launch.shared <= device.block_shared_memory
    assert launch.threads % 32 == 0 and max(32, pieces.width) <= launch.threads <= rules.THREADS
    assert launch.parts * launch.part_slots >= pieces.slots
    assert launch.part_slots <= rules.MOST_SLOTS and launch.part_slots % (1 << pieces.log_lanes) == 0
    assert launch.blocks == work.tasks // problem.slab_tasks * pieces.tiles * launch.parts < 1 << 31
    assert launch.resident == launch.part_slots or launch.resident % launch.threads == 0
    assert launch.cluster == 1 or (device.clusters and launch.cluster == launch.parts)
    assert rules.resident_blocks(problem, launch, device) >= 1
    least = work.bytes_to_read
    assert launch.bytes_read >= least
    plan = rules.as_plan(problem, launch, work, device)
    assert (plan.programs, plan.shared, plan.launches) == (launch.blocks, launch.shared, launch.launches)


@given(st.integers(1, rules.MOST_SLOTS), st.integers(0, 2**31 - 1))
def test_division_by_multiplication(divisor: int, number: int) -> None:
    """What Walk::find computes in 32 bits is the quotient, for every divisor that a cut may have."""
    shift = (divisor - 1).bit_length()
    multiplier = ((1 << 32) * ((1 << shift) - divisor)) // divisor + 1
    assert multiplier < 1 << 32
    high = number * multiplier >> 32
    assert ctypes.c_uint32(high + number).value == high + number
    assert (high + number) >> shift == number // divisor


@pytest.mark.parametrize("layer", CELEBA)
def test_celeba_layers_on_an_h100(layer: int) -> None:
    """bf16, batch 256: layers 2 to 7 are read once both ways, layer 1 for the most part (two blocks overlap)."""
    C, S = CELEBA[layer]
    for direction, least in (("forward", 0.87), ("backward", 0.43)):
        plan = rules.plan(Work(40, 256, C, S, 2, "rows", direction), H100)  # type: ignore[arg-type]
        assert plan.on_chip == 1 if layer > 1 else plan.on_chip > least
        assert plan.launches == 1 and (plan.resident_programs >= 2)
        streaming = rules.plan(plan.work, H100, "streaming")
        assert plan.bytes_read < streaming.bytes_read and plan.seconds() < streaming.seconds()


def test_layer_1_fits_clusters_of_16() -> None:
    problem = rules.dense(Work(40, 256, 64, 4096, 2))
    whole = rules.lay_out(problem, "cluster", 16, shared_limit=H100.block_shared_memory)
    assert whole.resident == whole.part_slots
    assert whole.bytes_read - problem.T * problem.N * problem.C * problem.S * 2 < 1 << 20


def test_few_channels_are_split_where_there_are_no_clusters() -> None:
    work = Work(1, 256, 8, 4096, 2)
    assert rules.choose(rules.dense(work), A100).launches == 2
    assert rules.choose(rules.dense(work), H100).cluster > 1


def test_clusters_that_the_driver_tells() -> None:
    """None are chosen that do not run, and as many are counted on as run at a time."""
    problem = rules.dense(Work(40, 256, 64, 4096, 2))
    asked: list[rules.Launch] = []

    def driver(problem: rules.Problem, launch: rules.Launch, device: Device) -> int:
        asked.append(launch)
        return rules.clusters_on_paper(problem, launch, device) if launch.cluster <= most else 0

    for most in (16, 8, 4, 2, 1):
        assert rules.choose.__wrapped__(problem, H100, driver).cluster <= most
    assert {launch.cluster for launch in asked} == {1, 2, 4, 8, 16}
    one = max((launch for launch in asked if launch.cluster == 16), key=lambda launch: launch.shared)
    assert rules.seconds(problem, one, H100, lambda *_: 8) == rules.seconds(problem, one, H100)  # 128 multiprocessors
    assert rules.seconds(problem, one, H100, lambda *_: 2) > 2 * rules.seconds(problem, one, H100)
    assert rules.seconds(problem, one, H100, lambda *_: 0) == float("inf")
    slice_ = dataclasses.replace(H100, multiprocessors=8)
    assert rules.seconds(problem, one, slice_) == float("inf")


def test_no_such_kernel() -> None:
    with pytest.raises(ValueError, match="A100 has no cluster kernel"):
        rules.plan(Work(1, 256, 8, 4096, 2), A100, "cluster")
    with pytest.raises(ValueError, match="must meet"):
        rules.lay_out(rules.dense(Work(1, 8, 8, 64, 4)), "streaming", 2)


def test_longest_runs() -> None:
    """Of a slab that is one run, slots are counted in pieces that 32 bits hold; separate runs cannot be longer."""
    pieces = rules.cut(rules.dense(Work(1, 1, 1, 1 << 35, 2)))
    assert pieces.divisor == rules.MOST_SLOTS and pieces.x.n == rules.MOST_SLOTS * 8
    apart = rules.Strides(1 << 40, 1 << 37, 1 << 36, 1)
    with pytest.raises(ValueError, match="longer than the CUDA kernels read"):
        rules.cut(rules.Problem("bfloat16", 1, 2, 1, 1 << 34, apart, apart))


def test_numbers_are_those_of_the_header() -> None:
    """As many, and in the order of the C++ struct."""
    struct = re.search(r"struct Numbers \{(.*?)\n\};", (CSRC / "params.h").read_text(), re.DOTALL)
    assert struct is not None
    code = re.sub(r"//[^\n]*", "", struct[1])
    count = sum(
        len(names.split(",")) * {"Operand": 4, "Vector": 3}.get(kind, 1)
        for kind, names in re.findall(r"(int64_t|Activation|Operand|Vector) ([\w, ]+);", code)
    )
    problem = rules.dense(Work(2, 3, 4, 5, 4))
    assert len(rules.numbers(problem, rules.choose(problem, H100), 9, True, (0,) * 12)) == count
    header = (CSRC / "params.h").read_text()
    assert f"kThreads = {rules.THREADS}" in header


def test_import_needs_no_driver() -> None:
    done = python("import sys, tsbn_kernels, torch; assert not torch.cuda.is_initialized()")
    assert done.returncode == 0, done.stderr
