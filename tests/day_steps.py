"""Steps of a GPU day that do what kernels might: crash, hang, fail. They import little, so that they start at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from benchmarks.gpu_day.case import Case, Setting, SkippedError


def good(setting: Setting) -> list[Case]:
    return [Case("a", lambda: None), Case("b", partial(print, "printed"))]


def crashes(setting: Setting) -> list[Case]:
    return [Case("before", lambda: None), Case("abort", os.abort), Case("after", lambda: None)]


def always_crashes(setting: Setting) -> list[Case]:
    return [Case(f"abort {index}", os.abort) for index in range(20)]


def hangs(setting: Setting) -> list[Case]:
    return [Case("before", lambda: None), Case("hang", partial(time.sleep, 600)), Case("after", lambda: None)]


def lingers(setting: Setting) -> list[Case]:
    """Starts a program and waits; their numbers are in files."""

    def linger() -> None:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        for name, number in (("worker", os.getpid()), ("child", child.pid)):
            (Path(setting.folder) / name).write_text(str(number))
        child.wait()

    return [Case("linger", linger)]


def differs(setting: Setting) -> list[Case]:
    def wrong() -> None:
        raise AssertionError("dx differs in 3 of 9 values\nand more")

    return [Case("right", lambda: None), Case("dx", wrong), Case("after", lambda: None)]


def loses_the_device(setting: Setting) -> list[Case]:
    worker = sys.modules["__main__"]

    def lose() -> None:
        worker.is_usable = lambda _: False  # type: ignore[attr-defined]
        raise RuntimeError("an illegal memory access was encountered")

    def works() -> None:
        assert worker.is_usable("cpu")

    return [Case("illegal", lose), Case("after", works)]


def dies_at_its_end(setting: Setting) -> list[Case]:
    import atexit

    return [Case("registers", lambda: atexit.register(os._exit, 7) and None)]


def broken(setting: Setting) -> list[Case]:
    raise ValueError("the step itself is broken")


def left_out(setting: Setting) -> list[Case]:
    raise SkippedError("the tool is missing")


def counted(setting: Setting) -> list[Case]:
    """Three cases that note their runs; the second fails until there is a file "mended"."""

    def note(name: str) -> None:
        with (Path(setting.folder) / "runs").open("a") as file:
            file.write(f"{name}\n")
        assert name != "second" or (Path(setting.folder) / "mended").exists()

    return [Case(name, partial(note, name)) for name in ("first", "second", "third")]
