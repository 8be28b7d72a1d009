"""All that a GPU day has found so far in one file, which is whole at any time, and from which a later call goes on."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zlib
from pathlib import Path

NAME = "gpu_day.tar.gz"
PATTERNS = ("*.jsonl", "table.txt", "*.md", "*.csv", "*.log")  # most valuable first
MOST = 15 << 20  # bytes before compression: so many come home whatever they are
MOST_OF_A_FILE, MOST_OF_A_LOG = 6 << 20, 100 << 10


def write(folder: Path, path: Path) -> None:
    """Replaces the archive by one of the folder's files; of what is too long the end is kept."""
    beside = path.with_name(f".{path.name}")
    left = MOST
    with tarfile.open(beside, "w:gz", compresslevel=6) as archive:
        for file in dict.fromkeys(file for pattern in PATTERNS for file in sorted(folder.glob(pattern))):
            left -= 2 * tarfile.BLOCKSIZE
            if left <= 0:
                break
            content = _end(file, min(left, MOST_OF_A_LOG if file.suffix == ".log" else MOST_OF_A_FILE))
            left -= len(content)
            member = tarfile.TarInfo(f"gpu_day/{file.name}")
            member.size, member.mtime = len(content), int(file.stat().st_mtime)
            archive.addfile(member, io.BytesIO(content))
    os.replace(beside, path)


def unpack(path: Path, folder: Path) -> None:
    """The files of an archive, into the folder; none where there is no archive.

    One that is damaged is put aside, for another takes its place.
    """
    if not path.exists():
        return
    try:
        content = gzip.decompress(path.read_bytes())
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            files = {Path(member.name).name: archive.extractfile(member) for member in archive}
            found = {name: file.read() for name, file in files.items() if file is not None}
    except (gzip.BadGzipFile, EOFError, zlib.error, tarfile.TarError) as error:
        aside = path.replace(path.with_name(f"damaged-{path.name}"))
        print(f"the archive of an earlier call is damaged ({error}), and is now {aside}", flush=True)
        return
    for name, file in found.items():
        (folder / name).write_bytes(file)


def _end(file: Path, most: int) -> bytes:
    with file.open("rb") as content:
        content.seek(max(0, file.stat().st_size - most))
        return content.read(most)
