"""Means, ratios and the paired difference."""

from __future__ import annotations

import pytest

from dibit.tools.statistics import paired_difference
from dibit.train.report import summarise
from dibit.train.result import Result


def _result(recipe: str, seed: int, test: float, saved: int, peak: int = 100, seconds: float = 1.0) -> Result:
    return Result(recipe, seed, test, test, 1, 1, saved, saved, peak, seconds, [0.0])


def test_paired_difference_is_students() -> None:
    # mean 0.02, standard deviation 0.01, t(0.975, 2) = 4.30265: half width 4.30265 * 0.01 / sqrt(3)
    found = paired_difference([0.01, 0.02, 0.03])
    assert found["mean"] == pytest.approx(0.02)
    assert found["low"] == pytest.approx(0.02 - 0.0248414, abs=1e-6)
    assert found["high"] == pytest.approx(0.02 + 0.0248414, abs=1e-6)
    assert paired_difference([0.5]) == {"mean": 0.5, "low": None, "high": None, "pairs": 1}


def test_summary_pairs_by_seed() -> None:
    results = [
        _result("none", 0, 0.5, 800, peak=200, seconds=1.0),
        _result("none", 1, 0.7, 800, peak=200, seconds=3.0),
        _result("default", 1, 0.6, 100, peak=50, seconds=3.0),  # another order than the first
        _result("default", 0, 0.6, 100, peak=50, seconds=3.0),
    ]
    summary = summarise(results)
    assert summary["by_recipe"]["none"]["test"] == pytest.approx(0.6)
    assert summary["by_recipe"]["none"]["test_std"] == pytest.approx(0.1414214)
    assert summary["ratios"] == {"saved": 8.0, "peak": 4.0, "time": 1.5}
    assert summary["difference"]["mean"] == pytest.approx(0.0)
    half = 12.7062 * 0.1414214 / 2**0.5  # differences +0.1 and -0.1
    assert summary["difference"]["high"] == pytest.approx(half, abs=1e-4)


def test_summary_of_one_recipe_compares_nothing() -> None:
    summary = summarise([_result("default", 0, 0.5, 10)])
    assert summary["ratios"] is summary["difference"] is None
    assert summary["by_recipe"]["default"]["test_std"] is None
