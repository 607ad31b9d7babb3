"""report.md: the same numbers as on the page, and texts that hold markup are shown as they are."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from dibit.reproduce.report import ReportSection, render
from dibit.reproduce.sections import SECTIONS
from tests.reproduce.examples import all_sections, section

markdown_it = pytest.importorskip("markdown_it")  # comes with rich


def _shown(folder: Path, sections: dict[str, Any]) -> tuple[str, str]:
    """report.md, and what a reader of Markdown makes of it, as HTML."""
    folder.mkdir()
    for name, content in sections.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    text = (render(folder).parent / "report.md").read_text()
    return text, markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render(text)


def _texts(rendered: str) -> set[str]:
    plain = (html.unescape(re.sub("<[^>]*>", "", cell)) for cell in re.findall("<(?:t[dh]|li|p)[^>]*>.*?</", rendered))
    return {text.removesuffix("</").strip() for text in plain}


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.slow
def test_every_number_of_the_section(name: str, tmp_path: Path) -> None:
    content = all_sections()[name]
    text, rendered = _shown(tmp_path / "x", {name: content})
    shown = ReportSection(content)
    assert all(part in text for part in (shown.claim, shown.facts, shown.sentences, *shown.tables))
    assert re.findall(r"\]\((figures[^)]*)\)", text) == [f"figures/{figure.name}.svg" for figure in shown.figures]
    assert all((tmp_path / "x" / "figures" / f"{figure.name}.svg").is_file() for figure in shown.figures)
    assert rendered.count("<table>") == len(shown.tables) + 1  # the machine and the versions
    assert f"`{shown.command}`" in text
    page = _texts((tmp_path / "x" / "report.html").read_text())
    assert {text for text in _texts(rendered) if not text.startswith("<img")} <= page


def test_what_was_not_run_and_what_was_cut(tmp_path: Path) -> None:
    _, rendered = _shown(tmp_path / "x", {"accuracy": section("accuracy", {"rows": []}, finished=False)})
    assert "This run was cut or still goes on" in rendered
    assert rendered.count("--out DIR</code>") == len(SECTIONS)


def test_markup_in_names_is_text(tmp_path: Path) -> None:
    evil = "a|b *c* _d_ `e` [f](g) <script>h</script> & # $i$ \\ ~~j~~ ![k](l)"
    accuracy = all_sections()["accuracy"]
    for row in accuracy["results"]["rows"]:
        row["graph"] = row["recipe"] = evil
    _, rendered = _shown(tmp_path / "x", {"accuracy": accuracy})
    assert "<script" not in rendered
    assert evil in _texts(rendered)
    assert {f"{evil}, {model}, 3 × 128, 60 epochs" for model in ("sage", "gcn", "gat")} <= _texts(rendered)
