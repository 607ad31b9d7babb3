"""The report as one HTML file that asks the network for nothing, for a phone, dark mode and paper, too."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import Any

from dibit.reproduce.charts import DARK
from dibit.tools.errors import require
from dibit.tools.number_format import slug

_TEMPLATES = Path(__file__).parent / "templates"


def html(text: str, drawn: Mapping[str, str]) -> str:
    """Return the page of a report.

    Args:
        text: The report, in Markdown.
        drawn: SVG of its figures, by the names of their files.
    """
    parser = require("markdown_it", "study").MarkdownIt("commonmark", {"html": False}).enable("table")

    def image(tokens: list[Any], i: int, *_: Any) -> str:
        source, described = tokens[i].attrs["src"], escape(tokens[i].content)
        return f'<span role="img" id="fig-{Path(source).stem}" aria-label="{described}">{drawn[source]}</span>'

    rules = parser.renderer.rules
    rules["image"] = image
    rules["table_open"] = lambda *_: '<div class="scroll" role="region" aria-label="Table" tabindex="0"><table>\n'
    rules["table_close"] = lambda *_: "</table></div>\n"
    tokens = parser.parse(text)
    contents = []
    for token, inside in pairwise(tokens):
        if token.type == "heading_open" and token.tag == "h2":
            token.attrSet("id", slug(inside.content))
            contents.append(f'<li><a href="#{slug(inside.content)}">{escape(inside.content)}</a></li>')
    body = parser.renderer.render(tokens, parser.options, {})
    style = Template((_TEMPLATES / "report.css").read_text()).substitute(dark=DARK)
    page = Template((_TEMPLATES / "report.html").read_text())
    return page.substitute(style=style, contents="\n".join(contents), body=body)
