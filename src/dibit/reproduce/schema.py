"""The form of section files: MB of 2^20 bytes, accuracies from 0 to 1, seconds.

`dibit.reproduce.views` has what each section's results hold. Fields with a default may be missing or null, those that
are not named are let through.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

T = TypeVar("T")


class JsonObject(BaseModel):
    """A JSON object; a text is no number and a number no text."""

    model_config = ConfigDict(strict=True)


class SectionFile(JsonObject, Generic[T]):
    """Results, and how, when and where they were measured."""

    section: str
    finished: bool
    results: T
    settings: dict[str, Any] | None = None
    seconds: float | None = None
    date: str | None = None
    machine: dict[str, Any] | None = None
    versions: dict[str, str] | None = None
