"""What a figure shows, as plain records, which `dibit.reproduce.charts` draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Dot(NamedTuple):
    """What a row shows: a dot with what lies around it, or a bar.

    Attributes:
        value: Of the dot, in the colour of the row's label.
        low: The interval's lower end.
        high: Its upper end.
        values: The single values behind it, as small dots.
        earlier: An earlier value, as a hollow dot.
        parts: Of a stacked bar: lengths by names of `dibit.reproduce.charts.COLORS`.
        others: Values with marks of their own, by names of `dibit.reproduce.charts.MARKS`.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    values: Sequence[float] = ()
    earlier: float | None = None
    parts: Mapping[str, float] = {}
    others: Mapping[str, float] = {}

    @property
    def words(self) -> str:
        """Its numbers."""
        main = sum(self.parts.values()) if self.parts else self.value
        own = [] if main is None else [_number(main)]
        return ", ".join(own + [f"{name} {_number(x)}" for name, x in self.others.items()])


class Guide(NamedTuple):
    """A line across all rows, at `x`; with a label it is dashed, and in the legend."""

    x: float
    color: str
    label: str = ""


@dataclass(frozen=True)
class Rows:
    """A panel of rows from the top down: groups (heading, [(label, dot)]); what lies outside of `xlim` is cut."""

    title: str
    groups: Sequence[tuple[str, Sequence[tuple[str, Dot]]]]
    guides: Sequence[Guide] = ()
    xlabel: str = ""
    log: bool = False
    xlim: tuple[float, float] | None = None

    @property
    def words(self) -> str:
        """Its numbers; nothing where it has none."""
        if not any(dot.words for _, rows in self.groups for _, dot in rows):
            return ""
        written = [(heading, [f"{label} {dot.words}".strip() for label, dot in rows]) for heading, rows in self.groups]
        return "; ".join(text for heading, rows in written for text in (heading, *rows) if text and rows)


class Curve(NamedTuple):
    """Points (x, y) in a colour of `dibit.reproduce.charts.COLORS`; `style` is in matplotlib's words."""

    label: str
    color: str
    points: Sequence[tuple[float, float]]
    style: Mapping[str, Any] = {}
    filled: bool = False


@dataclass(frozen=True)
class Curves:
    """A panel of curves within `xlim` and from 0 to `top`, with texts by their x where a curve goes on above it."""

    title: str
    subtitle: str
    curves: Sequence[Curve]
    xlim: tuple[float, float]
    top: float
    texts: Mapping[float, str] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """Its numbers."""
        return self.subtitle


class Figure:
    """Panels below each other, or side by side in columns; those that hold nothing are left out.

    Args:
        name: Its id, and the name of its file.
        caption: What it shows.
        panels: In order.
        columns: How many stand side by side, also on a phone.
    """

    def __init__(self, name: str, caption: str, panels: Sequence[Rows | Curves], columns: int = 1) -> None:
        self.name, self.caption, self.columns = name, caption, columns
        self.panels = [panel for panel in panels if panel.words]

    @property
    def alt(self) -> str:
        """The main numbers in words, for readers who do not see it."""
        return " ".join(f"{panel.title}: {panel.words}." for panel in self.panels)


def _number(value: float) -> str:
    return f"{value:,.4g}".replace("-", "−")
