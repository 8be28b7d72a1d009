"""The terminal's tables as HTML and as Markdown, without the columns that say nothing."""

from __future__ import annotations

from html import escape

from rich.table import Column, Table
from rich.text import Text


def _line(text: object) -> str:
    """A cell's text on one line, without marks of style."""
    return " ".join((text.plain if isinstance(text, Text) else str(text)).split())


def _parts(table: Table) -> tuple[list[Column], list[list[str]]]:
    """The columns with a cell that says something, and the rows of their cells."""
    columns = [column for column in table.columns if any(cell != "-" for cell in column.cells)]
    rows = zip(*(column.cells for column in columns), strict=True)
    return columns, [[_line(cell) for cell in row] for row in rows]


def as_html(table: Table) -> str:
    """A ``<table>`` in a box that scrolls; rows with a style are of class ``marked``."""
    columns, rows = _parts(table)
    kinds = [' class="num"' if column.justify == "right" else "" for column in columns]

    def cells(tag: str, texts: list[str]) -> str:
        return "".join(f"<{tag}{kind}>{escape(text)}</{tag}>" for text, kind in zip(texts, kinds, strict=True))

    marks = [' class="marked"' if row.style else "" for row in table.rows]
    body = "".join(f"<tr{mark}>{cells('td', row)}</tr>\n" for mark, row in zip(marks, rows, strict=True))
    head = cells("th", [_line(column.header) for column in columns])
    note = f'<p class="note">{escape(_line(table.caption))}</p>\n' if table.caption else ""
    return (
        f'<div class="scroll"><table>\n<caption>{escape(_line(table.title or ""))}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>\n{note}"
    )


def as_markdown(table: Table) -> str:
    """A table for a README, with its title above."""
    columns, rows = _parts(table)
    rules = ["---:" if column.justify == "right" else "---" for column in columns]
    lines = [[_line(column.header) for column in columns], rules, *rows]
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{_line(table.title or '')}:\n\n{body}\n"
