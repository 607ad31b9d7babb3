"""Variance: what levels made for the clipped normal save, by the formula and on real activations."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from dibit.reproduce.panels import Figure, Marks, Panel
from dibit.reproduce.records import Cell, Column, Fact, Record, paper_cell, table
from dibit.reproduce.schema import Levels, Measured, Variance, VarianceRow
from dibit.reproduce.views.layers import LAYER, by_setting, labels
from dibit.tools.number_format import deviation, number, percent, slug

TITLE = "Variance"
CLAIM = (
    "i-EXACT models the normalised activation by the clipped normal CN[1/D], D the number of elements that share a "
    "range, and places the levels where the expected variance of stochastic rounding is least. By its formulas that "
    "saves 0.61 % of the variance at D = 8 and 19.71 % at D = 1,024 with 2 bits."
)
_LEVELS = ("uniform", "normal", "fitted")
_MARKS = (("dot", "uniform", "uniform"), ("diamond", "normal", "clipped normal"), ("stroke", "fitted", "fitted"))
_LINES = {2: ("line", "i-EXACT"), 4: ("line dashed", "EXACT"), 8: ("line dotted", "default")}  # kind, colour


def records(results: Variance) -> Iterator[Record]:
    measured = [each for each in results.measured if each.rows]
    last = {(each.graph, each.model): each for each in sorted(measured, key=lambda each: each.epoch)}
    rows = [row for each in last.values() for row in each.rows]
    yield from _facts(results.table, [row for row in rows if row.setting == "i-EXACT"])
    yield from _sentences(rows, [row for each in measured for row in each.rows])
    if results.table:
        yield _formula_figure(results.table)
    for each in last.values():
        yield _measured_figure(each)
    two = [row for row in results.table if row.bits == 2]
    more = [row for row in results.table if row.bits != 2]
    if two:
        yield _paper_table(two)
    if more:
        yield _bits_table(more)
    for each in measured:
        yield _measured_table(each, folded=not any(each is shown for shown in last.values()))
        if any(found.monte_carlo is not None for row in each.rows for found in (row.uniform, row.normal)):
            yield _draws_table(each)


def _change(row: VarianceRow, levels: str = "normal") -> float | None:
    """Of the variance against uniform levels."""
    found = getattr(row, levels)
    return deviation(found.analytic, row.uniform.analytic) if found else None


def _changes(rows: Sequence[VarianceRow], levels: str = "normal") -> list[float]:
    return [change for row in rows if (change := _change(row, levels)) is not None]


def _median(changes: Sequence[float]) -> str:
    return percent(statistics.median(changes), 1, sign=True)


def _facts(formula: Sequence[Levels], iexact: Sequence[VarianceRow]) -> Iterator[Record]:
    papers = [(row.reduction, (row.paper or {}).get("reduction")) for row in formula]
    off = [abs(ours - paper) for ours, paper in papers if paper is not None]
    if off:
        detail = f"from what the paper’s formulas give, over {len(off)} block sizes"
        yield Fact("Table of reductions: largest deviation", f"{number(100 * max(off), 3)} points", detail)
    if changes := _changes(iexact):
        ends = " to ".join(percent(end, 1, sign=True) for end in (min(changes), max(changes)))
        label = "i-EXACT’s levels on real activations, change of the variance"
        yield Fact(label, _median(changes), f"median of {len(changes)} layers; {ends}")


def _sentences(last: Sequence[VarianceRow], every: Sequence[VarianceRow]) -> Iterator[str]:
    for setting, rows in by_setting(last):
        normal, fitted = _changes(rows), _changes(rows, "fitted")
        if normal:
            more = sum(change > 0 for change in normal)
            best = f"; the best levels there are for the data reach {_median(fitted)}" if fitted else ""
            yield (
                f"{setting}: against uniform levels, those of the clipped normal change the variance of real "
                f"activations by {_median(normal)} (median of {len(normal)} layers, in {more} of them it grows){best}."
            )
    found = [variance for row in every for levels in _LEVELS if (variance := getattr(row, levels))]
    scores = [abs(v.monte_carlo - v.analytic) / v.error for v in found if v.monte_carlo is not None and v.error]
    if scores:
        yield (
            f"The formula and a Monte Carlo count of the rounding agree within {number(max(scores), 1)} standard "
            f"errors in all {len(scores)} comparisons."
        )


def _paper_table(rows: Sequence[Levels]) -> Record:
    def pair(title: str, name: str, digits: int) -> tuple[Column, Column]:
        last = name == "reduction"
        write = percent if last else number
        ours = Column(title, lambda row: Cell(write(getattr(row, name), digits), strong=last))
        return ours, Column("paper", lambda row: paper_cell(write((row.paper or {}).get(name), digits)))

    return table(
        "variance",
        "Expected variance of stochastic rounding under CN[1/D] with 2 bits and levels 0, α, 3 − α, 3, in units of the "
        "squared bin width of the uniform grid.",
        [
            Column("D or G", lambda row: number(row.count, 0)),
            *(*pair("σ", "sigma", 3), *pair("uniform", "uniform", 4), *pair("level α", "alpha", 3)),
            *(*pair("optimal", "optimal", 4), *pair("reduction", "reduction", 2)),
        ],
        [("", rows)],
        ["“paper” is what follows from the paper’s formulas at the same D."],
    )


def _bits_table(rows: Sequence[Levels]) -> Record:
    return table(
        "variance-bits",
        "The same with more bits; the papers use 2.",
        [
            Column("D or G", lambda row: number(row.count, 0)),
            Column("σ", lambda row: number(row.sigma, 3)),
            Column("uniform", lambda row: number(row.uniform, 4)),
            Column("optimal", lambda row: number(row.optimal, 4)),
            Column("reduction", lambda row: Cell(percent(row.reduction, 2), strong=True)),
        ],
        [(f"{bits} bits", [row for row in rows if row.bits == bits]) for bits in sorted({row.bits for row in rows})],
        fold="Expected variance with more bits",
    )


def _name(measured: Measured) -> str:
    return f"{measured.graph}, {measured.model}, epoch {measured.epoch}"


def _measured_table(measured: Measured, folded: bool) -> Record:
    return table(
        f"variance-{slug(measured.graph, measured.model, measured.epoch)}",
        f"Variance of stochastic rounding on real activations ({_name(measured)}), in units of the squared bin width "
        "of the uniform grid; changes are against the uniform levels.",
        [
            *LAYER,
            Column("share a range", lambda row: number(row.count, 0)),
            Column("uniform", lambda row: number(row.uniform.analytic, 4)),
            Column("normal, expected", lambda row: number(row.normal.expected, 4)),
            Column("normal", lambda row: number(row.normal.analytic, 4)),
            Column("change", lambda row: Cell(percent(_change(row), 1, sign=True), strong=True)),
            Column("fitted", lambda row: number(row.fitted.analytic if row.fitted else None, 4)),
            Column("change", lambda row: percent(_change(row, "fitted"), 1, sign=True)),
        ],
        by_setting(measured.rows),
        [
            "normal: the levels of the clipped normal, whose variance the formula expects to be “normal, expected”. "
            "fitted: the best levels there are for these activations, by dynamic programming (Ben-Basat et al., 2024)."
        ],
        fold=f"Earlier: {_name(measured)}" if folded else "",
    )


def _draws_table(measured: Measured) -> Record:
    def analytic(levels: str) -> Column:
        return Column(levels, lambda row: number(found.analytic if (found := getattr(row, levels)) else None, 4))

    def drawn(levels: str) -> Column:
        def written(row: VarianceRow) -> str:
            found = getattr(row, levels)
            error = f" ± {number(found.error, 4)}" if found and found.error is not None else ""
            return number(found.monte_carlo if found else None, 4) + error

        return Column("Monte Carlo", written)

    return table(
        f"variance-{slug(measured.graph, measured.model, measured.epoch)}-draws",
        f"The same variances by the formula and by drawing the rounding, with the standard error ({_name(measured)}).",
        [*LAYER, *(column for levels in _LEVELS for column in (analytic(levels), drawn(levels)))],
        by_setting(measured.rows),
        fold=f"The formula against Monte Carlo, {_name(measured)}",
    )


def _formula_figure(rows: Sequence[Levels]) -> Record:
    reductions, variances = [], []
    for bits in sorted({row.bits for row in rows}):
        own = [row for row in rows if row.bits == bits]
        shares = [(row.count, 100 * row.reduction) for row in own]
        reductions.append(Marks(*_LINES.get(bits, ("line", "soft")), shares, f"{bits} bits"))
        if bits == 2:
            uniform, normal = ([(row.count, getattr(row, name)) for row in own] for name in ("uniform", "optimal"))
            variances.append(Marks("line", "uniform", uniform, "uniform levels"))
            variances.append(Marks("line", "normal", normal, "levels of the clipped normal"))
    for marks, scale, names in ((reductions, 100, ("reduction",)), (variances, 1, ("uniform", "optimal"))):
        papers = [(row.count, (row.paper or {}).get(name)) for name in names for row in rows]
        known = [(count, scale * paper) for count, paper in papers if paper is not None]
        marks.append(Marks("ring", "ink", known, "by the paper’s formulas"))
    axis = "elements that share a range (D or G)"
    panels = [
        Panel(title, marks, xlabel=axis, scale="powers")
        for title, marks in (("Reduction, %", reductions), ("Expected variance, 2 bits", variances))
    ]
    return Figure(
        "variance",
        "By the formula: how much less variance the levels of the clipped normal promise, and the variances behind "
        "it with 2 bits. Rings follow from the paper’s formulas.",
        panels,
    )


def _measured_figure(measured: Measured) -> Record:
    panels = []
    for setting, rows in by_setting(measured.rows):
        found = [[variance.analytic for name in _LEVELS if (variance := getattr(row, name))] for row in rows]
        marks = [Marks("rail", "rail", [((min(values), max(values)), i) for i, values in enumerate(found)])]
        for kind, name, label in _MARKS:
            known = [(variance.analytic, i) for i, row in enumerate(rows) if (variance := getattr(row, name))]
            marks.append(Marks(kind, name, known, label))
        expected = [(row.normal.expected, i) for i, row in enumerate(rows) if row.normal.expected is not None]
        marks.append(Marks("cross", "ink", expected, "expected"))
        counts = " or ".join(f"{count:,}" for count in sorted({row.count for row in rows}))
        title = f"{setting}, {counts} share a range"
        panels.append(Panel(title, marks, labels(rows), xlabel="variance, in squared bin widths"))
    return Figure(
        f"variance-{slug(measured.graph, measured.model)}",
        f"On real activations ({_name(measured)}): the variance with uniform levels, with those of the clipped "
        "normal, and with the best there are for the data. The cross is what the clipped normal leads one to expect of "
        "its levels.",
        panels,
    )
