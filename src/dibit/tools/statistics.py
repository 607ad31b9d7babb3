"""Statistics of results that commands compare."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any


def paired_difference(differences: Sequence[float]) -> dict[str, Any]:
    """Return the mean difference and its 95 % confidence interval (Student's t; None for one pair)."""
    mean, n = statistics.fmean(differences), len(differences)
    if n < 2:
        return {"mean": mean, "low": None, "high": None, "pairs": n}
    from scipy.stats import t

    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half, "pairs": n}
