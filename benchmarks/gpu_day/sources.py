"""A digest of all that results depend on: those of other sources are not taken for today's."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SOURCES = ("tsbn_kernels/**/*.py", "tsbn_kernels/*.so", "benchmarks/**/*.py", "tests/*.py", "tests/on_gpu/*.py")


def digest(**facts: object) -> str:
    """Hashes the sources, compiled libraries included, and what else the results depend on."""
    found = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        found.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]
