"""Accuracy: what training with compressed activations costs against plain FP32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dibit.reproduce.show.paired import accuracy, cost, difference, heading
from dibit.reproduce.tables import Cell, Column, Fact, Table, table
from dibit.tools.errors import require
from dibit.tools.figures import COLORS, SOFT, Layout, Picture, figure, grid, legend_above, picture
from dibit.tools.number_format import NONE, mean, points, short, spread

TITLE = "Accuracy"
CLAIM = (
    "EXACT’s paper claims that 0.2 to 0.5 % of accuracy is lost, for 10 to 25 % more time. Here every recipe trains "
    "with the same seeds as plain FP32, so that differences are paired."
)


def facts(results: dict[str, Any]) -> list[Fact]:
    found = []
    rows = [row for row in results["rows"] if row.get("difference")]
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        changes = [row["difference"]["mean"] for row in rows if row["recipe"] == recipe]
        reach = f"{points(min(changes))} to {points(max(changes))} over {len(changes)} pairs of graph and model"
        reach = reach if len(changes) > 1 else "on one graph and model"
        detail = f"{reach}; the paper: 0.2 to 0.5 % lost" if recipe == "EXACT" else reach
        found.append(Fact(f"{recipe} minus FP32, points of test accuracy", points(mean(changes)), detail))
    return found


def sentences(results: dict[str, Any]) -> list[str]:
    said = []
    rows = [row for row in results["rows"] if row.get("difference")]
    bounded = [
        row for row in rows if row["difference"].get("low") is not None and row["difference"].get("high") is not None
    ]
    if bounded:
        around = [row for row in bounded if row["difference"]["low"] <= 0 <= row["difference"]["high"]]
        below = [row for row in bounded if row["difference"]["high"] < 0]
        said.append(
            f"Of {len(bounded)} paired differences to FP32, {len(around)} have a 95 % interval that holds zero, "
            f"{len(below)} lie below zero and {len(bounded) - len(around) - len(below)} above."
        )
    if rows:
        worst = min(rows, key=lambda row: row["difference"]["mean"])
        said.append(
            f"The largest mean loss is {points(worst['difference']['mean'])} points: {worst['recipe']} on "
            f"{worst['graph']} ({worst['model']})."
        )
    said += [f"Not run on {skipped['graph']}: {skipped['why']}" for skipped in results.get("skipped") or []]
    return said


def tables(results: dict[str, Any]) -> list[Table]:
    found = [_table(results["rows"])] if results["rows"] else []
    return found + ([_paper_table(results["paper"])] if results.get("paper") else [])


def pictures(results: dict[str, Any]) -> list[Picture]:
    groups = [(title, rows) for title, rows in _groups(results["rows"]) if any(row["test"] for row in rows)]
    if not groups:
        return []
    numbers = "; ".join(
        f"{title}: " + ", ".join(f"{row['recipe']} {spread(row['test'])}{_change(row)}" for row in rows)
        for title, rows in groups
    )
    return [
        picture(
            "accuracy",
            "Test accuracy of every recipe: the difference to plain FP32 with its 95 % interval, paired by seed, and "
            "the accuracies themselves (small: each seed, bar: mean). An interval that ends in an arrow goes on.",
            f"Test accuracy in %, with the difference to FP32 in points. {numbers}.",
            lambda layout: _draw(groups, layout),
        )
    ]


def _change(row: dict[str, Any]) -> str:
    return f" ({points(row['difference']['mean'])})" if row.get("difference") else ""


def _groups(rows: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The rows of each graph and model, in order."""
    keys = dict.fromkeys((row["graph"], row["model"]) for row in rows)
    return [(f"{g}, {m}", [row for row in rows if (row["graph"], row["model"]) == (g, m)]) for g, m in keys]


def _table(rows: list[dict[str, Any]]) -> Table:
    columns = [
        Column("recipe", numeric=False),
        Column("test accuracy %"),
        Column("minus FP32, points"),
        Column("95 % interval"),
        Column("saved MB"),
        Column("peak MB"),
        Column("s an epoch"),
        Column("seeds"),
    ]
    groups = []
    for title, own in _groups(rows):
        groups.append((heading(title, own[0]), map(_cells, own)))
    return table(
        "accuracy",
        "Test accuracy (mean ± standard deviation over seeds), the difference to plain FP32 paired by seed, memory "
        "and time.",
        columns,
        groups,
    )


def _cells(row: dict[str, Any]) -> list[Cell | str]:
    return [row["recipe"], accuracy(row), *difference(row), *cost(row)]


def _paper_table(paper: list[dict[str, Any]]) -> Table:
    marks = [row.get("mark") or "paper" for row in paper]
    rows = [
        [row["setting"], Cell(row["accuracy"], mark), Cell(row.get("epochs_per_second") or NONE, mark)]
        for row, mark in zip(paper, marks, strict=True)
    ]
    remembered = " (remembered, not confirmed)" if "remembered" in marks else ""
    return table(
        "accuracy-paper",
        f"The papers’ accuracies on ogbn-arxiv{remembered}, on a GPU: not the graphs above.",
        [Column("setting", numeric=False), Column("accuracy %"), Column("epochs a second")],
        [("", rows)],
    )


def _draw(groups: list[tuple[str, list[dict[str, Any]]]], layout: Layout) -> Any:
    lines = require("matplotlib.lines", "study")
    recipes = list(dict.fromkeys(row["recipe"] for _, rows in groups for row in rows))
    steps = [len(rows) + 1.2 for _, rows in groups]  # a line for the name of the group
    height = sum(steps)
    if layout.wide:
        drawn = figure(layout, 75 + 15 * height)
        change, level = drawn.subplots(1, 2, sharey=True)
    else:
        drawn = figure(layout, 130 + 28 * height)
        change, level = drawn.subplots(2, 1)
    reach = _reach([row["difference"] for _, rows in groups for row in rows if row.get("difference")])
    y, tests = 0.0, [100 * t for _, rows in groups for row in rows for t in row["test"]]
    for title, rows in groups:
        for ax in (change, level)[: layout.pick(1, 2)]:
            name = {"weight": "bold", "va": "center", "fontsize": layout.font - 0.5}
            ax.text(0, y, short(title), transform=ax.get_yaxis_transform(), **name)
        for ax in (change, level):
            ax.axhspan(y - 0.6, y + 0.6, color="#f1f3f5", linewidth=0, zorder=0)
        for row in rows:
            y += 1
            _draw_row(change, level, row, y, reach)
        y += 1.2
    for ax in (change, level):
        ax.set_ylim(height - 0.6, -0.6)
        ax.set_yticks([])
        grid(ax, "x")
    change.axvline(0, color=COLORS["FP32"], linewidth=1)
    change.set_title("Minus plain FP32, percentage points")
    level.set_title("Test accuracy, %")
    margin = 0.04 * (max(tests) - min(tests) or 1)
    level.set_xlim(min(tests) - margin, max(tests) + margin)
    handles = [
        lines.Line2D([], [], marker="o", linestyle="", color=COLORS.get(recipe, SOFT), label=recipe)
        for recipe in recipes
    ]
    legend_above(drawn, handles, layout.pick(6, 3))
    return drawn


def _reach(differences: Sequence[dict[str, Any]]) -> float:
    """How far from zero, in points, the differences are drawn: all means, and the ends of most intervals.

    One interval of two seeds can be a hundred times wider than the rest, which it must not flatten.
    """
    means = [abs(100 * difference["mean"]) for difference in differences]
    ends = sorted(abs(100 * d[end]) for d in differences for end in ("low", "high") if d.get(end) is not None)
    most = ends[int(0.75 * (len(ends) - 1))] if ends else 0.0
    return max([1.1 * mean for mean in means] + [1.5 * most, 0.01])


def _draw_row(change: Any, level: Any, row: dict[str, Any], y: float, reach: float) -> None:
    color = COLORS.get(row["recipe"], SOFT)
    if found := row.get("difference"):
        low, high = found.get("low"), found.get("high")
        if low is not None and high is not None:
            ends = [max(100 * low, -reach), min(100 * high, reach)]
            change.plot(ends, [y, y], color=color, linewidth=1.8, solid_capstyle="butt")
            for end, cut, arrow in ((-reach, 100 * low < -reach, "<"), (reach, 100 * high > reach, ">")):
                if cut:
                    change.plot(end, y, arrow, color=color, markersize=5, markeredgewidth=0)
        change.plot(100 * found["mean"], y, "o", color=color, markersize=5.5)
    values = [100 * t for t in row["test"]]
    if values:
        level.plot(values, [y] * len(values), "o", color=color, markersize=3.5, alpha=0.55, markeredgewidth=0)
        level.plot(mean(values), y, "|", color=color, markersize=9, markeredgewidth=2)
