"""Plans of layer normalisation: what they must hold for any work, on paper devices."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsbn_kernels.backends.plan import DEVICES, Device, layer_norm_cuda
from tsbn_kernels.backends.plan.layer_norm import LEAST, MOST, LayerPlan, LayerWork, plans

H100 = DEVICES["H100"]
SIZES = st.sampled_from([1, 2, 3, 7, 64, 100, 384, 1000, 4096])
WORKS = st.builds(
    LayerWork,
    tasks=st.sampled_from([1, 2, 5, 40]),
    samples=SIZES,
    channels=st.sampled_from([1, 2, 3, 64, 197, 384, 768, 2048, 5000, 8192, 8193, 16384]),
    positions=SIZES,
    item_size=st.sampled_from([2, 4]),
    family=st.just("columns"),
    direction=st.sampled_from(["forward", "backward"]),
    bias=st.booleans(),
    needs_dx=st.booleans(),
    needs_dweight=st.booleans(),
    needs_dbias=st.booleans(),
    residual=st.booleans(),
    fan_out=st.booleans(),
    rms=st.booleans(),
).filter(lambda work: not work.backward or work.needs_dx or work.parameters)


def check(p: LayerPlan) -> None:
    """What holds for every plan."""
    work, (a, b) = p.work, p.tile
    for power in (a, b, p.warps):
        assert power & (power - 1) == 0
    assert b >= work.channels or not work.needs_dx
    assert 1 <= p.warps * p.device.warp <= p.device.block_threads // 2
    assert a * b <= 64 * p.threads
    assert (p.splits - 1) * p.share < p.tiles <= p.splits * p.share  # no split without a tile
    assert (p.tiles - 1) * a < work.values <= p.tiles * a
    assert p.slabs == work.streams * -(-work.channels // b)
    assert p.shared_bytes <= p.device.block_shared_memory
    assert p.launches == 1 + (p.splits > 1 and work.parameters > 0)
    if work.parameters and p.splits > 1:
        assert p.share * a >= LEAST
    assert p.activation_bytes_read == work.bytes_to_read
    assert p.activation_bytes_written == work.bytes_to_write
    assert p.seconds() > (p.bytes_read + p.bytes_written) / p.device.bandwidth


@given(WORKS, st.sampled_from(list(DEVICES.values())))
def test_every_plan(work: LayerWork, device: Device) -> None:
    chosen = plans(work, device)
    assert chosen == plans(work, device)
    for one in chosen:
        check(one)
    assert [one.work.needs_dx for one in chosen] in ([work.needs_dx], [True, False])
    assert sum(one.work.parameters for one in chosen) == work.parameters


def check_cuda(p: layer_norm_cuda.CudaLayerPlan) -> None:
    """What holds for every plan of the CUDA C++ kernels."""
    work = p.work
    assert p.lanes & (p.lanes - 1) == 0 and p.lanes <= layer_norm_cuda.MOST_LANES
    assert p.threads % 32 == 0 and p.threads % p.lanes == 0 and p.threads <= layer_norm_cuda.MOST_LANES
    assert p.steps * p.vector * work.statistics_size <= layer_norm_cuda.HELD  # what a thread holds of a row
    assert p.pieces == 1 or not work.needs_dx
    assert (p.pieces - 1) * p.piece * p.vector < work.channels <= p.pieces * p.piece * p.vector
    assert (p.splits - 1) * p.share < p.tiles <= p.splits * p.share
    assert 1 <= p.staged <= max(1, work.tasks)
    assert p.shared_bytes <= p.device.block_shared_memory
    assert p.activation_bytes_written == work.bytes_to_write


NVIDIA = [device for device in DEVICES.values() if device.target.startswith("sm_")]


@given(WORKS, st.sampled_from(NVIDIA), st.booleans())
def test_every_plan_of_the_cuda_kernels(work: LayerWork, device: Device, aligned: bool) -> None:
    try:
        chosen = layer_norm_cuda.plans(work, device, aligned)
    except ValueError:  # the gates and biases of the longest rows, where shared memory is small
        if device.block_shared_memory < 100 << 10 and work.channels > 8192:
            return
        raise
    for one in chosen:
        check_cuda(one)
    assert sum(one.work.parameters for one in chosen) == work.parameters
    assert [one.work.needs_dx for one in chosen] in ([work.needs_dx], [True, False])


@pytest.mark.parametrize("size", [1, 2, 24, 384, 768, 4096, 8192, 12288, 16384])
def test_the_cuda_kernels_read_each_activation_once(size: int) -> None:
    """One read and one write forward, two and one backward, in one pass for rows of any length that fits."""
    for item_size in (2, 4):
        work = LayerWork(5, 1, size, 8192, item_size, "columns", needs_dbias=True)
        for one, reads in ((work, 1), (replace(work, direction="backward"), 2)):
            (plan,) = layer_norm_cuda.plans(one, H100)
            assert plan.activation_bytes_read == reads * work.activation_bytes
            assert plan.activation_bytes_written == work.activation_bytes
            if size >= 384:
                rest = plan.bytes_read + plan.bytes_written - (reads + 1) * work.activation_bytes
                assert rest <= 0.05 * plan.bytes_read


def test_the_cuda_kernels_read_the_gradients_of_a_fan_out_once() -> None:
    """Where shared memory has room for the sums of all tasks: T + 2 passes over the input instead of 3 T + 2."""
    work = LayerWork(5, 1, 384, 8192, 2, "columns", "backward", fan_out=True)
    (plan,) = layer_norm_cuda.plans(work, H100)
    assert plan.activation_bytes_read + plan.activation_bytes_written == 7 * work.input_bytes
    assert len(layer_norm_cuda.plans(replace(work, tasks=40), H100)) == 2


@pytest.mark.parametrize(
    ("work", "name"),
    [(LayerWork(5, 1, 384, 8192, 2, "columns"), "ViT-S/16"), (LayerWork(8, 1, 768, 8192, 2, "columns"), "BERT")],
)
def test_bytes_of_transformers(work: LayerWork, name: str) -> None:
    """Reads and writes of the activation: 1 + 1 forward, 2 + 1 backward, with an addition 2 + 2 and 3 + 1."""
    size = work.activation_bytes
    for residual in (False, True):
        moved = []
        for direction in ("forward", "backward"):
            (plan,) = plans(replace(work, direction=direction, residual=residual), H100)
            moved += [plan.activation_bytes_read / size, plan.activation_bytes_written / size]
            assert plan.programs >= H100.multiprocessors
            assert plan.bytes_read + plan.bytes_written <= 1.04 * work_bytes(plan), name
        assert moved == ([2, 2, 3, 1] if residual else [1, 1, 2, 1])


def work_bytes(plan: LayerPlan) -> int:
    return plan.work.useful_bytes + plan.work.row_bytes


def test_one_input_for_all_tasks_is_read_once() -> None:
    work = LayerWork(5, 1, 384, 8192, 2, "columns", fan_out=True, residual=True)
    one, all_tasks = work.input_bytes, work.activation_bytes
    (forward,) = plans(work, H100)
    assert (forward.activation_bytes_read, forward.activation_bytes_written) == (2 * one, all_tasks + one)
    dx, parameters = plans(replace(work, direction="backward"), H100)
    assert (dx.activation_bytes_read, dx.activation_bytes_written) == (all_tasks + 2 * one, one)
    assert (parameters.activation_bytes_read, parameters.activation_bytes_written) == (2 * all_tasks, 0)


def test_long_rows() -> None:
    """Up to 8,192 values one launch reads each activation once; up to 16,384 the parameters' gradients are apart."""
    for size, launches in ((MOST // 2, 1), (MOST // 2 + 1, 2), (MOST, 2)):
        work = LayerWork(2, 1, size, 4096, 2, "columns", "backward")
        assert len(plans(work, H100)) == launches
        assert len(plans(replace(work, direction="forward"), H100)) == 1
        assert len(plans(replace(work, needs_dweight=False), H100)) == 1
    for work in (LayerWork(2, 1, MOST + 1, 1, 2, "columns"), LayerWork(2, 1, MOST // 2 + 1, 1, 8, "columns")):
        with pytest.raises(ValueError, match="longer than the Triton kernels hold"):
            plans(work, H100)
    (sums,) = plans(LayerWork(2, 1, 10**6, 7, 4, "columns", "backward", needs_dx=False), H100)
    assert sums.slabs == 2 * 3907
