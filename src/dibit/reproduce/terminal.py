"""A section's results in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from dibit.reproduce.records import UNFINISHED, Cell, Table
from dibit.reproduce.views import SECTION_VIEWS, ReportSection
from dibit.tools.errors import UserError, require


def print_section(content: dict[str, Any]) -> None:
    """Print a section's results on stdout: the facts, what the section says in words, and its tables.

    Args:
        content: What the section's file holds (`dibit.reproduce.schema`).

    Raises:
        UserError: it holds something else.
    """
    name = content.get("section", "") if isinstance(content, dict) else ""
    if name not in SECTION_VIEWS:
        raise UserError(f"There is no section {name!r}; there are {', '.join(SECTION_VIEWS)}.")
    section = ReportSection(content)
    text, console = require("rich.text", "study").Text, require("rich.console", "study").Console
    out = console(width=None if sys.stdout.isatty() else 200, highlight=False)
    out.print(text(f"{section.title} ({section.took})", style="bold"))
    if not section.finished:
        out.print(text(UNFINISHED, style="yellow"))
    if not section.tables:
        out.print("No results yet.")
    for line in (*(f"{f.label}: {f.value} ({f.detail})" for f in section.facts), *section.sentences):
        out.print(text(f"  {line}"))
    for shown in section.tables:
        out.print()
        out.print(text(shown.caption, style="bold"))
        for part in _parts(shown, out.width):
            out.print(part)
        for note in shown.notes:
            out.print(text(note, style="dim"))


def _parts(shown: Table, width: int) -> Iterator[Any]:
    """A table a group with its name above: in rich no cell goes over several columns."""
    text, boxes = require("rich.text", "study").Text, require("rich.box", "study")
    styles = {"": "", "paper": "cyan", "remembered": "italic dim"}
    written = [[cell.written for cell in row] for _, rows in shown.groups for row in rows]
    widths = [max(map(len, column)) for column in zip(shown.titles, *written, strict=True)]
    fits = sum(widths) + 2 * len(widths) <= width  # else rich has to break the lines of cells

    def drawn(rows: Sequence[Sequence[Cell]], header: bool) -> Any:
        table = require("rich.table", "study").Table(
            box=boxes.SIMPLE_HEAD, show_header=header, show_edge=False, pad_edge=False
        )
        for title, numeric, least in zip(shown.titles, shown.numeric, widths, strict=True):
            justify = "right" if numeric else "left"
            table.add_column(
                text(title), justify=justify, no_wrap=fits, min_width=least if fits else None, overflow="fold"
            )
        for row in rows:
            table.add_row(
                *(text(cell.written, style="bold" if cell.strong else styles.get(cell.mark, "")) for cell in row)
            )
        return table

    if not any(title for title, _ in shown.groups):
        yield from (drawn(rows, True) for _, rows in shown.groups)
        return
    yield drawn([], True)
    for title, rows in shown.groups:
        yield text(title, style="bold italic")
        yield drawn(rows, False)
