"""What a section shows, as plain records; the terminal, Markdown and the page have a renderer each for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dibit.reproduce.panels import Figure
from dibit.tools.number_format import NONE

REMEMBERED = "† Remembered, not confirmed: this number could not be checked against its source; do not quote it."
UNFINISHED = "This run was cut or still goes on: what is here is a part of the whole."


class Fact(NamedTuple):
    """A result of the summary: what it is, the number, and what the papers have beside it."""

    label: str
    value: str
    detail: str


class Cell(NamedTuple):
    """A cell: its text, whose number it is ("paper", "remembered" or "" for ours), and whether it stands out."""

    text: str
    mark: str = ""
    strong: bool = False

    @property
    def written(self) -> str:
        """The text, with a dagger where the number could not be checked."""
        return f"{self.text} †" if self.mark == "remembered" else self.text


def paper_cell(text: str) -> Cell:
    """Return a cell with a paper's number."""
    return Cell(text, "" if text == NONE else "paper")


class Column(NamedTuple):
    """A column to be: its heading, what it has of a row, and whether it holds numbers (set right)."""

    title: str
    value: Callable[[Any], Cell | str]
    numeric: bool = True


SETTING = Column("setting", lambda row: row.setting, numeric=False)


@dataclass(frozen=True)
class Table:
    """A table; `table` makes one.

    Attributes:
        name: Its id.
        caption: What it shows, with the units.
        titles: Of the columns; the first one heads the rows.
        numeric: Of each column, whether it holds numbers.
        groups: (title, rows) in order; a table of one group without a title has plain rows.
        notes: Sentences below.
        fold: Where not empty, the page shows the table only when this line is opened.
    """

    name: str
    caption: str
    titles: Sequence[str]
    numeric: Sequence[bool]
    groups: Sequence[tuple[str, Sequence[Sequence[Cell]]]]
    notes: Sequence[str]
    fold: str


def table(
    name: str,
    caption: str,
    columns: Iterable[Column],
    groups: Iterable[tuple[str, Iterable[Any]]],
    notes: Sequence[str] = (),
    fold: str = "",
) -> Table:
    """Make a table (see `Table`) of groups of rows; columns and groups that hold nothing are left out."""
    columns = list(columns)
    filled = []
    for title, rows in groups:
        cells = [[c if isinstance(c := column.value(row), Cell) else Cell(c) for column in columns] for row in rows]
        filled += [(title, cells)] if cells else []
    every = [row for _, rows in filled for row in rows]
    keep = [i for i in range(len(columns)) if i == 0 or any(row[i].text != NONE for row in every)]
    if any(cell.mark == "remembered" for row in every for cell in row):
        notes = [*notes, REMEMBERED]
    kept = [(title, [[row[i] for i in keep] for row in rows]) for title, rows in filled]
    titles, numeric = [columns[i].title for i in keep], [columns[i].numeric for i in keep]
    return Table(name, caption, titles, numeric, kept, notes, fold)


Record = Fact | str | Table | Figure  # a text is a sentence on what was found
