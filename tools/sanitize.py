"""``make sanitize``: the tests of the CPU library on instrumented builds of it.

``python tools/sanitize.py address`` (AddressSanitizer and UBSan) or ``thread`` (ThreadSanitizer) builds csrc/cpu into
build/sanitize, never over the library in use, and runs the tests with the sanitizer's runtime under the interpreter. A
report ends the run. ThreadSanitizer knows nothing of OpenMP's barriers: schedule.h tells it of those around a parallel
loop. PyTorch itself is not instrumented.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:abort_on_error=0:exitcode=66",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
}
WITHOUT_POOL = {"TSBN_POOL_LIMIT_MB": "0"}  # for AddressSanitizer: the pool's blocks have no guards around them
# All that compares the library's operators with their definitions.
OPERATORS = (
    *("numerics", "ops", "determinism", "fan_out", "epilogue", "double_backward", "running_statistics"),
    *("synchronized_operators", "mixed", "mixed_layer", "layer_numerics", "layer_ops"),
)
TESTS = {
    "address": tuple(f"tests/operator/test_{name}.py" for name in OPERATORS),
    "thread": (
        "tests/operator/test_determinism.py",
        "tests/operator/test_memory.py",
    ),  # large operators of PyTorch itself are reported
}
# Interpreted Triton kernels are not the library; without the pool what looks at its blocks fails; what starts processes
# or measures memory meets the sanitizer's own.
LEFT_OUT = {
    "address": "not triton and not opcheck and not large and not pool",
    "thread": "not triton and not interpreter and not environment and not peak and not process",
}


def build(sanitizer: str) -> Path:
    """The instrumented library."""
    folder = ROOT / "build" / "sanitize" / sanitizer
    environment = {**os.environ, "TSBN_SANITIZE": sanitizer, "TSBN_BUILD_CUDA": "0"}
    places = ["--build-lib", str(folder), "--build-temp", str(folder / "objects")]
    command = [sys.executable, "setup.py", "-q", "build_ext", *places]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return folder / "tsbn_kernels" / "_native.so"


def runtime(name: str) -> str:
    """Path of a library that comes with the compiler."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def main(sanitizer: str, *arguments: str) -> int:
    """Builds the library and runs pytest, with ``arguments`` or on the tests of the library; returns its status."""
    environment = {
        **OPTIONS,
        **(WITHOUT_POOL if sanitizer == "address" else {}),
        **os.environ,
        "TSBN_NATIVE_LIBRARY": str(build(sanitizer)),
        "LD_PRELOAD": f"{runtime(RUNTIMES[sanitizer])} {runtime('libstdc++.so.6')}",
        "OMP_NUM_THREADS": "4",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--capture=sys",  # a report goes to the file descriptor itself, and ends the process
        "-p",
        "no:cacheprovider",
        *(arguments or (*TESTS[sanitizer], "-k", LEFT_OUT[sanitizer])),
    ]
    # Without a fixed layout of addresses: newer kernels randomise more bits than ThreadSanitizer of gcc 12 takes.
    return subprocess.run(["setarch", "-R", *command], cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
