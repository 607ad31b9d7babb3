"""Tables and lists in Markdown, and Markdown in the terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dibit.tools.errors import require
from dibit.tools.number_format import NONE

Column = tuple[str, Callable[[Any], str]]  # its heading, and what it has of a row


class Marked(str):
    """Markdown, where any other text is shown as it is."""


class Table(str):
    """A table in Markdown, with its caption and its notes; `table` makes one."""


def plain(text: str) -> str:
    """Return a text as Markdown that shows it as it is: names may hold markup."""
    if isinstance(text, Marked):
        return text
    return re.sub(r"([\\`*{}\[\]<>#|$~&]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def strong(text: str) -> str:
    """Make a text stand out."""
    return text if text in ("", NONE) else Marked(f"**{plain(text)}**")


def bullets(items: Iterable[str]) -> str:
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
    return Table("\n\n".join([f"**{plain(caption)}**", text, *map(plain, notes)]))


def show(blocks: Iterable[str], width: int, extra: str = "train") -> None:
    """Print Markdown on stdout, `width` wide where that is no terminal."""
    rich = require("rich.markdown", extra)

    class Entry(rich.TableDataElement):  # type: ignore[misc, name-defined]
        """An entry that breaks where it would be cut."""

        def __init__(self, justify: Any) -> None:
            super().__init__(justify)
            self.content.overflow = "fold"

    class Markdown(rich.Markdown):  # type: ignore[misc, name-defined]
        elements = rich.Markdown.elements | {"td_open": Entry, "th_open": Entry}

    console = require("rich.console", extra).Console(width=None if sys.stdout.isatty() else width)
    console.print(Markdown("\n\n".join(blocks)))
