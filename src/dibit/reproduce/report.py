"""The report of a folder: one HTML file that holds everything and asks the network for nothing, and one of Markdown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dibit.reproduce import charts, markdown
from dibit.reproduce.contents import Report, make_report
from dibit.reproduce.records import UNFINISHED
from dibit.reproduce.sections import read
from dibit.reproduce.store import MARKDOWN, PAGE
from dibit.tools.errors import require
from dibit.tools.files import write_atomically

TEMPLATES = Path(__file__).parent / "templates"


def render(folder: Path, note: Callable[[Path], None] = lambda file: None) -> Path:
    """Write ``report.html``, ``report.md`` and ``figures/NAME.svg`` from the section files that exist in a folder.

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
    report = make_report(read(folder))
    drawings, files = {}, {}
    for figure in (figure for section in report.sections for figure in section.figures):
        drawings[figure.name] = charts.draw(figure)
        files[folder / "figures" / f"{figure.name}.svg"] = charts.sheet(figure, drawings[figure.name])
    files[folder / MARKDOWN] = markdown.document(report).encode()
    files[folder / PAGE] = _page(report, drawings).encode()
    for file, content in files.items():
        note(file)
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, content)
    return folder / PAGE


def _page(report: Report, drawings: dict[str, charts.Drawn]) -> str:
    jinja2 = require("jinja2", "study")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.j2")
    own = {"report": report, "drawings": drawings, "dark": charts.DARK, "unfinished": UNFINISHED}
    return template.render(own, numbering={"figure": 0, "table": 0})
