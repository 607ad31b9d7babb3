"""A section's results in the terminal."""

from __future__ import annotations

from typing import Any

from dibit.reproduce.report import ReportSection
from dibit.reproduce.views import VIEWS
from dibit.tools.errors import UserError
from dibit.tools.markdown import show


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
    section = ReportSection(content)
    title = f"**{section.title} ({section.took})**"
    show([title, section.state, section.facts, section.sentences, *section.tables], 200, "study")
