"""Blocks: memory, time, gradient error and accuracy against the block size G/R."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from dibit.reproduce.panels import Dot, Figure, Marks, Panel, dots
from dibit.reproduce.records import SETTING, Cell, Column, Fact, Record, paper_cell, table
from dibit.reproduce.schema import Blocks, BlocksGraph, BlocksRow, Timing, TimingRow
from dibit.tools.number_format import (
    NONE,
    between,
    deviation,
    interval,
    mean,
    number,
    percent,
    points,
    slug,
    spread,
)

TITLE = "Blocks"
CLAIM = (
    "i-EXACT reads the projected activations as blocks of G elements that share one range, where EXACT gives each "
    "row of R elements its own. Its paper claims more than 15 % less memory than EXACT and about 5 % less time at "
    "INT2."
)
_BLOCKS = "G/R = 64"
_FASTER = 0.95  # the paper's "about 5 %", as a ratio of times


def records(results: Blocks) -> Iterator[Record]:
    paper = results.paper or {}
    graphs = [graph for graph in results.graphs if graph.rows]
    if results.timing:
        yield from _facts(results.timing, paper)
    yield from _sentences(graphs)
    if (results.timing and results.timing.rows) or graphs:
        yield _figure(results.timing, graphs)
    if results.timing and results.timing.rows:
        yield _timing_table(results.timing, paper)
    for graph in graphs:
        yield _graph_table(graph)


def _facts(timing: Timing, paper: dict[str, str]) -> Iterator[Record]:
    by_setting = {row.setting: row for row in timing.rows}
    exact, blocks = by_setting.get("EXACT"), by_setting.get(_BLOCKS)
    if not exact or not blocks:
        return
    off, claim = deviation(blocks.saved_mb, exact.saved_mb), paper.get("less_memory", "> 15 %")
    yield Fact(f"Memory of {_BLOCKS} against EXACT", percent(off, 1, sign=True), f"the paper: {claim} less")
    if blocks.to_exact is not None:
        quartiles = interval(blocks.low, blocks.high, _change)
        detail = "" if quartiles == NONE else f"; quartiles {quartiles}"
        claim = f"the paper: {paper.get('faster', 'about 5 %')} faster{detail}"
        yield Fact(f"Time of {_BLOCKS} against EXACT", _change(blocks.to_exact), claim)


def _change(ratio: float) -> str:
    return percent(ratio - 1, 1, sign=True)


def _sentences(graphs: Sequence[BlocksGraph]) -> Iterator[str]:
    for setting, what in ((_BLOCKS, _BLOCKS), ("whole tensor", "the whole tensor as one block")):
        last = [{row.setting: _errors(row)[-1] for row in graph.rows if row.gradient_error} for graph in graphs]
        ratios = [own[setting] / own["EXACT"] for own in last if setting in own and own.get("EXACT")]
        if ratios:
            found = between(ratios)
            yield f"With {what}, the gradient’s squared error after the last epoch is {found} times EXACT’s."
    rows = [(graph, row) for graph in graphs for row in graph.rows if row.setting != "FP32"]
    shifts = [shift for graph, row in rows if (shift := mean(_paired(graph, row))) is not None]
    if shifts:
        found = f"{points(min(shifts))} to {points(max(shifts))}"
        yield f"Against plain FP32 with the same seeds, the mean test accuracy of the settings moves by {found} points."


def _errors(row: BlocksRow) -> list[float]:
    """Gradient errors by epoch."""
    return [row.gradient_error[epoch] for epoch in sorted(row.gradient_error, key=float)]


def _paired(graph: BlocksGraph, row: BlocksRow) -> list[float]:
    """Test accuracies less plain FP32's with the same seeds; nothing where they cannot be paired."""
    plain: list[float] = next((other.test for other in graph.rows if other.setting == "FP32"), [])
    return [a - b for a, b in zip(row.test, plain, strict=True)] if len(plain) == len(row.test) else []


def _timing_table(timing: Timing, paper: dict[str, str]) -> Record:
    exact = next((row.saved_mb for row in timing.rows if row.setting == "EXACT"), None)
    rounds = f" Medians over {timing.rounds} rounds, settings in turn." if timing.rounds else ""

    def against(row: TimingRow) -> str:
        return NONE if row.setting == "FP32" else percent(deviation(row.saved_mb, exact), 1, sign=True)

    def claim(key: str, word: str) -> Column:
        text = f"{paper[key]} {word}" if key in paper else NONE
        return Column("the paper", lambda row: paper_cell(text if row.setting == _BLOCKS else NONE))

    return table(
        "blocks-timing",
        f"Saved MB and seconds a step on the {timing.shape} shape ({timing.nodes:,} nodes, {timing.edges:,} edges)."
        f"{rounds}",
        [
            SETTING,
            Column("saved MB", lambda row: Cell(number(row.saved_mb), strong=True)),
            Column("against EXACT", against),
            claim("less_memory", "less"),
            Column("s a step", lambda row: number(row.seconds, 3)),
            Column("time to EXACT", lambda row: Cell(number(row.to_exact, 3), strong=True)),
            Column("quartiles", lambda row: interval(row.low, row.high, lambda end: number(end, 3))),
            claim("faster", "faster"),
            Column("time to FP32", lambda row: number(row.to_fp32, 3)),
        ],
        [("", timing.rows)],
    )


def _graph_table(graph: BlocksGraph) -> Record:
    def error(epoch: str) -> Column:
        return Column(f"gradient error, epoch {epoch}", lambda row: number(row.gradient_error.get(epoch), 3))

    def minus(row: BlocksRow) -> str:
        return NONE if row.setting == "FP32" else points(mean(_paired(graph, row)))

    epochs = sorted({epoch for row in graph.rows for epoch in row.gradient_error}, key=float)
    count = len(graph.seeds or ())
    trained = (f"{graph.epochs} epochs, " if graph.epochs else "") + f"{count} seed{'' if count == 1 else 's'}"
    return table(
        f"blocks-{slug(graph.name, graph.model)}",
        f"Blocks on {graph.name} ({graph.model}, {trained}). Gradient error: the expected squared error of the whole "
        "gradient over the squared gradient.",
        [
            SETTING,
            Column("saved MB", lambda row: number(row.saved_mb)),
            *map(error, epochs),
            Column("test accuracy %", lambda row: spread(row.test)),
            Column("minus FP32, points", minus),
        ],
        [("", graph.rows)],
    )


def _figure(timing: Timing | None, graphs: Sequence[BlocksGraph]) -> Record:
    first = min((float(e) for graph in graphs for row in graph.rows for e in row.gradient_error), default=0.0)
    shape = f" on the {timing.shape} shape (lines: quartiles over rounds)" if timing and timing.rows else ""
    return Figure(
        "blocks",
        f"By block size: saved MB and time a step{shape}, the squared error of the whole gradient relative to its "
        f"square (filled: after the last epoch, hollow: {f'after epoch {first:g}' if first else 'before training'}), "
        "and the change of test accuracy against plain FP32 (small: each seed).",
        [*_timing_panels(timing), *_graph_panels(graphs)],
    )


def _timing_panels(timing: Timing | None) -> Iterator[Panel]:
    rows = [row for row in timing.rows if row.setting != "FP32"] if timing else []
    marks = [Marks("bar", row.setting, [(row.saved_mb, i)]) for i, row in enumerate(rows)]
    ends = [(row.saved_mb, i) for i, row in enumerate(rows)]
    marks.append(Marks("text", "ink", ends, texts=[number(row.saved_mb, 1) for row in rows]))
    largest = max((row.saved_mb for row in rows), default=1)
    yield Panel("Saved MB", marks, [row.setting for row in rows], xlim=(0, 1.2 * largest or 1))
    times = {
        row.setting: Dot(row.to_exact, row.low, row.high)
        for row in (timing.rows if timing else ())
        if row.to_exact is not None
    }
    paper = Marks("guide dashed", "ink", [(_FASTER, 0)], "the paper’s time at G/R = 64")
    yield dots("Time a step, EXACT = 1", [("", times)], [Marks("guide", "EXACT", [(1, 0)]), paper])


def _graph_panels(graphs: Sequence[BlocksGraph]) -> Iterator[Panel]:
    errors: list[tuple[str, dict[str, Dot]]] = []
    changes: list[tuple[str, dict[str, Dot]]] = []
    for graph in graphs:
        errors.append((f"{graph.name}, {graph.model}", {}))
        changes.append((f"{graph.name}, {graph.model}", {}))
        for row in graph.rows:
            if found := _errors(row):
                errors[-1][1][row.setting] = Dot(found[-1], earlier=found[0] if len(found) > 1 else None)
            if row.setting != "FP32" and (paired := [100 * change for change in _paired(graph, row)]):
                changes[-1][1][row.setting] = Dot(statistics.fmean(paired), values=paired)
    positive = all(error > 0 for graph in graphs for row in graph.rows for error in row.gradient_error.values())
    yield dots("Squared error of the gradient", errors, scale="log" if positive else "linear")
    yield dots("Test accuracy minus FP32, points", changes, [Marks("guide", "FP32", [(0, 0)])])
