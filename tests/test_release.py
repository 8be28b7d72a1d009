"""What must be said once: the pins of the tools."""

from __future__ import annotations

import re

import pytest
from support import ROOT


@pytest.mark.parametrize("tool", ["ruff", "mypy"])
def test_tools_have_one_version(tool: str) -> None:
    """Where pre-commit has its own, it is that of the extra "dev"."""
    pins = {}
    for name in ("pyproject.toml", ".pre-commit-config.yaml"):
        pins[name] = set(re.findall(rf"{tool}==([\d.]+\d)", (ROOT / name).read_text()))
    assert len(pins["pyproject.toml"]) == 1
    assert pins[".pre-commit-config.yaml"] <= pins["pyproject.toml"]
