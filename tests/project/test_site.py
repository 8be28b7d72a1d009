"""What the site makes of links and docstrings, and what it refuses; ``make docs`` builds all of it."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.processes import ROOT

import tsbn_kernels

pytest.importorskip("mkdocs", reason="the extra 'docs' needs Python 3.11")
site: Any = importlib.import_module("tools.site")


AS_THEY_ARE = "[a](https://arxiv.org/abs/2512.20420) [b](#use) `c[d](x)`\n```python\nc[d](x)\n```"


@pytest.mark.parametrize(
    ("page", "text", "expected"),
    [
        ("index.md", "[a](docs/tutorial.md)", "[a](tutorial.md)"),
        ("index.md", "[a](CONTRIBUTING.md#rules)", "[a](contributing.md#rules)"),
        ("index.md", AS_THEY_ARE, AS_THEY_ARE),
        ("tutorial.md", "[a](../examples/quickstart.py)", "[a](examples.md)"),
        ("triton.md", "[`a.csv`](../tools/compile_gate/compiled_kernels.csv)", "`a.csv`"),
        ("ptxvm.md", "[a](../../README.md)", "[a](index.md)"),
        ("performance.md", "![a](celeba40.png)", "![a](celeba40.png)"),
        ("api/layers.md", "[a](../limits.md)", "[a](../limits.md)"),
    ],
)
def test_links_lead_to_pages(page: str, text: str, expected: str) -> None:
    assert site.with_links_to_pages(text, page) == expected


def test_a_link_that_leads_nowhere_is_an_error() -> None:
    with pytest.raises(
        site.PluginError, match=r"CONTRIBUTING.md: the link to docs/missing.md leads to docs/missing.md"
    ):
        site.with_links_to_pages("[a](docs/missing.md)", "contributing.md")


@pytest.mark.parametrize(
    ("content", "refused"),
    [
        ('<script src="https://unpkg.com/mermaid"></script>', True),
        ('<link rel="stylesheet" href="//fonts.googleapis.com/css">', True),
        ('<img alt="a" src=http://example.org/a.png>', True),
        ("@font-face { src: url(https://example.org/a.woff2) }", True),
        ('<a href="https://arxiv.org/abs/2512.20420">a</a> <img src="celeba40.png"> url(data:image/svg+xml)', False),
    ],
)
def test_a_page_asks_no_other_host(tmp_path: Path, content: str, refused: bool) -> None:
    (tmp_path / "page.html").write_text(content)
    config = SimpleNamespace(site_dir=str(tmp_path))
    if refused:
        with pytest.raises(site.PluginError, match="takes something from another host"):
            site.on_post_build(config)
    else:
        site.on_post_build(config)


def test_docstrings_become_markdown() -> None:
    docstring = "As :func:`~a.b`::\n\n    x\n\nArgs:\n    device, dtype: of the\n        parameters.\n    eps: added."
    assert site.as_markdown(docstring, lambda name: f"<{name}>") == (
        "As <a.b>:\n\n    x\n\nArgs:\n    device: of the\n        parameters.\n"
        "    dtype: of the\n        parameters.\n    eps: added."
    )


def test_every_public_name_has_its_place() -> None:
    reference = "\n".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    listed = set(re.findall(r"^::: tsbn_kernels\.([\w.]+)", reference, re.MULTILINE))
    public = {*tsbn_kernels.__all__, "functional.task_batch_norm", "functional.task_streams"} - {"functional"}
    assert public <= listed
