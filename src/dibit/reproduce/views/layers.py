"""What sections that look at single layers have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from dibit.reproduce.schema import JsonObject
from dibit.tools.markdown import Column

_MODEL = "(model)"  # what lies in the model itself and in no module of it
LAYER: tuple[Column, ...] = (
    ("module", lambda row: row.module or _MODEL),
    ("operation", lambda row: row.operation),
)


class LayerRow(JsonObject):
    setting: str
    module: str
    operation: str
    count: int  # elements that share a range
    elements: int | None = None


Row = TypeVar("Row", bound=LayerRow)


def labels(rows: Sequence[LayerRow]) -> list[str]:
    """Name each row's module, with its operation where the rows have the same module twice."""
    modules = [row.module for row in rows]
    twice = [f" {row.operation}" if modules.count(row.module) > 1 else "" for row in rows]
    return [f"{module or _MODEL}{more}" for module, more in zip(modules, twice, strict=True)]


def by_setting(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Group rows by their setting, in the order in which the settings come."""
    return [(s, [row for row in rows if row.setting == s]) for s in dict.fromkeys(row.setting for row in rows)]
