"""A section's results in the terminal."""

from __future__ import annotations

import sys
from typing import Any

from dibit.reproduce.report import ReportSection
from dibit.reproduce.views import VIEWS
from dibit.tools.errors import UserError, require


def print_section(content: dict[str, Any]) -> None:
    """Print a section's results on stdout: what was found, and its tables.

    Args:
        content: What the section's file holds (`dibit.reproduce.schema`).

    Raises:
        UserError: it holds something else.
    """
    name = content.get("section", "") if isinstance(content, dict) else ""
    if name not in VIEWS:
        raise UserError(f"There is no section {name!r}; there are {', '.join(VIEWS)}.")
    section, rich = ReportSection(content), require("rich.markdown", "study")

    class Entry(rich.TableDataElement):  # type: ignore[misc, name-defined]
        """An entry that breaks where it would be cut."""

        def __init__(self, justify: Any) -> None:
            super().__init__(justify)
            self.content.overflow = "fold"

    class Markdown(rich.Markdown):  # type: ignore[misc, name-defined]
        elements = rich.Markdown.elements | {"td_open": Entry, "th_open": Entry}

    out = require("rich.console", "study").Console(width=None if sys.stdout.isatty() else 200)
    title = f"**{section.title} ({section.took})**"
    out.print(Markdown("\n\n".join([title, section.state, section.facts, section.sentences, *section.tables])))
