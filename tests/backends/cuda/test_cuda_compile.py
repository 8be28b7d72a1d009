"""The compile gate: registers, stack and the machine instructions of every kernel, for every architecture."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from cuda_source import CSRC, source
from support.processes import ROOT

from benchmarks.hot_paths.fake_driver import sections
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


# Instructions as the disassembler writes them, and their lowest 9 bits: those of local memory, and those of 16 bytes.
LOCAL = {r"\bLDL\b": 0x183, r"\bSTL\b": 0x187}
WIDE = {r"LDG\.E(\.\w+)*\.128": 0x181, r"STG\.E(\.\w+)*\.128": 0x186, r"STS\.128": 0x188, r"LDS\.128": 0x184}


@lru_cache
def machine_code(cubin: Path) -> dict[str, bytes]:
    """The instructions of each kernel, of 16 bytes."""
    parts = sections(cubin.read_bytes())
    return {name.removeprefix(".text."): code for name, code in parts.items() if name.startswith(".text.tsbn_")}


def wide(code: bytes) -> dict[str, int]:
    """So many of each kind of WIDE: bits 73 to 75 of an instruction are the width of what it moves."""
    low, high = np.frombuffer(code, "<u8").reshape(-1, 2).T
    return _counts(low[(high >> 9) & 7 == 6], WIDE)


def local(code: bytes) -> dict[str, int]:
    """So many of each kind of LOCAL."""
    return _counts(np.frombuffer(code, "<u8")[::2], LOCAL)


def _counts(low: np.ndarray, kinds: Mapping[str, int]) -> dict[str, int]:
    """So many instructions of each kind, from the lower halves of all."""
    return {pattern: int((low & 0x1FF == opcode).sum()) for pattern, opcode in kinds.items()}


def disassembled(code: bytes, architecture: int, folder: Path) -> str:
    (folder / "code").write_bytes(code)
    return printed(tool("nvdisasm"), "-b", f"SM{architecture}", str(folder / "code"))


IN_LOCAL_MEMORY = """
extern "C" __global__ void tsbn_local(int* p, int n) {
  int kept[64];
  for (int i = 0; i < n; ++i) kept[p[i] & 63] = i;
  p[0] = kept[n & 63];
}
"""


@architectures
def test_bits_show_local_memory(architecture: int, tmp_path: Path) -> None:
    """No kernel of ours has any, so one is compiled that must."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    text, made = tmp_path / "local.cu", tmp_path / "local.cubin"
    text.write_text(IN_LOCAL_MEMORY)
    printed(nvcc, f"-arch=sm_{architecture}", "-cubin", str(text), "-o", str(made))
    code = machine_code(made)["tsbn_local"]
    shown = disassembled(code, architecture, tmp_path)
    assert local(code) == {pattern: len(re.findall(pattern, shown)) for pattern in LOCAL}
    assert all(local(code).values())


@architectures
@pytest.mark.parametrize("kernel", ["tsbn_backward_bf16_rows", "tsbn_forward_f64_columns"])
def test_bits_mean_what_the_disassembler_says(
    kernel: str, architecture: int, cubins: dict[int, list[Path]], tmp_path: Path
) -> None:
    """It takes seconds for all kernels, and what it prints of one shows what the bits of an instruction are."""
    (code,) = (found[kernel] for file in cubins[architecture] if kernel in (found := machine_code(file)))
    text = disassembled(code, architecture, tmp_path)
    assert not any(re.search(pattern, text) for pattern in LOCAL)
    assert wide(code) == {pattern: len(re.findall(pattern, text)) for pattern in WIDE}
    assert all(wide(code).values())
    assert len(re.findall(r"\b(?:LDG|STG|STS|LDS)\b", text)) > sum(wide(code).values())


@architectures
def test_accesses_are_16_bytes_wide(architecture: int, cubins: dict[int, list[Path]]) -> None:
    """Loads and stores of slots, in the machine's own instructions, as often as the loops are unrolled."""
    kernels = {name: code for file in cubins[architecture] for name, code in machine_code(file).items()}
    assert len(kernels) == KERNELS
    for name, code in kernels.items():
        assert not any(local(code).values()), name
        if name.endswith("scalar") or "parameters" in name or "keys" in name:
            continue
        unrolled = 1 if "epilogue" in name or "mixed" in name else 2 if "backward" in name else 4
        # A fan-out's backward, mixed batches and layer normalisation keep no slots in shared memory.
        keeps = not any(kind in name for kind in ("fan_out", "mixed", "layer_norm"))
        for pattern, count in wide(code).items():
            if keeps or pattern.startswith(("LDG", "STG")):
                assert count >= unrolled, (name, pattern)


@pytest.mark.parametrize("device", ["A100", "H100", "B200", "RTX4090"])
def test_planned_blocks_are_resident(device: str) -> None:
    """Three blocks of a forward kernel and two of a backward one, as far as their registers go."""
    hardware = DEVICES[device]
    passes: list[tuple[Direction, int]] = [("forward", 3), ("backward", 2)]
    for direction, blocks in passes:
        plan = rules.lay_out(Work(4, 64, 8, 4096, 2, "rows", direction), hardware, "streaming")
        assert plan.resident_programs == blocks
