"""The clocks, the temperature and the power of the GPU while it is measured, as nvidia-smi tells them."""

from __future__ import annotations

import shutil
import subprocess
import threading
from pathlib import Path

FIELDS = (
    "timestamp",
    "name",
    "pstate",
    "clocks.sm",
    "clocks.mem",
    "temperature.gpu",
    "power.draw",
    "memory.used",
    "utilization.gpu",
    "clocks_event_reasons.active",
)
FILE, SECONDS = "clocks.csv", 5.0


class Clocks:
    """Asks every few seconds, from a thread, until it is stopped; nothing where there is no nvidia-smi."""

    def __init__(self, folder: Path) -> None:
        self._path, self._over = folder / FILE, threading.Event()
        self._tool = shutil.which("nvidia-smi")

    def __enter__(self) -> Clocks:
        if self._tool:
            if not self._path.exists():
                self._path.write_text(",".join(FIELDS) + "\n")
            threading.Thread(target=self._ask, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _ask(self) -> None:
        assert self._tool is not None
        command = [self._tool, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader"]
        while not self._over.wait(SECONDS):
            try:
                said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
            except (OSError, subprocess.SubprocessError) as error:
                said = f"{error}\n"
            if self._over.is_set():
                return  # the folder may be gone
            with self._path.open("a") as file:
                file.write(said)
