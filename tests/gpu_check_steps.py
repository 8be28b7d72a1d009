"""Steps that do what kernels might: crash, hang, give wrong results. They import little, so that they start at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from benchmarks.gpu_check.case import Case, Cases, Setting, SkippedError


def environment(setting: Setting) -> Cases:
    found = {"usable": {"one": "", "two": ""}, "missing": {"three": "was not built"}, "checked": ["one", "two"]}
    return Cases([
        Case("device", lambda: {"name": "a device"}),
        Case("versions", lambda: {"torch": "9.9"}),
        Case("backends", lambda: found),
    ])  # fmt: skip


def no_backends(setting: Setting) -> Cases:
    return Cases([Case("device", lambda: {"name": "a device"}), Case("backends", wrong)])


def good(setting: Setting) -> Cases:
    return Cases([Case("a", lambda: None), Case("b", partial(print, "printed"))], about="as they should be")


def crashes(setting: Setting) -> Cases:
    return Cases([Case("before", lambda: None), Case("abort", os.abort), Case("after", lambda: None)])


def always_crashes(setting: Setting) -> Cases:
    return Cases([Case(f"abort {index}", os.abort) for index in range(20)])


def hangs(setting: Setting) -> Cases:
    return Cases([Case("before", lambda: None), Case("hang", partial(time.sleep, 600)), Case("after", lambda: None)])


def lingers(setting: Setting) -> Cases:
    """Starts a program and waits; their numbers are in files."""

    def linger() -> None:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        for name, number in (("worker", os.getpid()), ("child", child.pid)):
            (Path(setting.folder) / name).write_text(str(number))
        child.wait()

    return Cases([Case("linger", linger)])


def differs(setting: Setting) -> Cases:
    return Cases([Case("right", lambda: None), Case("dx", wrong), Case("after", lambda: None)])


def wrong() -> None:
    raise AssertionError("dx differs in 3 of 9 values\nand more")


def loses_the_device(setting: Setting) -> Cases:
    def lose() -> None:
        sys.modules["__main__"]._usable = lambda _: False  # type: ignore[attr-defined]
        raise RuntimeError("an illegal memory access was encountered")

    return Cases([Case("illegal", lose), Case("after", lambda: None)])


def dies_at_its_end(setting: Setting) -> Cases:
    import atexit

    return Cases([Case("registers", lambda: atexit.register(os._exit, 7) and None)])


def broken(setting: Setting) -> Cases:
    raise ValueError("the step itself is broken")


def left_out(setting: Setting) -> Cases:
    raise SkippedError("the tool is missing")


def counted(setting: Setting) -> Cases:
    """Three cases that note their runs; the second fails until there is a file "mended"."""

    def note(name: str) -> None:
        with (Path(setting.folder) / "runs").open("a") as file:
            file.write(f"{name}\n")
        assert name != "second" or (Path(setting.folder) / "mended").exists()

    return Cases([Case(name, partial(note, name)) for name in ("first", "second", "third")])


def extras(setting: Setting) -> Cases:
    """The first two are enough; all but the first take a while."""
    return Cases([Case(f"case {index}", partial(time.sleep, 0.3 * min(index, 1))) for index in range(8)], enough=2)
