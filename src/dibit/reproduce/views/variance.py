"""Variance: what levels made for the clipped normal save, by the formula and on real activations."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from dibit.reproduce.panels import Dot, Figure, RowPanel
from dibit.reproduce.records import Fact, Record, paper
from dibit.reproduce.schema import JsonObject
from dibit.reproduce.views.layers import LAYER, LayerRow, by_setting, labels
from dibit.tools.markdown import Column, Table, strong, table
from dibit.tools.number_format import NONE, deviation, interval, number, percent, slug

TITLE = "Variance"
CLAIM = (
    "i-EXACT models the normalised activation by the clipped normal CN[1/D], D the number of elements that share a "
    "range, and places the levels where the expected variance of stochastic rounding is least. By its formulas that "
    "saves 0.61 % of the variance at D = 8 and 19.71 % at D = 1,024 with 2 bits."
)
_LEVELS = {"uniform": "uniform", "normal": "clipped normal", "fitted": "fitted"}  # and their marks in figures


class ExpectedVariance(JsonObject):
    bits: int
    count: int
    sigma: float
    levels: list[float]
    uniform: float
    optimal: float
    reduction: float
    paper: dict[str, float | None] | None = None  # sigma, uniform, alpha, optimal, reduction

    @property
    def alpha(self) -> float | None:
        """The second level, where 2 bits have a free one."""
        return self.levels[1] if self.bits == 2 and len(self.levels) > 1 else None


class LevelVariance(JsonObject):
    analytic: float
    monte_carlo: float | None = None
    error: float | None = None
    expected: float | None = None


class VarianceRow(LayerRow):
    uniform: LevelVariance
    normal: LevelVariance
    fitted: LevelVariance | None = None

    def change(self, levels: str = "normal") -> float | None:
        """The relative change of the variance against uniform levels."""
        found = getattr(self, levels)
        return deviation(found.analytic, self.uniform.analytic) if found else None


class GraphVariance(JsonObject):
    graph: str
    model: str
    epoch: int
    rows: list[VarianceRow]


class Results(JsonObject):
    table: list[ExpectedVariance]
    measured: list[GraphVariance]


def records(results: Results) -> Iterator[Record]:
    rows = [row for graph in results.measured for row in graph.rows]
    yield from _findings(results.table, rows)
    measured = [graph for graph in results.measured if graph.rows]
    yield from map(_measured_figure, measured)
    if results.table:
        yield _formula_table(results.table)
    yield from map(_measured_table, measured)


def _changes(rows: Sequence[VarianceRow], levels: str = "normal") -> list[float]:
    return [change for row in rows if (change := row.change(levels)) is not None]


def _signed(change: float | None) -> str:
    return percent(change, 1, sign=True)


def _findings(formula: Sequence[ExpectedVariance], rows: Sequence[VarianceRow]) -> Iterator[Record]:
    papers = [(row.reduction, (row.paper or {}).get("reduction")) for row in formula]
    off = [abs(ours - theirs) for ours, theirs in papers if theirs is not None]
    if off:
        detail = f"from what the paper’s formulas give, over {len(off)} block sizes"
        yield Fact("Table of reductions: largest deviation", f"{number(100 * max(off), 3)} points", detail)
    for setting, own in by_setting(rows):
        normal, fitted = _changes(own), _changes(own, "fitted")
        if normal:
            ends = interval(min(normal), max(normal), _signed)
            more = f"median of {len(normal)} layers, {ends}; in {sum(change > 0 for change in normal)} of them it grows"
            best = f"; the best levels for the data reach {_signed(statistics.median(fitted))}" if fitted else ""
            label = f"{setting}: change of the variance of real activations by the levels of the clipped normal"
            yield Fact(label, _signed(statistics.median(normal)), more + best)
    found = [variance for row in rows for levels in _LEVELS if (variance := getattr(row, levels))]
    scores = [abs(v.monte_carlo - v.analytic) / v.error for v in found if v.monte_carlo is not None and v.error]
    if scores:
        yield (
            f"The formula and a Monte Carlo count of the rounding agree within {number(max(scores), 1)} standard "
            f"errors in all {len(scores)} comparisons."
        )


def _formula_table(rows: Sequence[ExpectedVariance]) -> Table:
    def pair(title: str, name: str, digits: int) -> tuple[Column, Column]:
        write = percent if name == "reduction" else number
        ours = (title, lambda row: write(getattr(row, name), digits))
        return ours, ("paper", lambda row: paper(write((row.paper or {}).get(name), digits)))

    return table(
        "Expected variance of stochastic rounding under CN[1/D], in units of the squared bin width of the uniform "
        "grid; with 2 bits, which the papers use, the levels are 0, α, 3 − α, 3.",
        [
            ("D or G", lambda row: number(row.count, 0)),
            *(*pair("σ", "sigma", 3), *pair("uniform", "uniform", 4), *pair("level α", "alpha", 3)),
            *(*pair("optimal", "optimal", 4), *pair("reduction", "reduction", 2)),
        ],
        [(f"{bits} bits", [row for row in rows if row.bits == bits]) for bits in sorted({row.bits for row in rows})],
        ["“paper” is what follows from the paper’s formulas at the same D."],
    )


def _name(graph: GraphVariance) -> str:
    return f"{graph.graph}, {graph.model}, epoch {graph.epoch}"


def _measured_table(graph: GraphVariance) -> Table:
    def columns(levels: str) -> list[Column]:
        def drawn(row: VarianceRow) -> str:
            found: LevelVariance | None = getattr(row, levels)
            if found is None or found.monte_carlo is None:
                return NONE
            return number(found.monte_carlo, 4) + (f" ± {number(found.error, 4)}" if found.error is not None else "")

        def change(row: VarianceRow) -> str:
            return NONE if levels == "uniform" else strong(_signed(row.change(levels)))

        by_formula: Column = (
            levels,
            lambda row: number(found.analytic if (found := getattr(row, levels)) else None, 4),
        )
        return [by_formula, ("Monte Carlo", drawn), ("change", change)]

    return table(
        f"Variance of stochastic rounding on real activations ({_name(graph)}), in units of the squared bin width of "
        "the uniform grid: by the formula, and by drawing the rounding (Monte Carlo, with the standard error); changes "
        "are against the uniform levels.",
        [
            *(*LAYER, ("share a range", lambda row: number(row.count, 0)), *columns("uniform")),
            ("normal, expected", lambda row: number(row.normal.expected, 4)),
            *(*columns("normal"), *columns("fitted")),
        ],
        by_setting(graph.rows),
        [
            "normal: the levels of the clipped normal, whose variance the formula expects to be “normal, expected”. "
            "fitted: the best levels there are for these activations, by dynamic programming (Ben-Basat et al., 2024)."
        ],
    )


def _measured_figure(graph: GraphVariance) -> Figure:
    def dot(row: VarianceRow) -> Dot:
        found = {mark: own.analytic for levels, mark in _LEVELS.items() if (own := getattr(row, levels))}
        return Dot(others=found | ({} if row.normal.expected is None else {"expected": row.normal.expected}))

    panels = []
    for setting, rows in by_setting(graph.rows):
        counts = " or ".join(f"{count:,}" for count in sorted({row.count for row in rows}))
        dots = list(zip(labels(rows), map(dot, rows), strict=True))
        title = f"{setting}, {counts} share a range"
        panels.append(RowPanel(title, [("", dots)], xlabel="variance, in squared bin widths"))
    return Figure(
        f"variance-{slug(graph.graph, graph.model, graph.epoch)}",
        f"On real activations ({_name(graph)}): the variance with uniform levels, with those of the clipped normal, "
        "and with the best there are for the data. The cross is what the clipped normal leads one to expect of its "
        "levels.",
        panels,
    )
