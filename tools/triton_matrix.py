"""``make triton-matrix``: do the planned kernels compile, within their plans' budgets, with every supported Triton?

``python tools/triton_matrix.py 3.6.0 3.7.0`` installs the versions named into build/triton. With each of them every
``STRIDE``-th kernel of the compile gate is compiled for ``TARGETS``, and the tests of the launcher run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
TARGETS = ("sm_80", "sm_90", "sm_100")
STRIDE = 8
# Times the planned bytes of shared memory: what compilers before 3.8 take for masked rows of float32.
SHARED = 4
COMMANDS = (__file__,), ("-m", "pytest", "-q", "-n0", "tests/backends/test_launcher.py")


def environment(version: str) -> dict[str, str]:
    """The variables of a process that finds a version of Triton, which is fetched unless it was before."""
    folder = ROOT / "build" / "triton" / version
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"--target={folder}"]
        subprocess.run([*command, f"triton=={version}"], check=True)
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def compile_here() -> int:
    """Compiles the kernels with the Triton of this process; returns how many exceed what they may take."""
    from benchmarks.profile.compile_offline import COMPILER
    from tools.compile_gate.table import asked, rows

    made = rows([(target, index) for target in TARGETS for index in range(0, len(asked(target)), STRIDE)], {})
    over = [row for row in made if not replace(row, shared_budget=SHARED * row.shared_budget).within_budget]
    print(
        f"{COMPILER}: {len(made) - len(over)} of {len(made)} kernels take what they may, and spill nothing", flush=True
    )
    sys.stderr.writelines(f"{row}\n" for row in over)
    return len(over)


def main(versions: list[str]) -> int:
    """Checks one version after the other; returns how many fail."""
    failed = 0
    for version in versions:
        own = environment(version)
        codes = [subprocess.call([sys.executable, *command], cwd=ROOT, env=own) for command in COMMANDS]
        failed += any(codes)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) if sys.argv[1:] else bool(compile_here()))
