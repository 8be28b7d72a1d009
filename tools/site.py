"""What the documentation site does beyond MkDocs: pages from outside of docs/, links, docstrings, and a last check.

All documents are written to be read in the repository: their links name its files. The site turns a link to a file that
has a page into a link to that page, and leaves the text alone of one to any other file.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

from griffe import Class, Docstring, Extension, NameResolutionError, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
DOCS = "docs/"
PAGES = {  # files outside of docs/, and the pages that they are
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "tools/ptxvm/README.md": "ptxvm.md",
    "examples/quickstart.py": "examples.md",
    "examples/train_distributed.py": "examples.md",
}
_FILES = {page: file for file, page in PAGES.items() if file.endswith(".md")}

_CODE_OR_LINK = re.compile(r"```.*?```|`[^`\n]*`|(!?)\[([^]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)", re.DOTALL)
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([\w.]+)`")
_JOINED = re.compile(r"^( +)((?:\w+, )+\w+): (.*(?:\n\1 +.*)*)", re.MULTILINE)  # "device, dtype: of the parameters"
# What a browser fetches by itself: not <a href>, which a reader follows.
_FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//|<link\b[^>]*\bhref=["']?(?:https?:)?//"""
    r"""|url\(["']?(?:https?:)?//|@import\s+["'](?:https?:)?//"""
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages whose files are not in docs/."""
    for page, file in _FILES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / file)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turns links to files into links to pages."""
    return with_links_to_pages(markdown, page.file.src_uri)


def with_links_to_pages(markdown: str, page: str) -> str:
    """A page's text with its links as the site wants them.

    Raises:
        PluginError: a link names a file that does not exist.
    """
    file = _FILES.get(page, DOCS + page)

    def replaced(found: re.Match[str]) -> str:
        image, text, link, anchor = found.groups()
        if link is None:  # code
            return found[0]
        target = normpath(join(dirname(file), link))
        if not (ROOT / target).exists():
            raise PluginError(f"{file}: the link to {link} leads to {target}, which does not exist")
        if target not in PAGES and not target.startswith(DOCS):
            return str(text)
        site_path = PAGES.get(target, target.removeprefix(DOCS))
        return f"{image}[{text}]({relpath(site_path, dirname(page) or '.')}{anchor or ''})"

    return _CODE_OR_LINK.sub(replaced, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Fails where a page makes the browser ask another host."""
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix in (".html", ".css") and (found := fetched_from_elsewhere(path.read_text())):
            raise PluginError(f"{path}: takes something from another host: {found}")


def fetched_from_elsewhere(page: str) -> str | None:
    """The first thing that a browser would fetch from another host for a page or a style sheet."""
    found = _FETCHED.search(page)
    return found and page[found.start() : found.end() + 40]


class Docstrings(Extension):
    """Reads docstrings as they are when the package runs, and makes Markdown of them that tools understand."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Takes a class's docstring from the class itself where the source has none that can be read."""
        if isinstance(obj, Class) and obj.docstring is None and "__doc__" in obj.members:
            text = getattr(importlib.import_module(obj.module.path), obj.name).__doc__
            obj.docstring = Docstring(inspect.cleandoc(text), lineno=obj.lineno, parent=obj)
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value, partial(_reference, obj))


def as_markdown(docstring: str, reference: Callable[[str], str]) -> str:
    """A docstring without Sphinx's roles and literal blocks, and with an entry of its own for each argument."""
    text = _ROLE.sub(lambda role: reference(role[1]), docstring)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    return _JOINED.sub(lambda entry: "\n".join(f"{entry[1]}{name}: {entry[3]}" for name in entry[2].split(", ")), text)


def _reference(obj: Object, name: str) -> str:
    """A link to what a docstring names, if that has a place in the site."""
    first, *others = name.split(".")
    path = name
    if first != "tsbn_kernels":
        with suppress(NameResolutionError):
            path = ".".join((obj.resolve(first), *others))
    return f'<autoref identifier="{path}" optional><code>{name.removeprefix("tsbn_kernels.")}</code></autoref>'
