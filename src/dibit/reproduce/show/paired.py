"""What the tables of trainings have in common: a recipe's row beside plain FP32, paired by seed."""

from __future__ import annotations

from typing import Any

from dibit.reproduce.tables import Cell
from dibit.tools.number_format import NONE, number, points, spread


def heading(title: str, row: dict[str, Any]) -> str:
    """Of a group of rows: a title, and what all have been trained with."""
    parts = [title]
    if row.get("layers") and row.get("hidden"):
        parts.append(f"{row['layers']} × {row['hidden']}")
    if row.get("norm"):
        parts.append(f"norm {row['norm']}")
    if row.get("epochs"):
        parts.append(f"{row['epochs']} epochs")
    return ", ".join(parts)


def accuracy(row: dict[str, Any]) -> Cell:
    """Mean and standard deviation over seeds."""
    return Cell(spread(row["test"]), strong=True)


def difference(row: dict[str, Any]) -> list[Cell | str]:
    """Of test accuracy to plain FP32: its mean, and its 95 % interval."""
    found = row.get("difference") or {}
    low, high = found.get("low"), found.get("high")
    return [points(found.get("mean")), NONE if low is None or high is None else f"{points(low)} to {points(high)}"]


def cost(row: dict[str, Any]) -> list[Cell | str]:
    """Saved MB, peak MB, seconds an epoch, and the number of seeds."""
    return [
        number(row.get("saved_mb")),
        number(row.get("peak_mb"), 1),
        number(row.get("seconds"), 3),
        number(len(row["test"]), 0),
    ]
