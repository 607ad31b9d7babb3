"""Blocks: memory, time, gradient error and accuracy against the block size G/R."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from dibit.reproduce.panels import Dot, Figure, Guide, RowPanel
from dibit.reproduce.paper import CLAIMS
from dibit.reproduce.records import SETTING, Fact, Record
from dibit.reproduce.schema import JsonObject
from dibit.tools.markdown import Column, Table, strong, table
from dibit.tools.number_format import NONE, between, deviation, interval, mean, number, percent, points, spread

TITLE = "Blocks"
CLAIM = (
    "i-EXACT reads the projected activations as blocks of G elements that share one range, where EXACT gives each "
    "row of R elements its own. Its paper claims more than 15 % less memory than EXACT and about 5 % less time at "
    "INT2."
)
_BLOCKS = "G/R = 64"
_FASTER = 0.95  # the paper's "about 5 %", as a ratio of times


class TimingRow(JsonObject):
    setting: str
    saved_mb: float
    seconds: float
    to_exact: float | None = None
    to_fp32: float | None = None
    low: float | None = None
    high: float | None = None


class Timing(JsonObject):
    shape: str
    nodes: int
    edges: int
    rows: list[TimingRow]
    rounds: int | None = None


class BlocksRow(JsonObject):
    setting: str
    saved_mb: float
    gradient_error: dict[str, float]  # by epoch
    test: list[float]

    @property
    def errors(self) -> list[float]:
        """Gradient errors in the order of their epochs."""
        return [self.gradient_error[epoch] for epoch in sorted(self.gradient_error, key=float)]


class GraphBlocks(JsonObject):
    name: str
    model: str
    rows: list[BlocksRow]
    epochs: int | None = None
    seeds: list[int] | None = None

    def changes(self, row: BlocksRow) -> list[float]:
        """Test accuracies less plain FP32's with the same seeds; nothing where they cannot be paired."""
        plain: list[float] = next((other.test for other in self.rows if other.setting == "FP32"), [])
        paired = row.setting != "FP32" and len(plain) == len(row.test)
        return [a - b for a, b in zip(row.test, plain, strict=True)] if paired else []


class Results(JsonObject):
    graphs: list[GraphBlocks]
    timing: Timing | None = None


def records(results: Results) -> Iterator[Record]:
    graphs = [graph for graph in results.graphs if graph.rows]
    timing = results.timing if results.timing and results.timing.rows else None
    if timing:
        yield from _facts(timing)
    yield from _sentences(graphs)
    yield _figure(timing, graphs)
    if timing:
        yield _timing_table(timing)
    yield from map(_graph_table, graphs)


def _facts(timing: Timing) -> Iterator[Fact]:
    rows = {row.setting: row for row in timing.rows}
    if "EXACT" not in rows or _BLOCKS not in rows:
        return
    blocks, off = rows[_BLOCKS], percent(deviation(rows[_BLOCKS].saved_mb, rows["EXACT"].saved_mb), 1, sign=True)
    yield Fact(f"Memory of {_BLOCKS} against EXACT", off, f"the paper: {CLAIMS['less_memory']} less")
    if blocks.to_exact is not None:
        detail = f"the paper: {CLAIMS['faster']} faster; quartiles {interval(blocks.low, blocks.high, _change)}"
        yield Fact(f"Time of {_BLOCKS} against EXACT", _change(blocks.to_exact), detail)


def _change(ratio: float) -> str:
    return percent(ratio - 1, 1, sign=True)


def _sentences(graphs: Sequence[GraphBlocks]) -> Iterator[str]:
    for setting, what in ((_BLOCKS, _BLOCKS), ("whole tensor", "the whole tensor as one block")):
        last = [{row.setting: row.errors[-1] for row in graph.rows if row.errors} for graph in graphs]
        ratios = [own[setting] / own["EXACT"] for own in last if setting in own and own.get("EXACT")]
        if ratios:
            found = between(ratios)
            yield f"With {what}, the gradient’s squared error after the last epoch is {found} times EXACT’s."
    changes = [mean(graph.changes(row)) for graph in graphs for row in graph.rows]
    shifts = [shift for shift in changes if shift is not None]
    if shifts:
        found = f"{points(min(shifts))} to {points(max(shifts))}"
        yield f"Against plain FP32 with the same seeds, the mean test accuracy of the settings moves by {found} points."


def _timing_table(timing: Timing) -> Table:
    exact = next((row.saved_mb for row in timing.rows if row.setting == "EXACT"), None)

    def against(row: TimingRow) -> str:
        return NONE if row.setting == "FP32" else percent(deviation(row.saved_mb, exact), 1, sign=True)

    return table(
        f"Saved MB and seconds a step on the {timing.shape} shape ({timing.nodes:,} nodes, {timing.edges:,} edges)."
        + (f" Medians over {timing.rounds} rounds, settings in turn." if timing.rounds else ""),
        [
            SETTING,
            ("saved MB", lambda row: strong(number(row.saved_mb))),
            ("against EXACT", against),
            ("s a step", lambda row: number(row.seconds, 3)),
            ("time to EXACT", lambda row: strong(number(row.to_exact, 3))),
            ("quartiles", lambda row: interval(row.low, row.high, lambda end: number(end, 3))),
            ("time to FP32", lambda row: number(row.to_fp32, 3)),
        ],
        [("", timing.rows)],
    )


def _graph_table(graph: GraphBlocks) -> Table:
    def error(epoch: str) -> Column:
        return (f"gradient error, epoch {epoch}", lambda row: number(row.gradient_error.get(epoch), 3))

    epochs = sorted({epoch for row in graph.rows for epoch in row.gradient_error}, key=float)
    count = len(graph.seeds or ())
    trained = (f"{graph.epochs} epochs, " if graph.epochs else "") + f"{count} seed{'' if count == 1 else 's'}"
    return table(
        f"Blocks on {graph.name} ({graph.model}, {trained}). Gradient error: the expected squared error of the whole "
        "gradient over the squared gradient.",
        [
            SETTING,
            ("saved MB", lambda row: number(row.saved_mb)),
            *map(error, epochs),
            ("test accuracy %", lambda row: spread(row.test)),
            ("minus FP32, points", lambda row: points(mean(graph.changes(row)))),
        ],
        [("", graph.rows)],
    )


def _figure(timing: Timing | None, graphs: Sequence[GraphBlocks]) -> Figure:
    def by_graph(dot: Callable[[GraphBlocks, BlocksRow], Dot]) -> list[tuple[str, list[tuple[str, Dot]]]]:
        return [(f"{g.name}, {g.model}", [(row.setting, dot(g, row)) for row in g.rows]) for g in graphs]

    def error(_: GraphBlocks, row: BlocksRow) -> Dot:
        errors = row.errors
        return Dot(errors[-1], earlier=errors[0] if len(errors) > 1 else None) if errors else Dot()

    def change(graph: GraphBlocks, row: BlocksRow) -> Dot:
        changes = [100 * change for change in graph.changes(row)]
        return Dot(mean(changes), values=changes)

    rows = timing.rows if timing else []
    saved = [(row.setting, Dot(parts={row.setting: row.saved_mb})) for row in rows if row.setting != "FP32"]
    times = [(row.setting, Dot(row.to_exact, row.low, row.high)) for row in rows]
    positive = all(error > 0 for graph in graphs for row in graph.rows for error in row.errors)
    shape = f" on the {timing.shape} shape (lines: quartiles over rounds)" if timing else ""
    return Figure(
        "blocks",
        f"By block size: saved MB and time a step{shape}, the squared error of the whole gradient relative to its "
        "square (filled: after the last epoch, hollow: at the first one looked at), and the change of test accuracy "
        "against plain FP32 (small: each seed).",
        [
            RowPanel("Saved MB", [("", saved)]),
            RowPanel(
                "Time a step, EXACT = 1",
                [("", times)],
                [Guide(1, "EXACT"), Guide(_FASTER, "ink", f"the paper’s time at {_BLOCKS}")],
            ),
            RowPanel("Squared error of the gradient", by_graph(error), log=positive),
            RowPanel("Test accuracy minus FP32, points", by_graph(change), [Guide(0, "FP32")]),
        ],
    )
