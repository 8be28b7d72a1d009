"""What must be said once: the version, and the pins of the tools."""

from __future__ import annotations

import re

import pytest
from support.processes import ROOT

import tsbn_kernels

VERSIONED = ("pyproject.toml", "setup.py", "mkdocs.yml", "CITATION.cff", "README.md", "tools/site.py")


def test_the_version_stands_in_one_place() -> None:
    sources = [*map(ROOT.joinpath, VERSIONED), *(ROOT / "tsbn_kernels").rglob("*.py")]
    version = re.compile(rf"(?<![\d.]){re.escape(tsbn_kernels.__version__)}(?![\d.])")
    found = [str(path.relative_to(ROOT)) for path in sources for _ in version.findall(path.read_text())]
    assert found == ["tsbn_kernels/__init__.py"]


@pytest.mark.parametrize("tool", ["ruff", "mypy"])
def test_tools_have_one_version(tool: str) -> None:
    """Where pre-commit has its own, it is that of the extra "dev"."""
    pins = {}
    for name in ("pyproject.toml", ".pre-commit-config.yaml"):
        pins[name] = set(re.findall(rf"{tool}==([\d.]+\d)", (ROOT / name).read_text()))
    assert len(pins["pyproject.toml"]) == 1
    assert pins[".pre-commit-config.yaml"] <= pins["pyproject.toml"]
