"""What was measured, a line of JSON for each measurement, on disk as soon as it is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = "records.jsonl"


def note(folder: str | Path, kind: str, **values: Any) -> None:
    """Adds a line."""
    with (Path(folder) / FILE).open("a") as file:
        file.write(json.dumps({"kind": kind, **values}, default=str) + "\n")


def read(folder: str | Path, *kinds: str) -> list[dict[str, Any]]:
    """All lines of these kinds."""
    return [line for line in lines(Path(folder) / FILE) if line["kind"] in kinds]


def lines(path: Path) -> list[dict[str, Any]]:
    """All lines of a file, if there is one; a line that was cut off is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
