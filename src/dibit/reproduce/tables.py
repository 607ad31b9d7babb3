"""Tables: one description of each, written as HTML by the report and by rich in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dibit.tools.number_format import NONE

REMEMBERED = "† Remembered, not confirmed: this number could not be checked against its source; do not quote it."


class Cell(NamedTuple):
    """A cell: its text, whose number it is ("paper", "remembered" or "" for ours), and whether it stands out."""

    text: str
    mark: str = ""
    strong: bool = False


class Column(NamedTuple):
    """A column's heading, and whether it holds numbers (set right)."""

    title: str
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """A table of the page and the terminal; `table` makes one.

    Args:
        name: Its id without "tab-".
        caption: What it shows, with the units.
        columns: The first one heads the rows.
        groups: (title, rows) in order; a table of one group without a title has plain rows.
        notes: Sentences below.
        fold: Where not empty, the page shows the table only when this line is opened.
    """

    name: str
    caption: str
    columns: Sequence[Column]
    groups: Sequence[tuple[str, Sequence[Sequence[Cell]]]]
    notes: Sequence[str]
    fold: str


@dataclass(frozen=True)
class Fact:
    """A result of the summary: what it is, the number, and what the papers have beside it."""

    label: str
    value: str
    detail: str


def theirs(text: str) -> Cell:
    """Return a cell with a paper's number."""
    return Cell(text, "" if text == NONE else "paper")


def table(
    name: str,
    caption: str,
    columns: Sequence[Column],
    groups: Iterable[tuple[str, Iterable[Sequence[Cell | str]]]],
    notes: Sequence[str] = (),
    fold: str = "",
) -> Table:
    """Make a table (see `Table`) of cells and texts; columns and groups that hold nothing are left out."""
    cells = [(title, [[c if isinstance(c, Cell) else Cell(c) for c in row] for row in rows]) for title, rows in groups]
    cells = [(title, rows) for title, rows in cells if rows]
    every = [row for _, rows in cells for row in rows]
    keep = [i for i in range(len(columns)) if i == 0 or any(row[i].text != NONE for row in every)]
    if any(cell.mark == "remembered" for row in every for cell in row):
        notes = [*notes, REMEMBERED]
    kept = [(title, [[row[i] for i in keep] for row in rows]) for title, rows in cells]
    return Table(name, caption, [columns[i] for i in keep], kept, notes, fold)
