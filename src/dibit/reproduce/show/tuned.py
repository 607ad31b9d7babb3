"""Tuned baselines: what compression costs where plain training is at its best."""

from __future__ import annotations

from typing import Any

from dibit.reproduce.show.paired import accuracy, cost, difference, heading
from dibit.reproduce.tables import Cell, Column, Fact, Table, table
from dibit.tools.errors import require
from dibit.tools.figures import COLORS, SOFT, Layout, Picture, figure, grid, legend_above, picture
from dibit.tools.number_format import NONE, mean, number, points

TITLE = "Tuned baselines"
CLAIM = (
    "Published hyper-parameters and splits (Luo, Shi and Wu, NeurIPS 2024 Datasets and Benchmarks, arXiv:2406.08993), "
    "each recipe paired with plain FP32 by seed. A recipe is harmful in a cell where the whole 95 % interval of its "
    "mean difference is below 0, harmless where the interval reaches 0 and is above −0.3 points, and else undecided."
)


def facts(results: dict[str, Any]) -> list[Fact]:
    return [
        Fact(
            f"{recipe} minus FP32, points of test accuracy",
            points(found["mean"]),
            f"95 % interval {points(found['low'])} to {points(found['high'])}, mean of {found['cells']} cells",
        )
        for recipe, found in (results.get("together") or {}).items()
    ]


def sentences(results: dict[str, Any]) -> list[str]:
    said = []
    rows = results["rows"]
    for recipe in dict.fromkeys(row["recipe"] for row in rows if row.get("verdict")):
        verdicts = {row["cell"]: row["verdict"] for row in rows if row["recipe"] == recipe and row.get("verdict")}
        counts = {name: [cell for cell, found in verdicts.items() if found == name] for name in _VERDICTS}
        words = ", ".join(f"{len(cells)} {name} ({', '.join(cells)})" for name, cells in counts.items() if cells)
        said.append(f"{recipe}: of {len(verdicts)} cells {words}.")
    for recipe, found in (results.get("together") or {}).items():
        if found.get("epochs_ratio") is not None:
            said.append(
                f"{recipe} takes {number(found['epochs_ratio'])} times plain’s epochs to reach 99 % of plain’s best "
                "validation accuracy."
            )
    for row in rows:
        if row["recipe"] == "none" and row.get("published") is not None and row["test"]:
            gap = 100 * (mean(row["test"]) or 0) - row["published"]
            said.append(f"{row['cell']}: plain training is {number(gap, 2, sign=True)} points from the published mean.")
    return said


_VERDICTS = ("harmless", "undecided", "harmful")


def tables(results: dict[str, Any]) -> list[Table]:
    if not results["rows"]:
        return []
    columns = [
        Column("recipe", numeric=False),
        Column("test accuracy %"),
        Column("published %"),
        Column("minus FP32, points"),
        Column("95 % interval"),
        Column("verdict", numeric=False),
        Column("epochs to 99 %"),
        Column("noise"),
        Column("saved MB"),
        Column("peak MB"),
        Column("s an epoch"),
        Column("seeds"),
    ]
    groups = []
    for cell in dict.fromkeys(row["cell"] for row in results["rows"]):
        own = [row for row in results["rows"] if row["cell"] == cell]
        groups.append((heading(cell, own[0]), [_cells(row) for row in own]))
    return [
        table(
            "tuned",
            "Test accuracy at the best validation epoch (mean ± standard deviation over seeds), the difference to "
            "plain FP32 paired by seed, epochs to 99 % of plain’s best validation accuracy to plain’s own, the "
            "gradient’s squared error over its square (median of a training), memory and time on one thread.",
            columns,
            groups,
        )
    ]


def _cells(row: dict[str, Any]) -> list[Cell | str]:
    published = row.get("published")
    return [
        row["recipe"],
        accuracy(row),
        Cell(NONE) if published is None or row["recipe"] != "none" else Cell(number(published), "paper"),
        *difference(row),
        row.get("verdict") or NONE,
        number(row.get("epochs_ratio")),
        number(row.get("noise"), 3),
        *cost(row),
    ]


def pictures(results: dict[str, Any]) -> list[Picture]:
    rows = [row for row in results["rows"] if row.get("difference")]
    if not rows:
        return []
    numbers = "; ".join(f"{row['cell']} {row['recipe']} {points(row['difference']['mean'])}" for row in rows)
    return [
        picture(
            "tuned",
            "Difference of test accuracy to plain FP32 in percentage points: each seed (small), the mean, and its 95 % "
            "interval. Right of the dashed line a loss counts as none.",
            f"Difference of test accuracy to plain FP32 in points. {numbers}.",
            lambda layout: _draw(rows, layout),
        )
    ]


def _color(recipe: str) -> str:
    """Of a recipe: that of the papers' setting of this name."""
    return COLORS.get({"exact": "EXACT", "iexact": "i-EXACT"}.get(recipe, recipe), SOFT)


def _draw(rows: list[dict[str, Any]], layout: Layout) -> Any:
    lines = require("matplotlib.lines", "study")
    drawn = figure(layout, 90 + 26 * len(rows))
    ax = drawn.subplots()
    for y, row in enumerate(rows):
        color, change = _color(row["recipe"]), row["difference"]
        values = [100 * value for value in change.get("values") or []]
        ax.plot(values, [y] * len(values), "o", color=color, markersize=3.5, alpha=0.45, markeredgewidth=0)
        if change.get("low") is not None and change.get("high") is not None:
            ends = [100 * change["low"], 100 * change["high"]]
            ax.plot(ends, [y, y], color=color, linewidth=2.2, solid_capstyle="butt")
        ax.plot(100 * change["mean"], y, "o", color=color, markersize=6)
    ax.axvline(0, color=COLORS["FP32"], linewidth=1)
    ax.axvline(-0.3, color=SOFT, linewidth=1, linestyle=(0, (3, 3)))
    ax.set_yticks(range(len(rows)), [row["cell"] for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_title(layout.pick("Minus plain FP32, percentage points", "Minus FP32, points"))
    grid(ax, "x")
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    handles = [lines.Line2D([], [], marker="o", linestyle="", color=_color(recipe), label=recipe) for recipe in recipes]
    legend_above(drawn, handles, layout.pick(6, 3))
    return drawn
