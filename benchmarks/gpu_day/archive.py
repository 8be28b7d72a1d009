"""All that a GPU day has found so far in one file, which is whole at any time."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

NAME = "gpu_day.tar.gz"
PATTERNS = (
    "records.jsonl",
    "sweep.jsonl",
    "table.txt",
    "clocks.csv",
    "*.json",
    "*.csv",
    "*.log",
)  # most valuable first
MOST = 15 << 20  # bytes before compression: so many come home whatever they are
MOST_OF_A_LOG = 100 << 10


def write(folder: Path) -> Path:
    """Replaces the archive by one of the files that are there now; of what is too long the end is kept."""
    path = folder / NAME
    beside = path.with_suffix(".new")
    with tarfile.open(beside, "w:gz", compresslevel=6) as archive:
        left = MOST
        for file in _files(folder):
            most = min(left, MOST_OF_A_LOG) if file.suffix == ".log" else left
            content = _end(file, most)
            left -= len(content) + 2 * tarfile.BLOCKSIZE
            if left < 0:
                break
            member = tarfile.TarInfo(f"gpu_day/{file.name}")
            member.size, member.mtime = len(content), int(file.stat().st_mtime)
            archive.addfile(member, io.BytesIO(content))
    os.replace(beside, path)
    return path


def _files(folder: Path) -> Iterator[Path]:
    found = [file for pattern in PATTERNS for file in sorted(folder.glob(pattern))]
    return iter(dict.fromkeys(found))


def _end(file: Path, most: int) -> bytes:
    with file.open("rb") as content:
        content.seek(max(0, file.stat().st_size - most))
        return content.read(most)
