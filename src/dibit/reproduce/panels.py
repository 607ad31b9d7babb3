"""What a figure shows, as plain records: panels with marks, which `dibit.reproduce.charts` draws."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Marks(NamedTuple):
    """Marks of one kind and colour in a panel.

    Attributes:
        kind: One of `dibit.reproduce.charts.KINDS`.
        color: The setting, or another name that has a colour (`dibit.reproduce.charts.COLORS`).
        at: Where, as (x, y); in a panel of rows y is the row. x of a bar is its length (bars of one row are stacked),
            of an interval or a rail its (low, high).
        label: In the legend; without one the marks are not in it.
        texts: Of "text".
    """

    kind: str
    color: str
    at: Sequence[tuple[Any, float]]
    label: str = ""
    texts: Sequence[str] = ()


class Heading(str):
    """A row of a panel that names the rows below it."""


@dataclass(frozen=True)
class Panel:
    """Axes of a figure: rows with marks, or curves where there are no rows.

    Attributes:
        title: What is shown, with the unit.
        marks: In the order in which they are drawn.
        rows: Labels from the top down.
        subtitle: A line below the title.
        xlabel: Of the horizontal axis.
        scale: Of the horizontal axis: "linear", "log", or "powers" of two at the marks.
        xlim: Its ends; an interval that goes on ends in an arrow.
        ylim: Of curves, from 0.
    """

    title: str
    marks: Sequence[Marks]
    rows: Sequence[str] = ()
    subtitle: str = ""
    xlabel: str = ""
    scale: str = "linear"
    xlim: tuple[float, float] | None = None
    ylim: float | None = None


class Dot(NamedTuple):
    """A value in a row of a panel: with an interval, with the single values behind it, and with an earlier value."""

    value: float
    low: float | None = None
    high: float | None = None
    values: Sequence[float] = ()
    earlier: float | None = None


def dots(
    title: str, groups: Iterable[tuple[str, Mapping[str, Dot | None]]], guides: Sequence[Marks] = (), **panel: Any
) -> Panel:
    """Make a panel of (heading, {label: dot}): a row a label, whose colour is that of the label."""
    rows: list[str] = []
    marks = list(guides)
    for heading, own in groups:
        rows += [Heading(heading)] if heading and own else []
        for label, dot in own.items():
            row = len(rows)
            rows.append(label)
            if dot is None:
                continue
            if dot.earlier is not None:
                marks.append(Marks("rail", "rail", [((dot.earlier, dot.value), row)]))
                marks.append(Marks("hollow", label, [(dot.earlier, row)]))
            marks.append(Marks("seed", label, [(value, row) for value in dot.values]))
            if dot.low is not None and dot.high is not None:
                marks.append(Marks("interval", label, [((dot.low, dot.high), row)]))
            marks.append(Marks("dot", label, [(dot.value, row)]))
    return Panel(title, marks, rows, **panel)


@dataclass(frozen=True)
class Figure:
    """Panels that stand side by side where there is room, else below each other; those without marks are left out.

    Attributes:
        name: Its id, and the name of its file.
        caption: What it shows.
        panels: In order.
        small: Whether even a phone has room for two of them in a row.
    """

    name: str
    caption: str
    panels: Sequence[Panel]
    small: bool = False

    def __post_init__(self) -> None:
        def filled(panel: Panel) -> bool:
            return any(marks.at and not marks.kind.startswith("guide") for marks in panel.marks)

        object.__setattr__(self, "panels", list(filter(filled, self.panels)))

    @property
    def alt(self) -> str:
        """The main numbers in words, for readers who do not see it."""
        return " ".join(f"{panel.title}: {_in_words(panel)}." for panel in self.panels)


def _in_words(panel: Panel) -> str:
    if not panel.rows:
        lines = [marks for marks in panel.marks if marks.label and marks.kind != "ring"]
        ends = [f"{m.label} {_number(m.at[0][1])} to {_number(m.at[-1][1])}" for m in lines if m.at]
        return panel.subtitle or ", ".join(ends)
    found: dict[int, list[str]] = {}
    bars: dict[int, float] = {}
    for marks in panel.marks:
        for x, y in marks.at:
            if marks.kind == "bar":
                bars[int(y)] = bars.get(int(y), 0) + x
            elif marks.kind in ("dot", "diamond", "stroke", "cross"):
                found.setdefault(int(y), []).append(f"{marks.label} {_number(x)}".strip())
    for row, size in bars.items():
        found.setdefault(row, []).insert(0, _number(size))
    return "; ".join(f"{label} {', '.join(found.get(i, ()))}".strip() for i, label in enumerate(panel.rows))


def _number(value: float) -> str:
    return f"{value:,.4g}".replace("-", "−")
