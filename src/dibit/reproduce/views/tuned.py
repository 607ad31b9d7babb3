"""Tuned baselines: what compression costs where plain training is at its best."""

from __future__ import annotations

from collections.abc import Iterator

from dibit.reproduce.panels import Figure, Marks
from dibit.reproduce.records import Cell, Column, Fact, Record, table
from dibit.reproduce.schema import Tuned, TunedRow
from dibit.reproduce.views.paired import ACCURACY, COST, DIFFERENCE, RECIPE, heading, panels
from dibit.tools.number_format import NONE, interval, mean, number, points

TITLE = "Tuned baselines"
CLAIM = (
    "Published hyper-parameters and splits (Luo, Shi and Wu, NeurIPS 2024 Datasets and Benchmarks, arXiv:2406.08993), "
    "each recipe paired with plain FP32 by seed. A recipe is harmful in a cell where the whole 95 % interval of its "
    "mean difference is below 0, harmless where the interval reaches 0 and is above −0.3 points, and else undecided."
)
_VERDICTS = ("harmless", "undecided", "harmful")


def records(results: Tuned) -> Iterator[Record]:
    yield from _findings(results)
    groups = [(c, [r for r in results.rows if r.cell == c]) for c in dict.fromkeys(row.cell for row in results.rows)]
    if any(row.difference for row in results.rows):
        yield Figure(
            "tuned",
            "Test accuracy in each cell: the difference to plain FP32 in percentage points (small: each seed, line: "
            "95 % interval), and the accuracies themselves. Right of the dashed line a loss counts as none.",
            panels(groups, [Marks("guide dashed", "soft", [(-0.3, 0)], "−0.3 points")]),
        )
    if groups:
        yield table(
            "tuned",
            "Test accuracy at the best validation epoch (mean ± standard deviation over seeds), the difference to "
            "plain FP32 paired by seed, epochs to 99 % of plain’s best validation accuracy to plain’s own, the "
            "gradient’s squared error over its square (median of a training), memory and time on one thread.",
            [
                *(RECIPE, ACCURACY, Column("published %", _published), *DIFFERENCE),
                Column("verdict", lambda row: row.verdict or NONE, numeric=False),
                Column("epochs to 99 %", lambda row: number(row.epochs_ratio)),
                Column("noise", lambda row: number(row.noise, 3)),
                *COST,
            ],
            [(heading(cell, rows[0]), rows) for cell, rows in groups],
        )


def _published(row: TunedRow) -> Cell:
    known = row.published is not None and row.recipe == "none"
    return Cell(number(row.published), "paper") if known else Cell(NONE)


def _findings(results: Tuned) -> Iterator[Record]:
    together = results.together or {}
    for recipe, found in together.items():
        yield Fact(
            f"{recipe} minus FP32, points of test accuracy",
            points(found.mean),
            f"95 % interval {interval(found.low, found.high, points)}, mean of {found.cells} cells",
        )
    judged = [row for row in results.rows if row.verdict]
    for recipe in dict.fromkeys(row.recipe for row in judged):
        own = [row for row in judged if row.recipe == recipe]
        cells = {verdict: [row.cell for row in own if row.verdict == verdict] for verdict in _VERDICTS}
        counts = [f"{len(names)} {verdict} ({', '.join(names)})" for verdict, names in cells.items() if names]
        yield f"{recipe}: of {len(own)} cells {', '.join(counts)}."
    for recipe, found in together.items():
        if found.epochs_ratio is not None:
            yield (
                f"{recipe} takes {number(found.epochs_ratio)} times plain’s epochs to reach 99 % of plain’s best "
                "validation accuracy."
            )
    for row in results.rows:
        if row.recipe == "none" and row.published is not None and row.test:
            gap = number(100 * (mean(row.test) or 0) - row.published, 2, sign=True)
            yield f"{row.cell}: plain training is {gap} points from the published mean."
