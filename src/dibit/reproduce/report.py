"""The page: one HTML file that holds everything and asks the network for nothing."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dibit.reproduce.sections import COMMAND, SECTIONS, read
from dibit.reproduce.show import SHOW
from dibit.reproduce.store import PAGE
from dibit.reproduce.tables import Column, Fact, Table, table
from dibit.tools import number_format as words
from dibit.tools.errors import require
from dibit.tools.figures import Picture
from dibit.tools.files import write_atomically

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Part:
    """A section of the page."""

    name: str
    title: str
    claim: str
    sentences: Sequence[str]
    facts: Sequence[Fact]
    pictures: Sequence[Picture]
    tables: Sequence[Table]
    finished: bool
    full: bool
    took: str
    date: str
    command: str
    settings: Sequence[tuple[str, str]]


def render(folder: Path, note: Callable[[Path], None] = lambda file: None) -> Path:
    """Write ``report.html`` and ``figures/NAME.svg`` from the section files that exist in a folder.

    The same files give the same bytes. A section that is missing is named with the command that runs it, one
    that is not finished is shown as far as it is.

    Args:
        folder: Where `dibit reproduce` wrote its JSON files.
        note: Called with each file that is written, before it is.

    Returns:
        The path of the page.

    Raises:
        UserError: the folder or a file in it cannot be used, or a package of the extra "study" is missing.
    """
    sections = read(folder)
    parts = [_part(section) for section in sections.values()]
    page = _page(parts, sections).encode()

    figures = folder / "figures"
    for part in parts:
        for picture in part.pictures:
            file = figures / f"{picture.name}.svg"
            note(file)
            figures.mkdir(exist_ok=True)
            write_atomically(file, picture.wide)
    note(folder / PAGE)
    write_atomically(folder / PAGE, page)
    return folder / PAGE


def _page(parts: Sequence[Part], sections: dict[str, dict[str, Any]]) -> str:
    jinja2 = require("jinja2", "study")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode("ascii")
    dates = sorted({part.date for part in parts if part.date})
    return environment.get_template("report.html.j2").render(
        parts=parts,
        missing=[(SHOW[name].TITLE, COMMAND.format(section=name)) for name in SECTIONS if name not in sections],
        dates=" to ".join(dict.fromkeys(dates[:1] + dates[-1:])),
        dibit=words.listed(sorted({s["versions"]["dibit"] for s in sections.values() if "dibit" in _versions(s)})),
        runs=_runs_table(sections),
        versions=_versions_table(sections),
        numbering={"figure": 0, "table": 0},
    )


def _part(section: dict[str, Any]) -> Part:
    name, results, settings = section["section"], section["results"], section.get("settings") or {}
    show, full = SHOW[name], bool(settings.get("full"))
    return Part(
        name=name,
        title=show.TITLE,
        claim=show.CLAIM,
        sentences=show.sentences(results),
        facts=show.facts(results),
        pictures=show.pictures(results),
        tables=show.tables(results),
        finished=section["finished"],
        full=full,
        took=words.duration(section.get("seconds")),
        date=section.get("date") or "",
        command=COMMAND.format(section=name) + (" --full" if full else ""),
        settings=_settings(settings),
    )


def _settings(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """What a reader may want to know; of files their names, for folders are the machine's own."""
    shown = {key: value for key, value in settings.items() if key not in ("full", "root")}
    if isinstance(shown.get("datasets"), list):
        shown["datasets"] = [Path(str(name)).name for name in shown["datasets"]]
    written = [(key.replace("_", " "), _setting(value)) for key, value in shown.items()]
    return [(key, value) for key, value in written if value != words.NONE]


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_setting, value)) or words.NONE
    return words.NONE if value is None else str(value)


def _versions(section: dict[str, Any]) -> dict[str, str]:
    return section.get("versions") or {}


def _runs_table(sections: dict[str, dict[str, Any]]) -> Table:
    rows = []
    for name, section in sections.items():
        machine = section.get("machine") or {}
        keys = ("device", "gpu", "processor", "threads", "system")
        rows.append(
            [
                SHOW[name].TITLE,
                section.get("date") or words.NONE,
                words.duration(section.get("seconds")),
                "yes" if section["finished"] else "no",
                *(_setting(machine.get(key)) for key in keys),
            ]
        )
    titles = ("section", "date", "took", "finished", "device", "GPU", "processor", "threads", "system")
    columns = [Column(title, title in ("took", "threads")) for title in titles]
    return table("runs", "When and where each section was measured.", columns, [("", rows)])


def _versions_table(sections: dict[str, dict[str, Any]]) -> Table:
    """A column a set of versions: one where all sections ran with the same."""
    sets: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for name, section in sections.items():
        if _versions(section):
            sets.setdefault(tuple(sorted(_versions(section).items())), []).append(SHOW[name].TITLE)
    packages = list(dict.fromkeys(package for versions in sets for package, _ in versions))
    headings = ["version"] if len(sets) == 1 else [words.listed(names) for names in sets.values()]
    rows = [[package, *(dict(versions).get(package, words.NONE) for versions in sets)] for package in packages]
    columns = [Column("package", numeric=False), *(Column(heading, numeric=False) for heading in headings)]
    return table("versions", "Versions of what computed the numbers.", columns, [("", rows)])
