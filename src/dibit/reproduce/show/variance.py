"""Variance: what levels made for the clipped normal save, by the formula and on real activations."""

from __future__ import annotations

import statistics
from typing import Any

from dibit.reproduce.tables import Cell, Column, Fact, Table, table, theirs
from dibit.tools.errors import require
from dibit.tools.figures import COLORS, INK, SOFT, Layout, Picture, figure, grid, legend_above, picture
from dibit.tools.number_format import MODEL, by_setting, deviation, module_labels, number, percent, short, slug

TITLE = "Variance"
CLAIM = (
    "i-EXACT models the normalised activation by the clipped normal CN[1/D], D the number of elements that share a "
    "range, and places the levels where the expected variance of stochastic rounding is least. By its formulas that "
    "saves 0.61 % of the variance at D = 8 and 19.71 % at D = 1,024 with 2 bits."
)
_LEVELS = ("uniform", "normal", "fitted")
_LINES = {2: "-", 4: (0, (5, 2)), 8: (0, (1, 1.5))}
_BITS = {2: "#0f5591", 4: "#d55e00", 8: "#009e73"}


def facts(results: dict[str, Any]) -> list[Fact]:
    found = []
    with_paper = [row for row in results["table"] if row.get("paper")]
    if with_paper:
        papers = [(row["reduction"], row["paper"].get("reduction")) for row in with_paper]
        off = [abs(ours - paper) for ours, paper in papers if paper is not None]
        if off:
            label = "Table of reductions: largest deviation"
            detail = f"from what the paper’s formulas give, over {len(off)} block sizes"
            found.append(Fact(label, f"{number(100 * max(off), 3)} points", detail))
    last = [row for measured in _last_epochs(results) for row in measured["rows"] if row["setting"] == "i-EXACT"]
    changes = [change for row in last if (change := _change(row, "normal")) is not None]
    if changes:
        reach = f"{percent(min(changes), 1, sign=True)} to {percent(max(changes), 1, sign=True)}"
        label = "i-EXACT’s levels on real activations, change of the variance"
        found.append(Fact(label, _median(changes), f"median of {len(changes)} layers; {reach}"))
    return found


def sentences(results: dict[str, Any]) -> list[str]:
    said = []
    for setting, rows in by_setting([row for measured in _last_epochs(results) for row in measured["rows"]]):
        normal = [change for row in rows if (change := _change(row, "normal")) is not None]
        fitted = [change for row in rows if row.get("fitted") and (change := _change(row, "fitted")) is not None]
        if normal:
            more = sum(change > 0 for change in normal)
            best = f"; the best levels there are for the data reach {_median(fitted)}" if fitted else ""
            said.append(
                f"{setting}: against uniform levels, those of the clipped normal change the variance of real "
                f"activations by {_median(normal)} (median of {len(normal)} layers, in {more} of them it grows){best}."
            )
    scores = [
        abs(found["monte_carlo"] - found["analytic"]) / found["error"]
        for measured in results["measured"]
        for row in measured["rows"]
        for found in (row[name] for name in _LEVELS if row.get(name))
        if found.get("monte_carlo") is not None and found.get("error")
    ]
    if scores:
        said.append(
            f"The formula and a Monte Carlo count of the rounding agree within {number(max(scores), 1)} standard "
            f"errors in all {len(scores)} comparisons."
        )
    return said


def tables(results: dict[str, Any]) -> list[Table]:
    found = []
    two = [row for row in results["table"] if row["bits"] == 2]
    if two:
        found.append(_paper_table(two))
    if len(two) < len(results["table"]):
        found.append(_bits_table([row for row in results["table"] if row["bits"] != 2]))
    last = _last_epochs(results)
    for measured in results["measured"]:
        if measured["rows"]:
            found.append(_measured_table(measured, folded=not any(measured is shown for shown in last)))
            if any(row[levels].get("monte_carlo") is not None for row in measured["rows"] for levels in _LEVELS[:2]):
                found.append(_draws_table(measured))
    return found


def pictures(results: dict[str, Any]) -> list[Picture]:
    found = [_formula_picture(results["table"])] if results["table"] else []
    return found + [_measured_picture(measured) for measured in _last_epochs(results)]


def _median(changes: list[float]) -> str:
    return percent(statistics.median(changes), 1, sign=True)


def _change(row: dict[str, Any], levels: str) -> float | None:
    return deviation(row[levels]["analytic"], row["uniform"]["analytic"])


def _last_epochs(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The latest measurement of each graph and model, where it holds anything."""
    last: dict[tuple[str, str], dict[str, Any]] = {}
    for measured in sorted(results["measured"], key=lambda m: m["epoch"]):
        if measured["rows"]:
            last[measured["graph"], measured["model"]] = measured
    return list(last.values())


def _paper_table(rows: list[dict[str, Any]]) -> Table:
    shown: list[list[Cell | str]] = []
    for row in rows:
        paper = row.get("paper") or {}
        alpha = row["levels"][1] if len(row["levels"]) > 1 else None
        shown.append(
            [
                number(row["count"], 0),
                *(number(row["sigma"], 3), theirs(number(paper.get("sigma"), 3))),
                *(number(row["uniform"], 4), theirs(number(paper.get("uniform"), 4))),
                *(number(alpha, 3), theirs(number(paper.get("alpha"), 3))),
                *(number(row["optimal"], 4), theirs(number(paper.get("optimal"), 4))),
                *(Cell(percent(row["reduction"], 2), strong=True), theirs(percent(paper.get("reduction"), 2))),
            ]
        )
    names = ("σ", "uniform", "level α", "optimal", "reduction")
    columns = [Column("D or G"), *(c for name in names for c in (Column(name), Column("paper")))]
    return table(
        "variance",
        "Expected variance of stochastic rounding under CN[1/D] with 2 bits and levels 0, α, 3 − α, 3, in units of the "
        "squared bin width of the uniform grid.",
        columns,
        [("", shown)],
        ["“paper” is what follows from the paper’s formulas at the same D."],
    )


def _bits_table(rows: list[dict[str, Any]]) -> Table:
    groups: list[tuple[str, list[list[Cell | str]]]] = [
        (
            f"{bits} bits",
            [
                [
                    number(row["count"], 0),
                    number(row["sigma"], 3),
                    number(row["uniform"], 4),
                    number(row["optimal"], 4),
                    Cell(percent(row["reduction"], 2), strong=True),
                ]
                for row in rows
                if row["bits"] == bits
            ],
        )
        for bits in sorted({row["bits"] for row in rows})
    ]
    return table(
        "variance-bits",
        "The same with more bits; the papers use 2.",
        [Column(name) for name in ("D or G", "σ", "uniform", "optimal", "reduction")],
        groups,
        fold="Expected variance with more bits",
    )


def _measured_table(measured: dict[str, Any], folded: bool) -> Table:
    columns = [
        Column("module", numeric=False),
        Column("operation", numeric=False),
        Column("share a range"),
        Column("uniform"),
        Column("normal, expected"),
        Column("normal"),
        Column("change"),
        Column("fitted"),
        Column("change"),
    ]
    groups = [(setting, map(_changes, rows)) for setting, rows in by_setting(measured["rows"])]
    name = f"{measured['graph']}, {measured['model']}, epoch {measured['epoch']}"
    return table(
        f"variance-{slug(measured['graph'], measured['model'], measured['epoch'])}",
        f"Variance of stochastic rounding on real activations ({name}), in units of the squared bin width of the "
        "uniform grid; changes are against the uniform levels.",
        columns,
        groups,
        [
            "normal: the levels of the clipped normal, whose variance the formula expects to be “normal, expected”. "
            "fitted: the best levels there are for these activations, by dynamic programming (Ben-Basat et al., 2024)."
        ],
        fold=f"Earlier: {name}" if folded else "",
    )


def _changes(row: dict[str, Any]) -> list[Cell | str]:
    fitted = row.get("fitted") or {}
    return [
        row["module"] or MODEL,
        row["operation"],
        number(row["count"], 0),
        number(row["uniform"]["analytic"], 4),
        number(row["normal"].get("expected"), 4),
        number(row["normal"]["analytic"], 4),
        Cell(percent(_change(row, "normal"), 1, sign=True), strong=True),
        number(fitted.get("analytic"), 4),
        percent(_change(row, "fitted") if fitted else None, 1, sign=True),
    ]


def _draws_table(measured: dict[str, Any]) -> Table:
    columns = [Column("module", numeric=False), Column("operation", numeric=False)]
    columns += [column for levels in _LEVELS for column in (Column(levels), Column("Monte Carlo"))]
    groups = [
        (setting, [[row["module"] or MODEL, row["operation"], *_draws(row)] for row in rows])
        for setting, rows in by_setting(measured["rows"])
    ]
    name = f"{measured['graph']}, {measured['model']}, epoch {measured['epoch']}"
    return table(
        f"variance-{slug(measured['graph'], measured['model'], measured['epoch'])}-draws",
        f"The same variances by the formula and by drawing the rounding, with the standard error ({name}).",
        columns,
        groups,
        fold=f"The formula against Monte Carlo, {name}",
    )


def _draws(row: dict[str, Any]) -> list[str]:
    cells = []
    for found in (row.get(levels) or {} for levels in _LEVELS):
        error = f" ± {number(found['error'], 4)}" if found.get("error") is not None else ""
        cells += [number(found.get("analytic"), 4), number(found.get("monte_carlo"), 4) + error]
    return cells


def _formula_picture(table: list[dict[str, Any]]) -> Picture:
    by_bits = {bits: [row for row in table if row["bits"] == bits] for bits in sorted({r["bits"] for r in table})}
    ends = "; ".join(
        f"{bits} bits from {percent(rows[0]['reduction'], 2)} at {rows[0]['count']} elements to "
        f"{percent(rows[-1]['reduction'], 2)} at {rows[-1]['count']:,}"
        for bits, rows in by_bits.items()
    )
    return picture(
        "variance",
        "By the formula: how much less variance the levels of the clipped normal promise, and the variances behind "
        "it with 2 bits. Rings follow from the paper’s formulas.",
        f"Reduction of the expected variance against the elements that share a range: {ends}.",
        lambda layout: _draw_formula(by_bits, layout),
    )


def _draw_formula(by_bits: dict[int, list[dict[str, Any]]], layout: Layout) -> Any:
    drawn = figure(layout, layout.pick(300, 500))
    left, right = drawn.subplots(*layout.pick((1, 2), (2, 1)))
    ring = {"linestyle": "", "marker": "o", "markersize": 8, "markerfacecolor": "none", "markeredgecolor": INK}
    for bits, rows in by_bits.items():
        x = [row["count"] for row in rows]
        style = {"color": _BITS.get(bits, SOFT), "linestyle": _LINES.get(bits, "-"), "marker": "o", "markersize": 3.5}
        left.plot(x, [100 * row["reduction"] for row in rows], label=f"{bits} bits", **style)
        paper = [row for row in rows if (row.get("paper") or {}).get("reduction") is not None]
        left.plot([r["count"] for r in paper], [100 * r["paper"]["reduction"] for r in paper], **ring)
    left.set_title("Reduction, %")
    left.legend(loc="upper left")
    left.set_ylim(bottom=0)
    for name, key in (("uniform", "uniform"), ("normal", "optimal")):
        rows = by_bits.get(2, [])
        label = "uniform levels" if name == "uniform" else "levels of the clipped normal"
        x = [row["count"] for row in rows]
        right.plot(x, [row[key] for row in rows], "o-", color=COLORS[name], markersize=3.5, label=label)
        paper = [row for row in rows if (row.get("paper") or {}).get(key) is not None]
        right.plot([row["count"] for row in paper], [row["paper"][key] for row in paper], **ring)
    right.set_title("Expected variance, 2 bits")
    right.legend(loc="upper left")
    low, high = right.get_ylim()
    right.set_ylim(low, high + 0.35 * (high - low))  # room for the legend
    counts = sorted({row["count"] for rows in by_bits.values() for row in rows})
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_xticks(counts, [f"{count:,}" for count in counts])
        ax.minorticks_off()
        ax.set_xlabel("elements that share a range (D or G)", labelpad=3)
        grid(ax, "y")
    return drawn


def _measured_picture(measured: dict[str, Any]) -> Picture:
    panels = by_setting(measured["rows"])
    numbers = "; ".join(
        f"{setting}: "
        + ", ".join(
            f"{label} {number(row['uniform']['analytic'], 3)} uniform, {number(row['normal']['analytic'], 3)} normal"
            for label, row in zip(module_labels(rows), rows, strict=True)
        )
        for setting, rows in panels
    )
    name = f"{measured['graph']}, {measured['model']}, epoch {measured['epoch']}"
    return picture(
        f"variance-{slug(measured['graph'], measured['model'])}",
        f"On real activations ({name}): the variance with uniform levels, with those of the clipped normal, and with "
        "the best there are for the data. The cross is what the clipped normal leads one to expect of its levels.",
        f"Variance of rounding by layer, {name}. {numbers}.",
        lambda layout: _draw_measured(panels, layout),
    )


def _draw_measured(panels: list[tuple[str, list[dict[str, Any]]]], layout: Layout) -> Any:
    lines = require("matplotlib.lines", "study")
    heights = [max(2, len(rows)) for _, rows in panels]
    if layout.wide:
        drawn = figure(layout, 100 + 24 * max(heights))
        axes = drawn.subplots(1, len(panels), squeeze=False, sharex=True).flat
    else:
        drawn = figure(layout, 70 + 45 * len(panels) + 22 * sum(heights))
        axes = drawn.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights).flat
    markers = {"uniform": "o", "normal": "D", "fitted": "|"}
    for ax, (setting, rows) in zip(axes, panels, strict=True):
        for i, row in enumerate(rows):
            values = [row[levels]["analytic"] for levels in _LEVELS if row.get(levels)]
            ax.plot([min(values), max(values)], [i, i], color="#c3c9d0", linewidth=2, zorder=1)
            for levels in _LEVELS:
                if row.get(levels):
                    size = 10 if levels == "fitted" else 5.5
                    style = {
                        "color": COLORS[levels],
                        "markersize": size,
                        "markeredgewidth": 2 if levels == "fitted" else 0,
                    }
                    ax.plot(row[levels]["analytic"], i, markers[levels], **style)
            if row["normal"].get("expected") is not None:
                ax.plot(row["normal"]["expected"], i, "x", color=INK, markersize=4.5, markeredgewidth=1)
        ax.set_yticks(range(len(rows)), [short(label, 24) for label in module_labels(rows)])
        ax.set_ylim(len(rows) - 0.5, -0.5)
        counts = sorted({row["count"] for row in rows})
        ax.set_title(f"{setting}, {' or '.join(f'{c:,}' for c in counts)} share a range")
        ax.xaxis.set_tick_params(labelbottom=True)
        grid(ax, "x")
    drawn.supxlabel("variance, in squared bin widths", fontsize=layout.font, color=SOFT)
    names = {"uniform": "uniform", "normal": "clipped normal", "fitted": "fitted to the data"}
    handles = [
        lines.Line2D(
            [], [], marker=markers[k], linestyle="", color=COLORS[k], markeredgewidth=2 if k == "fitted" else 0, label=v
        )
        for k, v in names.items()
    ]
    handles.append(lines.Line2D([], [], marker="x", linestyle="", color=INK, markersize=4.5, label="expected"))
    legend_above(drawn, handles, layout.pick(4, 2))
    return drawn
