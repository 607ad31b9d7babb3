"""What each section shows: a module a section, each with the same three names.

TITLE: its heading. CLAIM: what the papers claim. `records(results)`: the facts of the summary, sentences on what was
found, tables and figures (`dibit.reproduce.records`).
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from dibit.reproduce.panels import Figure
from dibit.reproduce.records import Fact, Table
from dibit.reproduce.sections import COMMAND, parse
from dibit.reproduce.views import accuracy, blocks, distribution, memory, tuned, variance
from dibit.tools.number_format import NONE, duration

SECTION_VIEWS: dict[str, ModuleType] = {
    "memory": memory,
    "blocks": blocks,
    "variance": variance,
    "distribution": distribution,
    "accuracy": accuracy,
    "tuned": tuned,
}


class ReportSection:
    """A section as all renderers show it.

    Args:
        content: What its file holds.

    Raises:
        UserError: it holds something else.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        self.name: str = content["section"]
        held, view = parse(content, self.name), SECTION_VIEWS[self.name]
        self.title, self.claim = view.TITLE, view.CLAIM
        records = list(view.records(held.results))
        self.facts = [record for record in records if isinstance(record, Fact)]
        self.sentences = [record for record in records if isinstance(record, str)]
        self.figures = [record for record in records if isinstance(record, Figure)]
        self.tables = [record for record in records if isinstance(record, Table)]
        settings = held.settings or {}
        self.finished, self.full = held.finished, bool(settings.get("full"))
        self.command = COMMAND.format(section=self.name) + (" --full" if self.full else "")
        self.date, self.took = held.date or NONE, duration(held.seconds)
        self.settings = [("took", self.took), *_settings(settings)]
        self.machine = {key: _written(value) for key, value in (held.machine or {}).items()}
        self.versions = held.versions or {}


def _settings(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """What a reader may want to know; of files their names, for folders are the machine's own."""
    shown = {key: value for key, value in settings.items() if key not in ("full", "root")}
    if isinstance(shown.get("datasets"), list):
        shown["datasets"] = [Path(str(name)).name for name in shown["datasets"]]
    written = [(key.replace("_", " "), _written(value)) for key, value in shown.items()]
    return [(key, value) for key, value in written if value != NONE]


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_written, value)) or NONE
    return NONE if value is None else str(value)
