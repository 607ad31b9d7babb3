"""What sections of trainings show: each recipe beside plain FP32, paired by seed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from dibit.reproduce.panels import Dot, Figure, Guide, RowPanel
from dibit.reproduce.records import Record, paper
from dibit.reproduce.schema import JsonObject
from dibit.tools.markdown import Column, strong, table
from dibit.tools.number_format import NONE, interval, mean, number, points, spread


class Difference(JsonObject):
    mean: float
    low: float | None = None
    high: float | None = None
    values: list[float] | None = None


class TrainingRow(JsonObject):
    graph: str
    model: str
    recipe: str
    test: list[float]
    layers: int | None = None
    hidden: int | None = None
    norm: str | None = None
    epochs: int | None = None
    saved_mb: float | None = None
    peak_mb: float | None = None
    seconds: float | None = None
    difference: Difference | None = None
    published: float | None = None
    verdict: str | None = None
    epochs_ratio: float | None = None
    noise: float | None = None


Groups = Sequence[tuple[str, Sequence[TrainingRow]]]
_COLUMNS: tuple[Column, ...] = (
    ("recipe", lambda row: row.recipe),
    ("test accuracy %", lambda row: strong(spread(row.test))),
    ("published %", lambda row: paper(number(row.published)) if row.recipe == "none" else NONE),
    ("minus FP32, points", lambda row: points(d.mean) if (d := row.difference) else NONE),
    ("95 % interval", lambda row: interval(d.low, d.high, points) if (d := row.difference) else NONE),
    ("verdict", lambda row: row.verdict or NONE),
    ("epochs to 99 %", lambda row: number(row.epochs_ratio)),
    ("noise", lambda row: number(row.noise, 3)),
    ("saved MB", lambda row: number(row.saved_mb)),
    ("peak MB", lambda row: number(row.peak_mb, 1)),
    ("s an epoch", lambda row: number(row.seconds, 3)),
    ("seeds", lambda row: number(len(row.test), 0)),
)


def trainings(
    name: str, groups: Groups, of_figure: str, of_table: str, guides: Sequence[Guide] = ()
) -> Iterator[Record]:
    """Show (title, rows): the differences to plain FP32 with `guides`, the accuracies themselves, and all numbers."""
    differences = [row.difference for _, rows in groups for row in rows if row.difference]
    end = max([reach(differences), *(1.1 * abs(guide.x) for guide in guides)])
    changes = [(title, [(row.recipe, _change(row.difference)) for row in rows]) for title, rows in groups]
    levels = [(title, [(row.recipe, _level(row.test)) for row in rows]) for title, rows in groups]
    panels = [
        RowPanel("Test accuracy minus FP32, points", changes, [Guide(0, "FP32"), *guides], xlim=(-end, end)),
        RowPanel("Test accuracy, %", levels),
    ]
    yield Figure(name, of_figure, panels)
    if groups:
        yield table(of_table, _COLUMNS, [(_heading(title, rows[0]), rows) for title, rows in groups])


def _heading(title: str, row: TrainingRow) -> str:
    """The heading of a group of rows: a title, and the settings that all of them share."""
    width = f"{row.layers} × {row.hidden}" if row.layers and row.hidden else ""
    norm, epochs = f"norm {row.norm}" if row.norm else "", f"{row.epochs} epochs" if row.epochs else ""
    return ", ".join(filter(None, (title, width, norm, epochs)))


def _change(found: Difference | None) -> Dot:
    if found is None:
        return Dot()
    low, high = (None if end is None else 100 * end for end in (found.low, found.high))
    return Dot(100 * found.mean, low, high, [100 * value for value in found.values or ()])


def _level(test: Sequence[float]) -> Dot:
    return Dot(mean([100 * value for value in test]), values=[100 * value for value in test])


def reach(differences: Sequence[Difference]) -> float:
    """How far from zero, in points, the differences are drawn: all means and values, and the ends of most intervals.

    One interval of two seeds can be a hundred times wider than the rest, which it must not flatten.
    """
    seen = [abs(100 * value) for d in differences for value in (d.mean, *(d.values or ()))]
    ends = sorted(abs(100 * end) for d in differences for end in (d.low, d.high) if end is not None)
    most = ends[math.ceil(0.75 * (len(ends) - 1))] if ends else 0.0
    return max([1.1 * value for value in seen] + [1.5 * most, 0.01])
