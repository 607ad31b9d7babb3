"""What all renderers show of a folder: its sections, what is missing, and where it was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from dibit.reproduce.records import Column, Table, table
from dibit.reproduce.sections import COMMAND
from dibit.reproduce.views import SECTION_VIEWS, ReportSection
from dibit.tools.number_format import NONE, listed


class Report(NamedTuple):
    """What all renderers show of a folder; `missing` has the title and the command of sections that were not run."""

    sections: Sequence[ReportSection]
    missing: Sequence[tuple[str, str]]
    dates: str
    dibit: str
    tables: Sequence[Table]


def make_report(contents: dict[str, dict[str, Any]]) -> Report:
    """Return what is shown of section files, by name."""
    sections = [ReportSection(content) for content in contents.values()]
    views = {name: view for name, view in SECTION_VIEWS.items() if name not in contents}
    dates = sorted({section.date for section in sections} - {NONE})
    return Report(
        sections=sections,
        missing=[(view.TITLE, COMMAND.format(section=name)) for name, view in views.items()],
        dates=" to ".join(dict.fromkeys(dates[:1] + dates[-1:])),
        dibit=listed(sorted({section.versions["dibit"] for section in sections if "dibit" in section.versions})),
        tables=[shown for shown in (_runs_table(sections), _versions_table(sections)) if shown.groups],
    )


def _runs_table(sections: Sequence[ReportSection]) -> Table:
    def machine(key: str, title: str = "") -> Column:
        return Column(title or key, lambda section: section.machine.get(key, NONE), numeric=key == "threads")

    columns = [
        Column("section", lambda section: section.title, numeric=False),
        Column("date", lambda section: section.date, numeric=False),
        Column("took", lambda section: section.took),
        Column("finished", lambda section: "yes" if section.finished else "no", numeric=False),
        *(machine("device"), machine("gpu", "GPU"), machine("processor"), machine("threads"), machine("system")),
    ]
    return table("runs", "When and where each section was measured.", columns, [("", sections)])


def _versions_table(sections: Sequence[ReportSection]) -> Table:
    """A column a set of versions: one where all sections ran with the same."""
    sets: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for section in sections:
        if section.versions:
            sets.setdefault(tuple(sorted(section.versions.items())), []).append(section.title)

    def column(versions: tuple[tuple[str, str], ...]) -> Column:
        title = "version" if len(sets) == 1 else listed(sets[versions])
        return Column(title, lambda package: dict(versions).get(package, NONE), numeric=False)

    packages = dict.fromkeys(package for versions in sets for package, _ in versions)
    columns = [Column("package", lambda package: package, numeric=False), *map(column, sets)]
    return table("versions", "Versions of what computed the numbers.", columns, [("", packages)])
