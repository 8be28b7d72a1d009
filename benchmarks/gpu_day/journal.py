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
    """All lines of these kinds; one that was cut off is left out."""
    path = Path(folder) / FILE
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if values["kind"] in kinds:
            found.append(values)
    return found
