"""Step: compute-sanitizer over one small call of each kind of launch.

``python -m benchmarks.gpu_check.sanitizer DEVICE BACKEND`` makes the calls, to be run under the tool.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial

from benchmarks.gpu_check.case import Case, Cases, Setting, SkippedError

TOOL = "compute-sanitizer"
CHECKS = ("memcheck", "racecheck", "synccheck")
FOUND = 86  # exit status where the tool finds something
MOST_ELEMENTS = 2**17
DONE = "all calls were made"


def cases(setting: Setting) -> Cases:
    """A run for each check.

    Raises:
        SkippedError: the tool is not there.
    """
    tool = shutil.which(TOOL)
    if tool is None:
        raise SkippedError(f"{TOOL} is not on the PATH; it comes with the CUDA toolkit")
    checks = CHECKS[:1] if setting.quick else CHECKS
    return Cases([Case(check, partial(run_under, tool, check, setting)) for check in checks])


def run_under(tool: str, check: str, setting: Setting) -> None:
    """The calls under the tool.

    Raises:
        AssertionError: it found something, the calls failed, or they were not made.
    """
    program = [sys.executable, "-m", "benchmarks.gpu_check.sanitizer", setting.device, setting.backend]
    # Without PyTorch's cache of memory an access past a tensor is one past what the driver has given. Libraries ask the
    # driver for what it may not have: such errors of calls are none of ours.
    variables = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = ["--tool", check, "--error-exitcode", str(FOUND), "--print-limit", "20", "--report-api-errors", "no"]
    ended = subprocess.run([tool, *options, *program], env=variables, stdout=subprocess.PIPE, text=True, check=False)
    print(ended.stdout, flush=True)
    assert ended.returncode != FOUND, f"{check} found something: see its output"
    assert ended.returncode == 0, f"{TOOL} --tool {check} ended with status {ended.returncode}"
    assert DONE in ended.stdout, f"{TOOL} --tool {check} has not run the program"


def main(device: str, backend: str) -> None:
    """One call of each kind that is small enough."""
    from benchmarks.gpu_check import families
    from benchmarks.gpu_check.calls import check

    for spec in families.planned(Setting(device, False, "", backend)):
        if spec.elements <= MOST_ELEMENTS:
            print(spec.name, flush=True)
            check(spec.call(), backend, device, sums=spec.sums)
    print(DONE)


if __name__ == "__main__":
    main(*sys.argv[1:])
