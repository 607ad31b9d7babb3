"""What a figure shows, as plain records, which `dibit.reproduce.charts` draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


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
class RowPanel:
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
        written = [(heading, [f"{label} {dot.words}" for label, dot in rows]) for heading, rows in self.filled]
        return "; ".join(text for heading, rows in written for text in (heading, *rows) if text)

    @property
    def filled(self) -> list[tuple[str, list[tuple[str, Dot]]]]:
        """The groups and rows that hold something."""
        found = [(heading, [row for row in rows if row[1].words]) for heading, rows in self.groups]
        return [(heading, rows) for heading, rows in found if rows]


@dataclass(frozen=True)
class Histogram:
    """A panel of % of the elements in equal bins over [0, 3], up to `top`, half as wide as others.

    Attributes:
        title: What is shown.
        words: Its numbers, a line below the title.
        color: A name of `dibit.reproduce.charts.COLORS`.
        measured: By bin; where the largest is above `top` it carries its number.
        densities: By bin, by names of `dibit.reproduce.charts.DENSITIES`.
        top: End of the vertical axis.
    """

    title: str
    words: str
    color: str
    measured: Sequence[float]
    densities: Mapping[str, Sequence[float]]
    top: float


class Figure:
    """Panels of one kind, below each other or two in a row; those that hold nothing are left out, and a figure of them.

    Args:
        name: Its id, and the name of its file.
        caption: What it shows.
        panels: In order.
    """

    def __init__(self, name: str, caption: str, panels: Sequence[RowPanel | Histogram]) -> None:
        self.name, self.caption, self.panels = name, caption, [panel for panel in panels if panel.words]

    @property
    def alt(self) -> str:
        """The main numbers in words, for readers who do not see it."""
        return " ".join(f"{panel.title}: {panel.words}." for panel in self.panels)


def _number(value: float) -> str:
    return f"{value:,.4g}".replace("-", "−")
