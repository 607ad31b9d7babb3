"""The report of a folder in Markdown, and as a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dibit.reproduce import charts, page
from dibit.reproduce.panels import Figure
from dibit.reproduce.records import Fact
from dibit.reproduce.sections import parse, read
from dibit.reproduce.store import MARKDOWN, PAGE
from dibit.reproduce.views import VIEWS
from dibit.tools.files import write_atomically
from dibit.tools.markdown import Column, Table, bullets, plain, table
from dibit.tools.number_format import NONE, duration

_LEAD = (
    "The measurements of two papers on training graph neural networks with compressed activations, repeated. The "
    "papers’ numbers stand beside ours."
)
_UNFINISHED = "> This run was cut or still goes on: what is here is a part of the whole."
_SOURCES = """\
## Sources

- EXACT: Z. Liu and others, “EXACT: Scalable Graph Neural Networks Training via Extreme Activation Compression”,
  ICLR 2022.
- i-EXACT: S. Eliassen and R. Selvan, “Activation Compression of Graph Neural Networks using Block-wise Quantization
  with Improved Variance Minimization”, [arXiv:2309.11856](https://arxiv.org/abs/2309.11856). The authors’ log: the
  public result log beside their code.
- Fitted levels: R. Ben-Basat and others, 2024, optimal adaptive stochastic quantisation by dynamic programming.
- Units: MB is 2²⁰ bytes. Closed form: the bytes that follow from the shapes and the papers’ recipe. Numbers marked †
  are remembered and not confirmed.

Made by `dibit reproduce` from the JSON files beside this report. Each figure also lies in `figures/`.
"""


class ReportSection:
    """A section as it is shown everywhere, in Markdown.

    Args:
        content: What its file holds.

    Raises:
        UserError: it holds something else.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        self.name: str = content["section"]
        held, view = parse(content, self.name), VIEWS[self.name]
        self.title, self.claim, self.state = view.TITLE, plain(view.CLAIM), "" if held.finished else _UNFINISHED
        records = list(view.records(held.results))
        facts = [record for record in records if isinstance(record, Fact)]
        self.facts = bullets(f"{plain(f.label)}: **{plain(f.value)}** ({plain(f.detail)})" for f in facts)
        self.figures = [record for record in records if isinstance(record, Figure) and record.panels]
        self.tables = [record for record in records if isinstance(record, Table)] or [Table("No results yet.")]
        texts = (record for record in records if isinstance(record, str) and not isinstance(record, Table))
        self.sentences = bullets(map(plain, texts))
        settings = dict(held.settings or {})
        settings.pop("root", None)  # of files their names: folders are the machine's own
        if isinstance(settings.get("datasets"), list):
            settings["datasets"] = [Path(str(name)).name for name in settings["datasets"]]
        self.command = _command(self.name) + " --full" * bool(settings.pop("full", False))
        self.took = duration(held.seconds)
        run = {"date": held.date, "took": self.took, "finished": "yes" if held.finished else "no", **settings}
        self.run = dict(_written(run | (held.machine or {}) | (held.versions or {})))

    def written(self) -> Iterator[str]:
        """All of it but the facts."""
        yield from (f"## {self.title}", self.state, self.claim, self.sentences)
        for figure in self.figures:
            yield f"![{plain(figure.alt)}](figures/{figure.name}.svg)\n{plain(figure.caption)}"
        yield from self.tables
        yield f"`{self.command}`"


def _command(section: str) -> str:
    return f"dibit reproduce {section} --out DIR"


def _written(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values as text, those that are there."""
    texts = {key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in values.items()}
    return [(key.replace("_", " "), str(text)) for key, text in texts.items() if text not in (None, "")]


def document(contents: dict[str, dict[str, Any]], sections: list[ReportSection]) -> str:
    """Write a report in Markdown; its figures are the files in ``figures/``."""
    blocks = ["# Dibit reproduces EXACT and i-EXACT", _LEAD, "## Summary"]
    for section in sections:
        blocks += [f"### {section.title}", section.facts] if section.facts else []
    missing = [f"{view.TITLE}: `{_command(name)}`" for name, view in VIEWS.items() if name not in contents]
    blocks += [] if sections else ["Nothing has been measured yet."]
    blocks += ["Not run yet:", bullets(missing)] if missing else []
    for section in sections:
        blocks += section.written()
    if sections:
        rows = dict.fromkeys(key for section in sections for key in section.run)
        columns: list[Column] = [("", lambda key: key), *map(_run_column, sections)]
        shown = table("When, where and with what each section was measured.", columns, [("", rows)])
        blocks += ["## Machine and versions", shown]
    return "\n\n".join(filter(None, [*blocks, _SOURCES]))


def _run_column(section: ReportSection) -> Column:
    return section.title, lambda key: section.run.get(key, NONE)


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
    contents = read(folder)
    sections = [ReportSection(content) for content in contents.values()]
    figures = {f"figures/{figure.name}.svg": figure for section in sections for figure in section.figures}
    drawn = {name: charts.draw(figure) for name, figure in figures.items()}
    files = {folder / name: charts.file(figures[name], svg) for name, svg in drawn.items()}
    text = document(contents, sections)
    files |= {folder / MARKDOWN: text.encode(), folder / PAGE: page.html(text, drawn).encode()}
    for file, content in files.items():
        note(file)
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, content)
    return folder / PAGE
