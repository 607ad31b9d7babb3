"""Tuned baselines: what compression costs where plain training is at its best."""

from __future__ import annotations

from collections.abc import Iterator

from dibit.reproduce.panels import Guide
from dibit.reproduce.records import Fact, Record
from dibit.reproduce.schema import JsonObject
from dibit.reproduce.views.paired import TrainingRow, trainings
from dibit.tools.number_format import interval, mean, number, points

TITLE = "Tuned baselines"
CLAIM = (
    "Published hyper-parameters and splits (Luo, Shi and Wu, NeurIPS 2024 Datasets and Benchmarks, arXiv:2406.08993), "
    "each recipe paired with plain FP32 by seed. A recipe is harmful in a cell where the whole 95 % interval of its "
    "mean difference is below 0, harmless where the interval reaches 0 and is above −0.3 points, and else undecided."
)
_VERDICTS = ("harmless", "undecided", "harmful")


class TunedRow(TrainingRow):
    cell: str


class Together(JsonObject):
    cells: int
    mean: float
    low: float
    high: float
    epochs_ratio: float | None = None


class Results(JsonObject):
    rows: list[TunedRow]
    together: dict[str, Together] | None = None


def records(results: Results) -> Iterator[Record]:
    yield from _findings(results)
    cells = dict.fromkeys(row.cell for row in results.rows)
    yield from trainings(
        "tuned",
        [(cell, [row for row in results.rows if row.cell == cell]) for cell in cells],
        "Test accuracy in each cell: the difference to plain FP32 in percentage points (small: each seed, line: 95 % "
        "interval), and the accuracies themselves. Right of the dashed line a loss counts as none.",
        "Test accuracy at the best validation epoch (mean ± standard deviation over seeds), the difference to plain "
        "FP32 paired by seed, epochs to 99 % of plain’s best validation accuracy to plain’s own, the gradient’s "
        "squared error over its square (median of a training), memory and time on one thread.",
        [Guide(-0.3, "soft", "−0.3 points")],
    )


def _findings(results: Results) -> Iterator[Record]:
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
            times = number(found.epochs_ratio)
            yield f"{recipe} takes {times} times plain’s epochs to reach 99 % of plain’s best validation accuracy."
    for row in results.rows:
        if row.recipe == "none" and row.published is not None and row.test:
            gap = number(100 * (mean(row.test) or 0) - row.published, 2, sign=True)
            yield f"{row.cell}: plain training is {gap} points from the published mean."
