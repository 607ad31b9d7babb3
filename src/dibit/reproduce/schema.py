"""What section files hold: MB of 2^20 bytes, accuracies from 0 to 1, seconds.

Fields with a default may be missing or null, those that are not named here are let through.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

T = TypeVar("T")


class Record(BaseModel):
    """A JSON object; a text is no number and a number no text."""

    model_config = ConfigDict(strict=True)


class Section(Record, Generic[T]):
    """A file: results, and how, when and where they were measured."""

    section: str
    finished: bool
    results: T
    settings: dict[str, Any] | None = None
    seconds: float | None = None
    date: str | None = None
    machine: dict[str, Any] | None = None
    versions: dict[str, str] | None = None


class MemoryRow(Record):
    setting: str
    measured_mb: float
    allocator_mb: float | None = None
    closed_mb: float | None = None
    closed_cuda_mb: float | None = None
    log_mb: float | None = None
    bytes_per_node: float | None = None
    by_kind: dict[str, float] | None = None


class Shape(Record):
    name: str
    nodes: int
    edges: int
    rows: list[MemoryRow]
    hidden: int | None = None
    layers: int | None = None


class Memory(Record):
    shapes: list[Shape]


class TimingRow(Record):
    setting: str
    saved_mb: float
    seconds: float
    to_exact: float | None = None
    to_fp32: float | None = None
    low: float | None = None
    high: float | None = None


class Timing(Record):
    shape: str
    nodes: int
    edges: int
    rows: list[TimingRow]
    rounds: int | None = None


class BlocksRow(Record):
    setting: str
    saved_mb: float
    gradient_error: dict[str, float]  # by epoch
    test: list[float]


class BlocksGraph(Record):
    name: str
    model: str
    rows: list[BlocksRow]
    epochs: int | None = None
    seeds: list[int] | None = None


class Blocks(Record):
    graphs: list[BlocksGraph]
    timing: Timing | None = None
    paper: dict[str, str] | None = None


class Levels(Record):
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
        return self.levels[1] if len(self.levels) > 1 else None


class LevelVariance(Record):
    analytic: float
    monte_carlo: float | None = None
    error: float | None = None
    expected: float | None = None


class Layer(Record):
    setting: str
    module: str
    operation: str
    count: int  # elements that share a range
    elements: int | None = None


class VarianceRow(Layer):
    uniform: LevelVariance
    normal: LevelVariance
    fitted: LevelVariance | None = None


class Measured(Record):
    graph: str
    model: str
    epoch: int
    rows: list[VarianceRow]


class Variance(Record):
    table: list[Levels]
    measured: list[Measured]


class DistributionRow(Layer):
    epoch: int
    histogram: list[float]
    divergence: dict[str, float]
    models: dict[str, list[float]]
    nearest: str
    holds: bool
    width: int | None = None
    atom: float | None = None


class DistributionGraph(Record):
    name: str
    model: str
    rows: list[DistributionRow]


class Distribution(Record):
    graphs: list[DistributionGraph]
    verdicts: list[str] | None = None


class Difference(Record):
    mean: float
    low: float | None = None
    high: float | None = None
    values: list[float] | None = None


class TrainingRow(Record):
    graph: str
    model: str
    recipe: str
    test: list[float]
    layers: int | None = None
    hidden: int | None = None
    norm: str | None = None
    epochs: int | None = None
    saved_mb: float | None = None
    peak_mb: float | None = None
    seconds: float | None = None
    difference: Difference | None = None


class TunedRow(TrainingRow):
    cell: str
    published: float | None = None
    verdict: str | None = None
    epochs_ratio: float | None = None
    noise: float | None = None


class Skipped(Record):
    graph: str
    why: str


class PaperAccuracy(Record):
    setting: str
    accuracy: str
    epochs_per_second: str | None = None
    mark: str | None = None


class Accuracy(Record):
    rows: list[TrainingRow]
    skipped: list[Skipped] | None = None
    paper: list[PaperAccuracy] | None = None


class Together(Record):
    cells: int
    mean: float
    low: float
    high: float
    epochs_ratio: float | None = None


class Tuned(Record):
    rows: list[TunedRow]
    together: dict[str, Together] | None = None


RESULTS: dict[str, type[Record]] = {
    "memory": Memory,
    "blocks": Blocks,
    "variance": Variance,
    "distribution": Distribution,
    "accuracy": Accuracy,
    "tuned": Tuned,
}
