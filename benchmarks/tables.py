"""The terminal's tables as HTML and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from rich.table import Column, Table
from rich.text import Text


def _line(text: object) -> str:
    """Without line breaks and marks of style."""
    return " ".join((text.plain if isinstance(text, Text) else str(text)).split())


def _columns(table: Table) -> list[Column]:
    """Without those that say nothing."""
    return [column for column in table.columns if any(cell != "-" for cell in column.cells)]


def _rows(table: Table) -> Iterator[list[str]]:
    cells = zip(*(column.cells for column in _columns(table)), strict=True)
    yield from ([_line(cell) for cell in row] for row in cells)


def as_html(table: Table) -> str:
    """A ``<table>`` in a box that scrolls; rows with a style are of class ``marked``."""
    columns = _columns(table)
    numeric = [' class="num"' if column.justify == "right" else "" for column in columns]
    parts = [f'<div class="scroll"><table>\n<caption>{escape(_line(table.title or ""))}</caption>\n<thead><tr>']
    parts += [
        f'<th scope="col"{kind}>{escape(_line(column.header))}</th>'
        for column, kind in zip(columns, numeric, strict=True)
    ]
    parts.append("</tr></thead>\n<tbody>\n")
    section = True
    for row, cells in zip(table.rows, _rows(table), strict=True):
        kinds = " ".join(["first"] * section + ["marked"] * bool(row.style))
        parts.append(f'<tr class="{kinds}">' if kinds else "<tr>")
        parts += [f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(cells, numeric, strict=True)]
        parts.append("</tr>\n")
        section = row.end_section
    parts.append("</tbody>\n</table></div>\n")
    if table.caption:
        parts.append(f'<p class="note">{escape(_line(table.caption))}</p>\n')
    return "".join(parts)


def as_markdown(table: Table) -> str:
    """A table for a README, with its title above."""
    lines = [[_line(column.header) for column in _columns(table)]]
    lines.append(["---:" if column.justify == "right" else "---" for column in _columns(table)])
    lines += _rows(table)
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{_line(table.title or '')}:\n\n{body}\n"
