"""Plans are pure functions of the work and the device: what they must hold, on paper devices."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.processes import python

from tsbn_kernels import __main__ as command
from tsbn_kernels.backends.plan import DEVICES, Device, Plan, Work, cuda, devices, triton
from tsbn_kernels.backends.plan.expect import expected, reasons
from tsbn_kernels.backends.plan.triton import alternatives, is_even, plan
from tsbn_kernels.definition.activations import ACTIVATIONS, INVERSE

H100 = DEVICES["H100"]
SIZES = st.sampled_from([1, 2, 3, 7, 8, 31, 32, 33, 49, 64, 255, 256, 257, 1000, 4096, 12345])
WORKS = st.builds(
    Work,
    tasks=st.sampled_from([1, 2, 3, 40, 128]),
    samples=SIZES,
    channels=SIZES,
    positions=SIZES,
    item_size=st.sampled_from([2, 4, 8]),
    family=st.sampled_from(["rows", "columns"]),
    direction=st.sampled_from(["forward", "backward"]),
    training=st.booleans(),
    bias=st.booleans(),
    needs_dx=st.booleans(),
    needs_dweight=st.just(True),
    needs_dbias=st.booleans(),
    activation=st.sampled_from(["none", *ACTIVATIONS]),
    residual=st.booleans(),
    needs_dresidual=st.booleans(),
    fan_out=st.booleans(),
)

# The CelebA network, samples 256 (channels, positions): layers 1, 2-3, 4-5, 6-7 and 8-9.
CELEBA = {1: (64, 4096), 2: (128, 1024), 4: (256, 256), 6: (512, 64), 8: (512, 1)}


def celeba(layer: int, **details: object) -> Work:
    channels, positions = CELEBA[layer]
    family = "columns" if positions == 1 else "rows"
    return Work(40, 256, channels, positions, 2, family, **details)  # type: ignore[arg-type]


def check(p: Plan) -> None:
    """What holds for every plan."""
    work, (a, b) = p.work, p.tile
    assert a & (a - 1) == 0
    assert b & (b - 1) == 0
    if work.family == "rows":
        assert p.slabs == work.streams * work.channels
        assert p.tiles == -(-work.samples // a) * -(-work.positions // b)
    else:
        assert p.slabs == work.streams * -(-work.channels // b)
        assert p.tiles == -(-work.values // a)
    elements = work.tasks * work.channels * work.values
    assert is_even(work, p.tile) == (p.tiles * p.slabs * a * b * work.tasks == elements * work.streams)
    assert (p.splits - 1) * p.share < p.tiles <= p.splits * p.share  # no split without a tile
    assert 1 <= p.warps <= 32
    assert p.warps & (p.warps - 1) == 0
    assert p.registers <= 255
    assert p.shared_bytes <= p.device.block_shared_memory
    assert p.resident_programs * p.warps * p.device.warp <= p.device.threads
    gathers = work.gathers and work.training and work.needs_dx
    assert p.launches == (1 if p.variant != "split" else 3 if gathers else 2)
    assert (work.gathers and p.variant != "resident") <= (p.splits == p.tiles)
    assert (p.variant == "elementwise") == (not work.reduces)
    assert (p.variant in ("resident", "cluster")) <= (p.tiles == 1)
    assert (p.cluster > 1) == (p.variant == "cluster")
    if p.variant == "cluster":
        assert p.cluster in p.device.clusters and p.threads >= 128
        assert p.threads * p.registers <= p.device.registers  # one block at least
        assert (work.family, work.two_passes, work.fan_out) == ("rows", True, False)
        assert a * b <= 32 * p.threads * p.cluster
    assert p.bytes_read + p.bytes_written >= work.useful_bytes
    to_sum = 2 * work.activation_bytes if work.backward and work.keeps_gradient else work.bytes_to_sum
    again = p.activation_bytes_read - work.bytes_to_read
    assert again == 0 or again == (
        work.input_bytes * (1 + work.statistics_size / work.item_size) if work.gathers else to_sum
    )
    assert p.seconds() > (p.bytes_read + p.bytes_written) / p.device.bandwidth


@given(WORKS, st.sampled_from(list(DEVICES.values())))
def test_every_plan(work: Work, device: Device) -> None:
    chosen = plan(work, device)
    check(chosen)
    assert chosen == plan(work, device)
    others = alternatives(chosen)
    assert others[0] == chosen
    for other in others:
        check(other)
        assert other.variant == chosen.variant


@pytest.mark.parametrize("layer", CELEBA)
def test_celeba_in_bfloat16_on_h100(layer: int) -> None:
    """Layers 6 to 9 are read once, by clusters also 2 to 5, others twice forward; all in one launch."""
    forward, backward = (plan(celeba(layer, direction=d), H100) for d in ("forward", "backward"))
    assert forward.launches == backward.launches == 1
    activation = forward.work.activation_bytes
    apart = ("cluster", 1) if layer > 1 and triton.compiles_clusters() else ("streaming", 2)
    expected = ("resident", 1) if layer >= 6 else apart
    for p, tensors in ((forward, 1), (backward, 2)):
        assert (p.variant, p.activation_bytes_read / activation) == (expected[0], expected[1] * tensors)
        assert p.activation_bytes_written == activation
        assert p.programs >= p.device.multiprocessors


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("family", ["rows", "columns"])
def test_few_slabs_are_split(family: str, device: Device) -> None:
    p = plan(Work(1, 256, 16, 4096, 2, family), device)  # type: ignore[arg-type]
    assert (p.variant, p.launches) == ("split", 2)
    assert p.programs >= device.multiprocessors // 5  # one block of 16 channels has at most 64 splits


def test_tiles_waste_little() -> None:
    """Sizes of the SegNet and ResNet-50 layers that are no powers of two: 27 * 2^k and so on."""
    for samples, positions in ((4, 288 * 384), (4, 144 * 192), (4, 72 * 96), (16, 64 * 128)):
        p = plan(Work(3, samples, 64, positions, 4), H100)
        assert p.tiles * p.tile[0] * p.tile[1] <= 1.2 * p.work.values, (samples, positions, p.tile)


def test_threads_that_hold_the_most_have_room_for_masks() -> None:
    """Columns of 32,768 values: enough registers for bfloat16 without masks, not for them or float32's addresses."""
    variants = {
        (size, positions): plan(Work(40, 4, 128, positions, size, "columns"), H100).variant == "resident"
        for size in (2, 4)
        for positions in (512, 500)
    }
    assert variants == {(2, 512): True, (2, 500): False, (4, 512): False, (4, 500): False}


def test_narrow_rows_are_held_by_half_the_threads() -> None:
    """Rows of no multiple of 16 values take more registers a value, so half of a block's threads hold a slab."""
    plans = {positions: plan(Work(40, 200, 64, positions, 4), H100, clusters=False) for positions in (96, 100)}
    assert {s: (p.variant, p.tile[0] * p.tile[1]) for s, p in plans.items()} == {
        96: ("resident", 32 * 1024),
        100: ("streaming", 4 * 1024),
    }
    few = {positions: plan(Work(40, 50, 64, positions, 4), H100) for positions in (96, 100)}
    assert {s: (p.variant, p.tile, p.warps) for s, p in few.items()} == {
        96: ("resident", (64, 128), 8),
        100: ("resident", (64, 128), 8),
    }
    back = plan(Work(40, 100, 64, 100, 2, direction="backward"), H100)
    assert (back.variant, back.tile, back.warps, back.registers) == ("resident", (128, 128), 16, 128)


def test_bytes_with_vectors_and_partials() -> None:
    """A split forward counted by hand: x twice, the parameters by each split, and four partial values a split.

    The first split's mean is read twice: all others are merged relative to it.
    """
    p = plan(Work(2, 64, 4, 4096, 4, bias=True), DEVICES["A100"])
    assert p.variant == "split"
    assert p.splits > 1
    vector = 2 * 4 * 4
    assert p.bytes_read == 2 * p.work.activation_bytes + p.splits * (3 * vector + 4 * p.splits * vector)
    assert p.bytes_written == p.work.activation_bytes + 2 * vector + 4 * p.splits * vector


@pytest.mark.parametrize("rules", [triton.plan, cuda.plan])
@pytest.mark.parametrize(("activation", "reads"), [("none", False), ("relu", True), (INVERSE, False)])
def test_a_frozen_bias_is_read_where_z_is_computed_again(activation: str, reads: bool, rules: Any) -> None:
    """Whether a gradient of it is asked for is another question, and changes what is written alone."""
    without = Work(3, 4, 8, 49, 4, direction="backward", activation=activation)
    frozen, learned = (dataclasses.replace(without, bias=True, needs_dbias=needed) for needed in (False, True))
    moved = [rules(work, H100) for work in (without, frozen, learned)]
    vector = 3 * 8 * 4
    assert [p.bytes_read - moved[0].bytes_read for p in moved] == [0, reads * vector, reads * vector]
    assert [p.bytes_written - moved[0].bytes_written for p in moved] == [0, 0, vector]


def test_predicted_time() -> None:
    p = plan(celeba(1), H100)
    assert p.seconds(1e12) == pytest.approx((p.bytes_read + p.bytes_written) / 1e12, rel=1e-3)
    assert p.seconds() == pytest.approx(16.1e9 / 3.35e12, rel=0.01)


@given(WORKS, st.sampled_from(list(DEVICES.values())))
def test_what_is_expected_of_a_plan(work: Work, device: Device) -> None:
    """Useful bytes in the expected time are the expected part of the bandwidth, of which every factor takes some."""
    p = plan(work, device)
    found = expected(p)
    assert found.fraction == pytest.approx(work.useful_bytes / found.seconds / device.bandwidth)
    assert all(0 < factor <= 1 for name, factor in vars(found).items() if name != "seconds")
    assert expected(p, bandwidth=device.bandwidth / 2).seconds >= found.seconds * (1 - 1e-9)
    assert expected(p, room=0).fraction == 0


def test_programs_fill_whole_waves() -> None:
    """As one program a slab, two thirds of these slabs would be left for a second wave that is a fifth full."""
    found = plan(Work(40, 256, 256, 256, 4, "columns"), H100)
    assert (found.variant, found.splits) == ("split", 4)
    assert expected(found).filled > 0.95
    few = plan(Work(3, 4, 64, 288 * 384, 4, "columns"), H100)
    assert few.splits > 40 and expected(few).filled == 1
    assert plan(Work(40, 256, 64, 4096, 4), H100).variant == "streaming"


def test_reasons_name_what_takes_most_first() -> None:
    streaming = dataclasses.replace(plan(Work(40, 256, 256, 256, 4, "columns"), H100), variant="streaming", splits=1)
    text = reasons(streaming, expected(streaming))
    assert text.startswith("waves 0.61 (1.21), bytes 0.67, copy 0.90")
    assert "launches" not in text


def test_devices_by_name() -> None:
    assert devices.named("rtx 4090") is DEVICES["RTX4090"]
    assert devices.named("h100").clusters
    assert not devices.named("A100").clusters
    assert not devices.named("MI300X").clusters
    with pytest.raises(ValueError, match="unknown device 'V100'; known are A100"):
        devices.named("V100")


# Multiprocessors, GB, memory clock in kHz and bus in bits as drivers tell them, and the data sheets' TB/s.
CARDS = {
    "NVIDIA A100-SXM4-80GB": ((8, 0), 108, 85.1, 1_593_000, 5120, 2.039),
    "NVIDIA A100-SXM4-40GB": ((8, 0), 108, 42.4, 1_215_000, 5120, 1.555),
    "NVIDIA A100-PCIE-40GB": ((8, 0), 108, 42.4, 1_215_000, 5120, 1.555),
    "NVIDIA A100 80GB PCIe": ((8, 0), 108, 85.1, 1_512_000, 5120, 1.935),
    "NVIDIA H100 80GB HBM3": ((9, 0), 132, 84.9, 2_619_000, 5120, 3.35),
    "NVIDIA H100 PCIe": ((9, 0), 114, 84.9, 1_593_000, 5120, 2.04),
    "NVIDIA H100 NVL": ((9, 0), 132, 99.9, 2_619_000, 6016, 3.94),
    "NVIDIA H200": ((9, 0), 132, 150.1, 3_201_000, 6144, 4.8),
    "NVIDIA GH200 480GB": ((9, 0), 132, 101.0, 2_619_000, 6144, 4.0),
    "NVIDIA H20": ((9, 0), 78, 101.0, 2_619_000, 6144, 4.0),
    "NVIDIA B200": ((10, 0), 148, 191.5, 3_996_000, 8192, 8.0),
    "NVIDIA GeForce RTX 3090": ((8, 6), 82, 25.4, 9_751_000, 384, 0.936),
    "NVIDIA GeForce RTX 3090 Ti": ((8, 6), 84, 25.4, 10_501_000, 384, 1.008),
    "NVIDIA GeForce RTX 4090 Laptop GPU": ((8, 9), 76, 17.1, 9_001_000, 256, 0.576),
}
UNTOLD = {  # the same by a driver that does not tell of the memory; None: not known on paper
    **dict.fromkeys(CARDS),
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA A100 80GB PCIe": "A100",
    "NVIDIA A100-SXM4-40GB": "A100 40GB",
    "NVIDIA A100-PCIE-40GB": "A100 40GB",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H100 NVL": "H100 NVL",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
    "NVIDIA GeForce RTX 3090": "RTX3090",
}
# A part of a GPU: multiprocessors, GB, and the eighths of the whole's bandwidth.
PARTS = {
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb": (16, 10.2, "H100", 1),
    "NVIDIA H100 80GB HBM3 MIG 1g.20gb": (26, 20.7, "H100", 2),
    "NVIDIA H100 80GB HBM3 MIG 3g.40gb": (60, 42.0, "H100", 4),
    "NVIDIA H100 80GB HBM3 MIG 7g.80gb": (132, 84.5, "H100", 8),
    "NVIDIA H100 PCIe MIG 2g.20gb": (32, 20.7, "H100 PCIe", 2),
    "NVIDIA H200 MIG 1g.18gb": (16, 17.3, "H200", 1),
    "NVIDIA A100-SXM4-40GB MIG 2g.10gb": (28, 10.2, "A100 40GB", 2),
}


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Device]:
    """The device that a driver tells of."""

    def describe(kind: str = "cuda", **told: Any) -> Device:
        if kind == "cuda":  # a PyTorch for CUDA gives the name for the architecture of AMD's
            told = {"gcnArchName": told["name"]} | told
        module = types.SimpleNamespace(get_device_properties=lambda device: types.SimpleNamespace(**told))
        monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
        return devices.of(torch.device(kind, 0))

    return describe


@pytest.mark.parametrize("name", CARDS)
def test_cards_of_nearly_the_same_name(driver: Callable[..., Device], name: str) -> None:
    (major, minor), multiprocessors, memory, clock, width, bandwidth = CARDS[name]
    told = {"name": name, "major": major, "minor": minor, "multi_processor_count": multiprocessors}
    told |= {"total_memory": int(memory * 1e9)}
    device = driver(**told, memory_clock_rate=clock, memory_bus_width=width)
    assert device.bandwidth == pytest.approx(bandwidth * 1e12, rel=0.03)
    assert (device.name, device.target) == (name, f"sm_{major}{minor}")
    assert device.multiprocessors == multiprocessors
    paper = devices.by_driver(name)
    assert (None if paper is None else paper.name) == UNTOLD[name]
    if paper is not None:
        assert driver(**told).bandwidth == paper.bandwidth == pytest.approx(bandwidth * 1e12, rel=0.06)


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_gpu(driver: Callable[..., Device], name: str) -> None:
    """Whatever a driver tells there of clock and bus is the whole's."""
    multiprocessors, memory, whole, eighths = PARTS[name]
    told = {"name": name, "major": 9, "multi_processor_count": multiprocessors, "total_memory": int(memory * 1e9)}
    for more in ({}, {"memory_clock_rate": 2_619_000, "memory_bus_width": 5120}):
        device = driver(**told, **more, L2_cache_size=6 << 20)
        assert device.bandwidth == pytest.approx(DEVICES[whole].bandwidth * eighths / 8)
        assert (device.multiprocessors, device.l2) == (multiprocessors, 6 << 20)
    assert devices.by_driver(name) is None


def test_a_device_of_no_known_name(driver: Callable[..., Device]) -> None:
    """What the driver tells is believed; what it does not is that of the same architecture, or the one before."""
    device = driver(
        name="NVIDIA X",
        major=8,
        minor=6,
        multi_processor_count=28,
        L2_cache_size=3 << 20,
        memory_clock_rate=7_501_000,
        memory_bus_width=192,
        total_memory=12 << 30,
    )
    assert (device.target, device.multiprocessors, device.l2, device.warp) == ("sm_86", 28, 3 << 20, 32)
    assert (device.shared_memory, device.threads) == (100 << 10, 1536)  # not those of an H100
    assert device.bandwidth == pytest.approx(360e9, rel=0.001)
    assert driver(name="NVIDIA X", major=12, minor=1, multi_processor_count=17).bandwidth == pytest.approx(0.1792e12)
    assert driver(name="NVIDIA X", major=10, minor=3).shared_memory == DEVICES["B200"].shared_memory
    assert driver(name="NVIDIA X", major=7, minor=5).warp == 32


def test_devices_of_other_makers(driver: Callable[..., Device]) -> None:
    told = {"major": 9, "minor": 4, "gcnArchName": "gfx942:sramecc+:xnack-", "warp_size": 64}
    memory = {"memory_clock_rate": 1_300_000, "memory_bus_width": 8192}
    whole = driver(name="AMD Instinct MI300X", multi_processor_count=304, **told, **memory)
    assert (whole.target, whole.bandwidth, whole.warp) == ("gfx942", 5.3e12, 64)
    assert driver(name="AMD Instinct MI300X", multi_processor_count=38, **told).bandwidth == pytest.approx(5.3e12 / 8)
    assert driver(name="AMD X", multi_processor_count=304, **told, **memory).bandwidth == pytest.approx(
        2.66e12, rel=0.01
    )
    intel = driver(
        "xpu",
        name="Intel(R) Arc(TM) B580 Graphics",
        gpu_subslice_count=20,
        max_work_group_size=1024,
        local_mem_size=128 << 10,
        last_level_cache_size=18 << 20,
        memory_clock_rate=9500,
        memory_bus_width=192,
    )
    assert (intel.target, intel.multiprocessors, intel.l2) == ("xpu", 20, 18 << 20)
    assert intel.shared_memory == intel.block_shared_memory == 128 << 10
    assert intel.bandwidth == pytest.approx(456e9)


def test_every_paper_device_goes_by_its_own_name() -> None:
    for device in DEVICES.values():
        assert devices.by_driver(f"NVIDIA {device.name}") is device
        assert devices.named(device.name.lower().replace(" ", "-")) is device
        assert devices.akin(device.target).target == device.target
    assert devices.by_driver("NVIDIA GH100") is devices.by_driver("Tesla V100") is None


# ---- python -m tsbn_kernels plan ---------------------------------------------------------------------------------


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    command.main(["plan", *arguments])
    return capsys.readouterr().out


def test_plan_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--shape", "40,256,64,64,64", "--dtype", "bf16", "--device", "H100")
    assert "[T, N, C, S] = [40, 256, 64, 4096], 2 bytes a value, rows, 5 GiB" in text
    assert "predicted" in text
    assert "nothing was measured" in text
    rows = {line[:18].strip(): line[18:].split() for line in text.splitlines()}
    assert rows["variant"] == ["cluster", "cluster", "elementwise"]
    assert rows["bytes written"][:2] == ["5", "GiB"]
    assert rows["of the bandwidth"][0] == "84%" and rows["exchanges"][0] == "2"


def test_the_backend_of_each_pass_is_told_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--shape", "40,256,64,64,64", "--dtype", "bf16")
    rows = {line[:18].strip(): line[18:].split() for line in text.splitlines()}
    assert rows["backend"] == ["cuda", "cuda", "triton"]
    assert "forward training: cuda, 3.4 ms; triton would take 4.81 ms: 1.41 times the bytes, launches 1" in text
    forced = printed(capsys, "--shape", "40,256,64,32,32", "--dtype", "bf16", "--backend", "triton")
    assert not {"cuda", "why,"} & set(forced.split())
    assert "would take" not in forced
    text = printed(capsys, "--norm", "layer", "--shape", "2,1,4096,12288", "--dtype", "bf16")
    assert "backward: cuda" in text
    with pytest.raises(SystemExit):
        printed(capsys, "--norm", "layer", "--shape", "2,1,4,20000")
    assert "rows of 20000 values are longer" in capsys.readouterr().err


def test_plan_of_other_layouts(capsys: pytest.CaptureFixture[str]) -> None:
    assert "columns" in printed(capsys, "--shape", "40,256,512")
    assert "columns" in printed(capsys, "--shape", "2,8,64,5,5", "--format", "channels_last")
    assert "at 1.00 TB/s" in printed(capsys, "--shape", "2,8,64,5,5", "--bandwidth", "1000")


def test_plan_of_what_is_fused(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a block of convolution, layer and ReLU with a residual: x twice, residual and y instead of eight tensors."""
    fused = "--activation", "relu", "--residual", "--backend", "triton"
    text = printed(capsys, "--shape", "40,256,64,64,64", "--dtype", "bf16", *fused)
    assert "5 GiB, residual, relu" in text
    (line,) = [line for line in text.splitlines() if line.startswith("bytes unfused")]
    assert line.split()[2:4] == ["40", "GiB"]
    assert "(fused 50% fewer)" in line
    text = printed(capsys, "--shape", "40,256,64,64,64", "--dtype", "bf16", "--fan-out")
    assert "one input for all tasks" in text
    assert "bytes unfused" in text
    assert "unfused" not in printed(capsys, "--shape", "40,256,64")


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_plan_of_layer_normalisation(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--norm", "layer", "--shape", "5,8,1024,384", "--dtype", "bf16", "--backend", backend)
    assert "[T, rows, D] = [5, 8192, 384], 2 bytes a value, layer norm, 30 MiB" in text
    rows = {line[:18].strip(): line[18:].split() for line in text.splitlines()}
    assert rows["launches"] == ["1", "2"]
    text = printed(capsys, "--norm", "rms", "--shape", "5,8,1024,384", "--fan-out", "--backend", backend)
    assert "RMS norm" in text and "one input for all tasks" in text
    assert ("backward, parameters" in text) == (backend == "triton")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "4,4,4", "--norm", "layer", "--activation", "relu"], "--norm layer takes no --activation"),
        (["--shape", "40"], "'40' is not T,N,C"),
        (["--shape", "40,x,3"], "is not T,N,C"),
        (["--shape", "40,0,3"], "with sizes of 1 and more"),
        (["--shape", "4,4,4", "--device", "V100"], "unknown device 'V100'"),
        (["--shape", "4,4,4", "--device", "MI300X", "--backend", "cuda"], "NVIDIA's GPUs alone, not on MI300X"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["plan", *arguments])
    assert message in capsys.readouterr().err


def test_report_without_a_gpu() -> None:
    done = python("from tsbn_kernels.__main__ import main; main([])", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    assert "no GPU here" in done.stdout or "Triton is not installed" in done.stdout
    assert "cpu tensors run on:" in done.stdout
