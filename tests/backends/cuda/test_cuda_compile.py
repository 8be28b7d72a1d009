"""The compile gate: registers, stack and the machine instructions of every kernel, for every architecture."""

from __future__ import annotations

import re
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest
from cuda_source import CSRC, source
from support.processes import ROOT

from tools.ptxvm import find_nvcc
from tsbn_kernels.backends.plan import DEVICES, Work
from tsbn_kernels.backends.plan import cuda as rules
from tsbn_kernels.backends.plan import layer_norm_cuda as layer_rules
from tsbn_kernels.backends.plan.layer_norm import LayerWork
from tsbn_kernels.backends.plan.mixed import MixedWork
from tsbn_kernels.backends.plan.slots import PASSES, pass_of
from tsbn_kernels.backends.plan.work import Direction

ARCHITECTURES = (80, 86, 90, 100, 120)
LIBRARY = ROOT / "tsbn_kernels" / "_cuda.so"
SOURCES = "kernels.cu", "layer_norm.cu"
ROW_KERNELS = 2 * len(rules.DTYPE_CODES) * 2 + 2  # two passes, two accesses; and one that adds sums, of two types
KEY_KERNELS = 3  # one for each width of a word
TOGETHER = 4 * len(rules.DTYPE_CODES)  # of columns, without the fan-out's backward and mixed batches
KERNELS = (len(PASSES) - 1) * len(rules.DTYPE_CODES) * 3 + TOGETHER + KEY_KERNELS + ROW_KERNELS


def tool(name: str) -> str:
    """cuobjdump or nvdisasm, as Triton's wheel brings them."""
    triton = pytest.importorskip("triton")
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        pytest.skip(f"no {name}")
    return str(path)


def printed(*command: str, folder: Path | None = None) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout


@pytest.fixture(scope="module")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Path]]:
    """The machine code of the library as it was built; what is missing or older than the source is compiled.

    There is a file for each source and architecture.
    """
    folder = tmp_path_factory.mktemp("cubins")
    if LIBRARY.exists() and LIBRARY.stat().st_mtime >= max(
        file.stat().st_mtime for file in (*CSRC.iterdir(), *CSRC.parent.glob("*.h"))
    ):
        printed(tool("cuobjdump"), "-xelf", "all", str(LIBRARY), folder=folder)
    found: dict[int, list[Path]] = {architecture: [] for architecture in ARCHITECTURES}
    for file in sorted(folder.glob("*.cubin")):
        found.setdefault(int(re.findall(r"sm_(\d+)", file.name)[0]), []).append(file)
    nvcc = find_nvcc()
    for architecture in ARCHITECTURES:
        if not found[architecture]:
            if nvcc is None:
                pytest.skip("no nvcc, and no library for all architectures")
            for name in SOURCES:
                text, made = folder / name, folder / f"{name}.sm_{architecture}.cubin"
                text.write_text(source(name))
                flags = ("-std=c++17", "-O3", f"-arch=sm_{architecture}", "-DTSBN_DEVICE_ONLY", "-cubin")
                printed(nvcc, *flags, str(text), "-o", str(made))
                found[architecture].append(made)
    return found


def budget(name: str) -> int:
    """The registers that the plans count on for a kernel."""
    direction: Direction = "backward" if "backward" in name else "forward"
    item_size = 8 if "f64" in name else 4
    if "layer_norm" in name:
        rows = LayerWork(1, 2, 16, 2, item_size, direction=direction)
        return layer_rules.register_budget(rows, 1 if name.endswith("scalar") else 16 // item_size)
    if "mixed" in name:
        return 128 if "keys" in name else rules.register_budget(MixedWork(1, 2, 1, 2, item_size, direction=direction))
    fused = {"activation": "relu" if "epilogue" in name else "none", "fan_out": "fan_out" in name}
    work = Work(1, 2, 1, 2, item_size, direction=direction, **fused)  # type: ignore[arg-type]
    assert name.startswith(f"tsbn_{pass_of(work)}_")
    return rules.register_budget(work, "together" if "together" in name else "streaming")


architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


@architectures
def test_resources(architecture: int, cubins: dict[int, list[Path]]) -> None:
    """No stack and no local memory, so no spills; registers within the plan's budget."""
    usage = "".join(printed(tool("cuobjdump"), "-res-usage", str(file)) for file in cubins[architecture])
    kernels = re.findall(r"Function (tsbn_\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert len(kernels) == KERNELS
    for name, registers, stack, shared, local in kernels:
        assert (stack, local) == ("0", "0"), name
        # What CUDA keeps for itself: ours is dynamic, but for the small kernel that adds sums.
        assert int(shared) <= 1024 + (4096 if "parameters" in name or "keys" in name else 0), name
        assert int(registers) <= budget(name), name


@lru_cache
def disassembled(cubin: Path) -> dict[str, str]:
    text = printed(tool("nvdisasm"), "-c", str(cubin))
    functions = dict(re.findall(r"\.section\s+\.text\.(\w+),(.*?)(?=\.section\s|\Z)", text, re.DOTALL))
    return {name: body for name, body in functions.items() if name.startswith("tsbn_")}


@architectures
def test_accesses_are_16_bytes_wide(architecture: int, cubins: dict[int, list[Path]]) -> None:
    """Loads and stores of slots, in the machine's own instructions, as often as the loops are unrolled."""
    kernels = {name: body for file in cubins[architecture] for name, body in disassembled(file).items()}
    assert len(kernels) == KERNELS
    for name, body in kernels.items():
        assert not re.search(r"\b(LDL|STL)\b", body), name  # local memory
        if name.endswith("scalar") or "parameters" in name or "keys" in name:
            continue
        unrolled = 1 if "epilogue" in name or "mixed" in name else 2 if "backward" in name else 4
        outside, inside = (r"LDG\.E(\.\w+)*\.128", r"STG\.E(\.\w+)*\.128"), (r"STS\.128", r"LDS\.128")
        # A fan-out's backward, mixed batches and layer normalisation keep no slots there.
        keeps = not any(kind in name for kind in ("fan_out", "mixed", "layer_norm"))
        for pattern in outside + inside if keeps else outside:
            assert len(re.findall(pattern, body)) >= unrolled, (name, pattern)


@pytest.mark.parametrize("device", ["A100", "H100", "B200", "RTX4090"])
def test_planned_blocks_are_resident(device: str) -> None:
    """Three blocks of a forward kernel and two of a backward one, as far as their registers go."""
    hardware = DEVICES[device]
    passes: list[tuple[Direction, int]] = [("forward", 3), ("backward", 2)]
    for direction, blocks in passes:
        plan = rules.lay_out(Work(4, 64, 8, 4096, 2, "rows", direction), hardware, "streaming")
        assert plan.resident_programs == blocks
