"""Accuracy: what training with compressed activations costs against plain FP32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dibit.reproduce.panels import Figure
from dibit.reproduce.records import SETTING, Cell, Column, Fact, Record, table
from dibit.reproduce.schema import Accuracy, PaperAccuracy
from dibit.reproduce.views.paired import ACCURACY, COST, DIFFERENCE, RECIPE, heading, panels
from dibit.tools.number_format import NONE, mean, points

TITLE = "Accuracy"
CLAIM = (
    "EXACT’s paper claims that 0.2 to 0.5 % of accuracy is lost, for 10 to 25 % more time. Here every recipe trains "
    "with the same seeds as plain FP32, so that differences are paired."
)


def records(results: Accuracy) -> Iterator[Record]:
    yield from _findings(results)
    keys = dict.fromkeys((row.graph, row.model) for row in results.rows)
    groups = [(f"{g}, {m}", [row for row in results.rows if (row.graph, row.model) == (g, m)]) for g, m in keys]
    if any(row.test for row in results.rows):
        yield Figure(
            "accuracy",
            "Test accuracy of every recipe: the difference to plain FP32 with its 95 % interval, paired by seed, and "
            "the accuracies themselves (small: each seed, large: mean). An interval that ends in an arrow goes on.",
            panels(groups),
        )
    if groups:
        yield table(
            "accuracy",
            "Test accuracy (mean ± standard deviation over seeds), the difference to plain FP32 paired by seed, memory "
            "and time.",
            [RECIPE, ACCURACY, *DIFFERENCE, *COST],
            [(heading(title, rows[0]), rows) for title, rows in groups],
        )
    if results.paper:
        yield _paper_table(results.paper)


def _findings(results: Accuracy) -> Iterator[Record]:
    found = [(row, row.difference) for row in results.rows if row.difference]
    for recipe in dict.fromkeys(row.recipe for row, _ in found):
        changes = [difference.mean for row, difference in found if row.recipe == recipe]
        detail = f"{points(min(changes))} to {points(max(changes))} over {len(changes)} pairs of graph and model"
        detail = detail if len(changes) > 1 else "on one graph and model"
        detail += "; the paper: 0.2 to 0.5 % lost" if recipe == "EXACT" else ""
        yield Fact(f"{recipe} minus FP32, points of test accuracy", points(mean(changes)), detail)
    bounded = [(d.low, d.high) for _, d in found if d.low is not None and d.high is not None]
    if bounded:
        around, below = sum(low <= 0 <= high for low, high in bounded), sum(high < 0 for _, high in bounded)
        yield (
            f"Of {len(bounded)} paired differences to FP32, {around} have a 95 % interval that holds zero, "
            f"{below} lie below zero and {len(bounded) - around - below} above."
        )
    if found:
        worst, difference = min(found, key=lambda pair: pair[1].mean)
        where = f"{worst.recipe} on {worst.graph} ({worst.model})"
        yield f"The largest mean loss is {points(difference.mean)} points: {where}."
    for skipped in results.skipped or ():
        yield f"Not run on {skipped.graph}: {skipped.why}"


def _paper_table(paper: Sequence[PaperAccuracy]) -> Record:
    remembered = " (remembered, not confirmed)" if any(row.mark == "remembered" for row in paper) else ""
    return table(
        "accuracy-paper",
        f"The papers’ accuracies on ogbn-arxiv{remembered}, on a GPU: not the graphs above.",
        [
            SETTING,
            Column("accuracy %", lambda row: Cell(row.accuracy, row.mark or "paper")),
            Column("epochs a second", lambda row: Cell(row.epochs_per_second or NONE, row.mark or "paper")),
        ],
        [("", paper)],
    )
