"""What a section shows: facts, sentences and figures as records, and tables in Markdown."""

from __future__ import annotations

from typing import NamedTuple

from dibit.reproduce.panels import Figure
from dibit.tools.markdown import Column, Marked, Table, plain
from dibit.tools.number_format import NONE

SETTING: Column = ("setting", lambda row: row.setting)


class Fact(NamedTuple):
    """A result of the summary: what it is, the number, and what the papers have beside it."""

    label: str
    value: str
    detail: str


Record = Fact | str | Table | Figure  # a text that is no table is a sentence on what was found


def paper(text: str, mark: str | None = None) -> str:
    """Mark a paper's number, one that is "remembered" with a dagger."""
    return text if text in ("", NONE) else Marked(f"*{plain(text)}{' †' if mark == 'remembered' else ''}*")
