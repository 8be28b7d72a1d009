"""Steps of a GPU day that do what kernels might: crash, hang, fail. They import little, so that they start at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from benchmarks.gpu_day.step_api import Measurement, Setting, SkippedError


def good(setting: Setting) -> list[Measurement]:
    return [Measurement("a", lambda: None), Measurement("b", partial(print, "printed"))]


def crashes(setting: Setting) -> list[Measurement]:
    return [Measurement("before", lambda: None), Measurement("abort", os.abort), Measurement("after", lambda: None)]


def always_crashes(setting: Setting) -> list[Measurement]:
    return [Measurement(f"abort {index}", os.abort) for index in range(20)]


def hangs(setting: Setting) -> list[Measurement]:
    return [
        Measurement("before", lambda: None),
        Measurement("hang", partial(time.sleep, 600)),
        Measurement("after", lambda: None),
    ]


def lingers(setting: Setting) -> list[Measurement]:
    """Starts a program and waits; their numbers are in files."""

    def linger() -> None:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        for name, number in (("worker", os.getpid()), ("child", child.pid)):
            (Path(setting.folder) / name).write_text(str(number))
        child.wait()

    return [Measurement("linger", linger)]


def differs(setting: Setting) -> list[Measurement]:
    def wrong() -> None:
        raise AssertionError("dx differs in 3 of 9 values\nand more")

    return [Measurement("right", lambda: None), Measurement("dx", wrong), Measurement("after", lambda: None)]


def loses_the_device(setting: Setting) -> list[Measurement]:
    worker = sys.modules["__main__"]

    def lose() -> None:
        worker.is_usable = lambda _: False  # type: ignore[attr-defined]
        raise RuntimeError("an illegal memory access was encountered")

    def works() -> None:
        assert worker.is_usable("cpu")

    return [Measurement("illegal", lose), Measurement("after", works)]


def dies_at_its_end(setting: Setting) -> list[Measurement]:
    import atexit

    return [Measurement("registers", lambda: atexit.register(os._exit, 7) and None)]


def broken(setting: Setting) -> list[Measurement]:
    raise ValueError("the step itself is broken")


def left_out(setting: Setting) -> list[Measurement]:
    raise SkippedError("the tool is missing")


def counted(setting: Setting) -> list[Measurement]:
    """Three cases that note their runs; the second fails until there is a file "mended"."""

    def note(name: str) -> None:
        with (Path(setting.folder) / "runs").open("a") as file:
            file.write(f"{name}\n")
        assert name != "second" or (Path(setting.folder) / "mended").exists()

    return [Measurement(name, partial(note, name)) for name in ("first", "second", "third")]
