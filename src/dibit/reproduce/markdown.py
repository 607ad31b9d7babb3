"""The report as Markdown, for notes, reviews and version control."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from dibit.reproduce.contents import Report
from dibit.reproduce.records import UNFINISHED, Cell, Table
from dibit.reproduce.views import ReportSection


def document(report: Report) -> str:
    """Write a report as Markdown; its figures are the files in ``figures/``."""
    versions = " ".join(filter(None, (report.dibit and f"dibit {report.dibit}", report.dates)))
    blocks = ["# Dibit reproduces EXACT and i-EXACT", versions]
    for section in report.sections:
        blocks += _section(section)
    if report.missing:
        blocks += ["## Not run yet", _list(f"{title}: `{command}`" for title, command in report.missing)]
    if report.tables:
        blocks.append("## Machine and versions")
    for shown in report.tables:
        blocks += _table(shown)
    return "\n\n".join(filter(None, blocks)) + "\n"


def _section(section: ReportSection) -> Iterator[str]:
    yield f"## {section.title}"
    yield f"> {UNFINISHED}" if not section.finished else ""
    yield _plain(section.claim)
    yield _list(f"{_plain(f.label)}: **{_plain(f.value)}** ({_plain(f.detail)})" for f in section.facts)
    yield _list(map(_plain, section.sentences))
    for figure in section.figures:
        yield f"![{_plain(figure.alt)}](figures/{figure.name}.svg)"
        yield _plain(figure.caption)
    for shown in section.tables:
        yield from _table(shown)
    yield f"`{section.command}` ({', '.join(f'{key} {_plain(value)}' for key, value in section.settings)})"


def _table(shown: Table) -> Iterator[str]:
    yield f"**{_plain(shown.caption)}**"
    lines = [[_plain(title) for title in shown.titles], ["---:" if each else "---" for each in shown.numeric]]
    for title, rows in shown.groups:
        lines += [[f"**{_plain(title)}**", *[""] * (len(shown.titles) - 1)]] if title else []
        lines += [[_cell(cell) for cell in row] for row in rows]
    yield "\n".join(f"| {' | '.join(line)} |" for line in lines)
    yield from map(_plain, shown.notes)


def _cell(cell: Cell) -> str:
    text = _plain(cell.written)
    return f"**{text}**" if cell.strong else text


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _plain(text: str) -> str:
    """Return a text as Markdown that shows it as it is: names may hold markup."""
    return re.sub(r"([\\`*{}\[\]<>#|$~&]|(?<!\w)_|_(?!\w))", r"\\\1", text)
