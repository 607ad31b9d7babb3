"""Accuracy: what training with compressed activations costs against plain FP32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dibit.reproduce.records import SETTING, Fact, Record, paper
from dibit.reproduce.schema import JsonObject
from dibit.reproduce.views.paired import TrainingRow, trainings
from dibit.tools.markdown import Table, table
from dibit.tools.number_format import NONE, mean, points

_REMEMBERED = "† Remembered, not confirmed: this number could not be checked against its source; do not quote it."
TITLE = "Accuracy"
CLAIM = (
    "EXACT’s paper claims that 0.2 to 0.5 % of accuracy is lost, for 10 to 25 % more time. Here every recipe trains "
    "with the same seeds as plain FP32, so that differences are paired."
)


class Skipped(JsonObject):
    graph: str
    why: str


class PaperAccuracy(JsonObject):
    setting: str
    accuracy: str
    epochs_per_second: str | None = None
    mark: str | None = None


class Results(JsonObject):
    rows: list[TrainingRow]
    skipped: list[Skipped] | None = None
    paper: list[PaperAccuracy] | None = None


def records(results: Results) -> Iterator[Record]:
    yield from _findings(results.rows)
    for skipped in results.skipped or ():
        yield f"Not run on {skipped.graph}: {skipped.why}"
    keys = dict.fromkeys((row.graph, row.model) for row in results.rows)
    yield from trainings(
        "accuracy",
        [(f"{g}, {m}", [row for row in results.rows if (row.graph, row.model) == (g, m)]) for g, m in keys],
        "Test accuracy of every recipe: the difference to plain FP32 with its 95 % interval, paired by seed, and the "
        "accuracies themselves (small: each seed, large: mean). An interval that reaches the edge goes on.",
        "Test accuracy (mean ± standard deviation over seeds), the difference to plain FP32 paired by seed, memory and "
        "time.",
    )
    if results.paper:
        yield _paper_table(results.paper)


def _findings(rows: Sequence[TrainingRow]) -> Iterator[Record]:
    found = [(row, row.difference) for row in rows if row.difference]
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


def _paper_table(rows: Sequence[PaperAccuracy]) -> Table:
    remembered = any(row.mark == "remembered" for row in rows)
    confirmed = " (remembered, not confirmed)" if remembered else ""
    return table(
        f"The papers’ accuracies on ogbn-arxiv{confirmed}, on a GPU: not the graphs above.",
        [
            SETTING,
            ("accuracy %", lambda row: paper(row.accuracy, row.mark)),
            ("epochs a second", lambda row: paper(row.epochs_per_second or NONE, row.mark)),
        ],
        [("", rows)],
        [_REMEMBERED] * remembered,
    )
