"""What a section shows: facts, sentences and figures as records, and tables in Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from dibit.reproduce.panels import Figure
from dibit.tools.number_format import NONE

REMEMBERED = "† Remembered, not confirmed: this number could not be checked against its source; do not quote it."


class Fact(NamedTuple):
    """A result of the summary: what it is, the number, and what the papers have beside it."""

    label: str
    value: str
    detail: str


class Marked(str):
    """Markdown, where any other text is shown as it is."""


class Table(str):
    """A table in Markdown, with its caption and its notes; `table` makes one."""


Record = Fact | str | Table | Figure  # a text that is no table is a sentence on what was found
Column = tuple[str, Callable[[Any], str]]  # its heading, and what it has of a row
SETTING: Column = ("setting", lambda row: row.setting)


def plain(text: str) -> str:
    """Return a text as Markdown that shows it as it is: names may hold markup."""
    if isinstance(text, Marked):
        return text
    return re.sub(r"([\\`*{}\[\]<>#|$~&!]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def strong(text: str) -> str:
    """Make a text stand out."""
    return text if text in ("", NONE) else Marked(f"**{plain(text)}**")


def paper(text: str, mark: str | None = None) -> str:
    """Mark a paper's number, one that is "remembered" with a dagger."""
    return text if text in ("", NONE) else Marked(f"*{plain(text)}{' †' if mark == 'remembered' else ''}*")


def listed(items: Iterable[str]) -> str:
    """Write a list of what is already Markdown."""
    return "\n".join(f"- {item}" for item in items)


def table(
    caption: str, columns: Iterable[Column], groups: Iterable[tuple[str, Iterable[Any]]], notes: Sequence[str] = ()
) -> Table:
    """Write a table; columns and groups that hold nothing are left out.

    Args:
        caption: What it shows, with the units.
        columns: The first one heads the rows.
        groups: (title, rows) in order.
        notes: Sentences below.
    """
    titles, values = zip(*columns, strict=True)
    found = [(title, [[plain(value(row)) for value in values] for row in rows]) for title, rows in groups]
    every = [row for _, rows in found for row in rows]
    kept = [i for i in range(len(titles)) if i == 0 or any(row[i] != NONE for row in every)]
    words = [any(row[i][:1].isalpha() for row in every) for i in kept]
    lines = [[plain(titles[i]) for i in kept], ["---" if left else "---:" for left in words]]
    for title, rows in found:
        lines += [[f"**{plain(title)}**", *[""] * (len(kept) - 1)]] if title and rows else []
        lines += [[row[i] for i in kept] for row in rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    more = [REMEMBERED] if "†" in text else []
    return Table("\n\n".join([f"**{plain(caption)}**", text, *map(plain, notes), *more]))
