"""A section's results in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from dibit.reproduce.sections import check
from dibit.reproduce.show import SHOW
from dibit.reproduce.tables import Cell, Table
from dibit.tools.errors import UserError, require
from dibit.tools.number_format import duration


def print_section(section: dict[str, Any]) -> None:
    """Print a section's results on stdout: the facts, what the section says in words, and its tables.

    Args:
        section: What the section's file holds (`dibit.reproduce.sections`).

    Raises:
        UserError: it holds something else.
    """
    name = section.get("section", "") if isinstance(section, dict) else ""
    if name not in SHOW:
        raise UserError(f"There is no section {name!r}; there are {', '.join(SHOW)}.")
    check(section, name)
    show, results = SHOW[name], section["results"]
    texts, consoles = require("rich.text", "study"), require("rich.console", "study")
    console = consoles.Console(width=None if sys.stdout.isatty() else 200, highlight=False)

    heading = f"{show.TITLE} ({duration(section.get('seconds'))})"
    console.print(texts.Text(heading, style="bold"))
    if not section["finished"]:
        console.print(texts.Text("The run was cut or goes on: this is a part of the whole.", style="yellow"))
    shown = show.tables(results)
    if not shown:
        console.print("No results yet.")
    for fact in show.facts(results):
        console.print(texts.Text(f"  {fact.label}: {fact.value} ({fact.detail})"))
    for sentence in show.sentences(results):
        console.print(texts.Text(f"  {sentence}"))
    for each in shown:
        console.print()
        for part in _parts(each, console.width):
            console.print(part)
        for note in each.notes:
            console.print(texts.Text(note, style="dim"))


def _parts(shown: Table, width: int) -> Iterator[Any]:
    """The caption, then a table a group with its name above: in rich no cell goes over several columns."""
    texts, boxes = require("rich.text", "study").Text, require("rich.box", "study")
    styles = {"": "", "paper": "cyan", "remembered": "italic dim"}
    written = [[_written(cell) for cell in row] for _, rows in shown.groups for row in rows]
    columns = list(zip([column.title for column in shown.columns], *written, strict=True))
    widths = [max(map(len, column)) for column in columns]
    fits = sum(widths) + 2 * len(widths) <= width  # else rich has to break the lines of cells

    def drawn(rows: Sequence[Sequence[Cell]], header: bool) -> Any:
        table = require("rich.table", "study").Table(
            box=boxes.SIMPLE_HEAD, show_header=header, show_edge=False, pad_edge=False
        )
        for column, least in zip(shown.columns, widths, strict=True):
            justify = "right" if column.numeric else "left"
            table.add_column(
                texts(column.title), justify=justify, no_wrap=fits, min_width=least if fits else None, overflow="fold"
            )
        for row in rows:
            table.add_row(*(texts(_written(c), style="bold" if c.strong else styles[c.mark]) for c in row))
        return table

    yield texts(shown.caption, style="bold")
    if not any(title for title, _ in shown.groups):
        yield from (drawn(rows, True) for _, rows in shown.groups)
        return
    yield drawn([], True)
    for title, rows in shown.groups:
        yield texts(title, style="bold italic")
        yield drawn(rows, False)


def _written(cell: Cell) -> str:
    return f"{cell.text} †" if cell.mark == "remembered" else cell.text
