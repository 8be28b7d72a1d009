"""The rules of the CUDA kernels: what they choose on paper devices, and what holds for every cut."""

from __future__ import annotations

import ctypes
import dataclasses
import re

import pytest
from cuda_source import CSRC
from hypothesis import assume, given
from hypothesis import strategies as st
from support.processes import python

from tsbn_kernels.backends.plan import DEVICES, Device, Work
from tsbn_kernels.backends.plan import cuda as rules
from tsbn_kernels.backends.plan.expect import expected
from tsbn_kernels.backends.plan.slots import MOST_SLOTS, THREADS, cut
from tsbn_kernels.backends.plan.work import Operands, Strides
from tsbn_kernels.definition.activations import ACTIVATIONS, NONE

H100, A100 = DEVICES["H100"], DEVICES["A100"]
NVIDIA = [device for device in DEVICES.values() if device.target.startswith("sm_")]
SIZES = st.sampled_from([1, 2, 3, 7, 8, 31, 33, 49, 64, 255, 1000, 4096, 70001])
WORKS = st.builds(
    Work,
    st.sampled_from([1, 3, 40]),
    SIZES,
    SIZES,
    SIZES,
    item_size=st.sampled_from([2, 4, 8]),
    family=st.sampled_from(["rows", "columns"]),
    direction=st.sampled_from(["forward", "backward"]),
    activation=st.sampled_from([NONE, *ACTIVATIONS]),
    **{field.name: st.booleans() for field in dataclasses.fields(Work) if field.type == "bool"},
)
CELEBA = {1: (64, 4096), 2: (128, 1024), 4: (256, 256), 6: (512, 64)}


@given(WORKS, st.sampled_from(NVIDIA))
def test_every_choice(work: Work, device: Device) -> None:
    assume(work.values < 1 << 32)  # runs and slabs beyond what the kernels read are errors
    assume(cut(work).slots <= MOST_SLOTS * rules.SPLITS[-1])
    plan = rules.plan(work, device)
    pieces = plan.cut
    assert plan.shared_bytes <= device.block_shared_memory
    assert plan.threads % 32 == 0 and max(32, pieces.width) <= plan.threads <= THREADS
    assert plan.parts * plan.part_slots >= pieces.slots
    assert plan.part_slots <= MOST_SLOTS and plan.part_slots % (1 << pieces.log_lanes) == 0
    assert plan.slabs == work.streams * pieces.tiles and plan.slabs * plan.parts < 1 << 31
    assert plan.programs == (min(plan.teams, plan.slabs) or plan.slabs) * plan.parts
    assert not plan.teams or plan.programs <= device.multiprocessors * plan.resident_programs
    assert plan.resident == plan.part_slots or plan.resident % 32 == 0
    assert plan.cluster == 1 or (device.clusters and plan.cluster == plan.parts)
    assert plan.resident_programs >= 1
    assert plan.launches == len(plan.phases)
    assert plan.bytes_read >= work.bytes_to_read and plan.bytes_written >= work.bytes_to_write


@given(st.integers(1, MOST_SLOTS), st.integers(0, 2**31 - 1))
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
    """bf16, batch 256: layers 2 to 7 are read once both ways, layer 1 for the most part."""
    C, S = CELEBA[layer]
    for direction in ("forward", "backward"):
        plan = rules.plan(Work(40, 256, C, S, 2, "rows", direction), H100)  # type: ignore[arg-type]
        assert plan.on_chip == 1 if layer > 1 else plan.on_chip > 0.87
        assert plan.launches == 1
        streaming = rules.plan(plan.work, H100, variant="streaming")
        assert plan.bytes_read < streaming.bytes_read and plan.seconds() < streaming.seconds()


def test_a_team_that_is_alone_waits_as_a_whole() -> None:
    """Both blocks of a multiprocessor are of one team, or one moves bytes while the other waits."""
    options = {"most_shared_bytes": 100 << 10, "most_lanes": 2}
    for teams, samples, busy in ((1, 256, 0.7), (2, 128, 1.0)):  # the same of each block
        work = Work(40, samples, 128, 1024, 2, "columns")
        plan = rules.lay_out(work, H100, "together", 264 // teams, teams=teams, **options)
        assert plan.on_chip == 1 and plan.in_step * teams == plan.resident_programs == 2
        assert busy - 0.05 < expected(plan).busy <= busy


def test_layer_1_fits_clusters_of_16() -> None:
    work = Work(40, 256, 64, 4096, 2)
    whole = rules.lay_out(work, H100, "cluster", 16, most_shared_bytes=H100.block_shared_memory)
    assert whole.resident == whole.part_slots
    assert whole.bytes_read - work.activation_bytes < 1 << 20


def test_few_channels_are_split_where_there_are_no_clusters() -> None:
    work = Work(1, 256, 8, 4096, 2)
    assert rules.plan(work, A100).launches == 2
    assert rules.plan(work, H100).cluster > 1


def test_clusters_that_the_driver_tells() -> None:
    """None are chosen that do not run, and as many are counted on as run at a time."""
    work = Work(40, 256, 64, 4096, 2)
    asked: list[rules.CudaPlan] = []

    def driver(plan: rules.CudaPlan) -> int:
        asked.append(plan)
        return rules.clusters_on_paper(plan) if plan.cluster <= most else 0

    for most in (16, 8, 4, 2, 1):
        assert rules.plan.__wrapped__(work, H100, driver).cluster <= most
    assert {plan.cluster for plan in asked} == {1, 4, 8, 16}  # two blocks would keep less than a quarter
    one = max((plan for plan in asked if plan.cluster == 16), key=lambda plan: plan.shared_bytes)
    assert rules.seconds(one, lambda _: 8) == rules.seconds(one)  # 128 multiprocessors
    assert rules.seconds(one, lambda _: 2) > 2 * rules.seconds(one)
    assert rules.seconds(one, lambda _: 0) == float("inf")
    slice_ = dataclasses.replace(H100, multiprocessors=8)
    assert rules.seconds(dataclasses.replace(one, device=slice_)) == float("inf")


@given(WORKS, st.sampled_from([device for device in NVIDIA if device.clusters]))
def test_clusters_are_worth_their_wait(work: Work, device: Device) -> None:
    """Their blocks have enough to load, and keep enough of it."""
    assume(work.values < 1 << 32)
    for plan in rules.candidates(work, device):
        if plan.cluster > 1:
            assert work.values * plan.cut.width * work.item_size >= 8192 * plan.cluster
            assert plan.on_chip >= 0.25 or not work.two_passes


def test_no_such_kernel() -> None:
    with pytest.raises(ValueError, match="A100 has no cluster kernel"):
        rules.plan(Work(1, 256, 8, 4096, 2), A100, variant="cluster")
    with pytest.raises(ValueError, match="must meet"):
        rules.lay_out(Work(1, 8, 8, 64, 4), H100, "streaming", 2)


def test_longest_runs() -> None:
    """Of a slab that is one run, slots are counted in pieces that 32 bits hold; separate runs cannot be longer."""
    pieces = cut(Work(1, 1, 1, 1 << 35, 2))
    assert pieces.divisor == MOST_SLOTS and pieces.operands.x.n == MOST_SLOTS * 8
    apart = Strides(1 << 40, 1 << 37, 1 << 36, 1)
    with pytest.raises(ValueError, match="longer than the CUDA kernels read"):
        cut(Work(1, 2, 1, 1 << 34, 2, strides=Operands(apart, None, apart)))


def test_numbers_are_those_of_the_header() -> None:
    """As many, and in the order of the C++ struct."""
    struct = re.search(r"struct Numbers \{(.*?)\n\};", (CSRC / "params.h").read_text(), re.DOTALL)
    assert struct is not None
    code = re.sub(r"//[^\n]*", "", struct[1])
    count = sum(
        len(names.split(",")) * {"Operand": 4, "Vector": 3}.get(kind, 1)
        for kind, names in re.findall(r"(int64_t|Activation|Operand|Vector) ([\w, ]+);", code)
    )
    assert len(rules.numbers(rules.plan(Work(2, 3, 4, 5, 4), H100), 9, True, (0,) * 12)) == count
    header = (CSRC / "params.h").read_text()
    assert f"kThreads = {THREADS}" in header


def test_import_needs_no_driver() -> None:
    done = python("import sys, tsbn_kernels, torch; assert not torch.cuda.is_initialized()")
    assert done.returncode == 0, done.stderr
