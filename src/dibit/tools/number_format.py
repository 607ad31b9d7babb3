"""Numbers as text: one way to write each unit, on the page and in the terminal."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence

NONE = "–"
_SPACE = "\u00a0"  # a number and its unit stay on one line


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """Write a number with thousands separated and a real minus; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{value:{'+' if sign else ''},.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("+-")  # rounded to nothing: no sign is left to show
    return text.replace("-", "−")


def percent(value: float | None, digits: int = 1, sign: bool = False) -> str:
    """Write a share, 0.01 as 1.0 %."""
    return NONE if value is None else f"{number(100 * value, digits, sign)}{_SPACE}%"


def points(value: float | None, digits: int = 2) -> str:
    """Write a difference of two shares in percentage points, with its sign and without its unit."""
    return NONE if value is None else number(100 * value, digits, sign=True)


def mb(value: float | None, digits: int = 2) -> str:
    """Write MB (2^20 bytes) with the unit."""
    return NONE if value is None else f"{number(value, digits)}{_SPACE}MB"


def deviation(value: float | None, reference: float | None) -> float | None:
    """Return value / reference - 1; None where one is missing."""
    return None if value is None or not reference else value / reference - 1


def mean(values: Sequence[float]) -> float | None:
    """Return the mean; None of nothing."""
    return statistics.fmean(values) if values else None


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Write the mean of shares and their standard deviation in %: 91.60 ± 0.72."""
    if not values:
        return NONE
    text = number(100 * statistics.fmean(values), digits)
    return text if len(values) < 2 else f"{text} ± {number(100 * statistics.stdev(values), digits)}"


def between(values: Sequence[float], write: Callable[[float], str] = number) -> str:
    """Write the range of values, "a to b", or the one value that they all are once written."""
    low, high = write(min(values)), write(max(values))
    return low if low == high else f"{low} to {high}"


def interval(low: float | None, high: float | None, write: Callable[[float], str]) -> str:
    """Write two ends, "a to b"; a dash where one is missing."""
    return NONE if low is None or high is None else f"{write(low)} to {write(high)}"


def duration(seconds: float | None) -> str:
    """Write seconds as a person would: 8.4 s, 1 min 33 s, 2 h 5 min."""
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{seconds:.3g}{_SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{_SPACE}min {rest}{_SPACE}s"
    return f"{minutes // 60}{_SPACE}h {minutes % 60}{_SPACE}min"


def slug(*names: object) -> str:
    """Make one id of names: lower case, letters and digits, joined by dashes."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(map(str, names)).lower()).strip("-") or "unnamed"


def short(text: str, most: int = 44) -> str:
    """Cut a text in its middle to `most` characters: figures have no room for more."""
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def listed(words: Sequence[str]) -> str:
    """Join words as in a sentence: a, b and c."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
