"""What sections of trainings have in common: each recipe beside plain FP32, paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from dibit.reproduce.panels import Dot, Marks, Panel, dots
from dibit.reproduce.records import Cell, Column
from dibit.reproduce.schema import Difference, TrainingRow
from dibit.tools.number_format import NONE, interval, number, points, spread

RECIPE = Column("recipe", lambda row: row.recipe, numeric=False)
ACCURACY = Column("test accuracy %", lambda row: Cell(spread(row.test), strong=True))
COST = (
    Column("saved MB", lambda row: number(row.saved_mb)),
    Column("peak MB", lambda row: number(row.peak_mb, 1)),
    Column("s an epoch", lambda row: number(row.seconds, 3)),
    Column("seeds", lambda row: number(len(row.test), 0)),
)


DIFFERENCE = (
    Column("minus FP32, points", lambda row: points(d.mean) if (d := row.difference) else NONE),
    Column("95 % interval", lambda row: interval(d.low, d.high, points) if (d := row.difference) else NONE),
)


def heading(title: str, row: TrainingRow) -> str:
    """Of a group of rows: a title, and what all have been trained with."""
    width = f"{row.layers} × {row.hidden}" if row.layers and row.hidden else ""
    norm, epochs = f"norm {row.norm}" if row.norm else "", f"{row.epochs} epochs" if row.epochs else ""
    return ", ".join(filter(None, (title, width, norm, epochs)))


def panels(groups: Iterable[tuple[str, Sequence[TrainingRow]]], guides: Sequence[Marks] = ()) -> list[Panel]:
    """Of (title, rows), two panels: the differences to plain FP32 with `guides`, and the accuracies themselves."""
    changes, levels, differences = [], [], []
    for title, rows in groups:
        changes.append((title, {row.recipe: _change(row.difference) for row in rows}))
        levels.append((title, {row.recipe: _level(row.test) for row in rows}))
        differences += [row.difference for row in rows if row.difference]
    end = max([reach(differences), *(1.1 * abs(x) for guide in guides for x, _ in guide.at)])
    guides = [Marks("guide", "FP32", [(0, 0)]), *guides]
    return [
        dots("Test accuracy minus FP32, points", changes, guides, xlim=(-end, end)),
        dots("Test accuracy, %", levels),
    ]


def _change(found: Difference | None) -> Dot | None:
    if found is None:
        return None
    low, high = (None if end is None else 100 * end for end in (found.low, found.high))
    return Dot(100 * found.mean, low, high, [100 * value for value in found.values or ()])


def _level(test: Sequence[float]) -> Dot | None:
    return Dot(100 * statistics.fmean(test), values=[100 * value for value in test]) if test else None


def reach(differences: Sequence[Difference]) -> float:
    """How far from zero, in points, the differences are drawn: all means and values, and the ends of most intervals.

    One interval of two seeds can be a hundred times wider than the rest, which it must not flatten.
    """
    seen = [abs(100 * value) for d in differences for value in (d.mean, *(d.values or ()))]
    ends = sorted(abs(100 * end) for d in differences for end in (d.low, d.high) if end is not None)
    most = ends[math.ceil(0.75 * (len(ends) - 1))] if ends else 0.0
    return max([1.1 * value for value in seen] + [1.5 * most, 0.01])
