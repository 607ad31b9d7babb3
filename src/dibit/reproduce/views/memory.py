"""Memory: saved MB by setting, beside the authors' log and the closed form."""

from __future__ import annotations

from collections.abc import Iterator

from dibit.reproduce.panels import Figure, Marks, Panel
from dibit.reproduce.records import SETTING, Cell, Column, Fact, Record, paper_cell, table
from dibit.reproduce.schema import Memory, MemoryRow, Shape
from dibit.tools.number_format import NONE, deviation, listed, mb, number, percent, slug

TITLE = "Memory"
CLAIM = (
    "The papers count what autograd keeps from the forward to the backward pass. EXACT projects each saved activation "
    "to an eighth of its width and rounds it to 2 bits, with one range a node; i-EXACT lets a block of up to 1,024 "
    "elements share one range. The authors’ log of ogbn-arxiv says 30.47 MB for the first, 25.56 MB for the second."
)
_BLOCKS = "G/R = 64"  # i-EXACT's own choice
_MAIN = ("FP32", "EXACT", _BLOCKS, "default")
_KINDS = ("linear inputs", "norm inputs", "ReLU", "dropout", "targets", "other")


def records(results: Memory) -> Iterator[Record]:
    for shape in results.shapes[:1]:
        yield from _facts(shape)
    yield from _sentences(results)
    for shape in results.shapes:
        if shape.rows:
            yield from (_figure(shape), _table(shape), _kinds_table(shape))


def _facts(shape: Shape) -> Iterator[Record]:
    by_setting = {row.setting: row for row in shape.rows}
    for setting, name in (("EXACT", "EXACT"), (_BLOCKS, "i-EXACT, blocks of 1,024")):
        if row := by_setting.get(setting):
            yield Fact(f"{name}: saved on {shape.name}", mb(row.measured_mb), _beside(row))
    ours, plain = by_setting.get("default"), by_setting.get("FP32")
    if ours and plain and ours.measured_mb:
        ratio = number(plain.measured_mb / ours.measured_mb, 0)
        detail = f"{ratio} times less than plain FP32’s {mb(plain.measured_mb)}; not a setting of the papers"
        yield Fact(f"Dibit’s default: saved on {shape.name}", mb(ours.measured_mb), detail)


def _beside(row: MemoryRow) -> str:
    log = row.log_mb is not None
    reference, name = (row.log_mb, "the authors’ log") if log else (row.closed_mb, "the closed form")
    if reference is None:
        return "no number of the papers"
    return f"{name}: {number(reference)}, {percent(deviation(row.measured_mb, reference), 1, sign=True)}"


def _sentences(results: Memory) -> Iterator[str]:
    for shape in results.shapes:
        kept = [f"{row.setting} {mb(row.measured_mb)}" for row in shape.rows if row.setting in _MAIN]
        if kept:
            yield f"On the {shape.name} shape autograd keeps: {', '.join(kept)}."
    rows = [(shape.name, row) for shape in results.shapes for row in shape.rows]
    off = [
        (abs(off), row.setting, name)
        for name, row in rows
        if (off := deviation(row.measured_mb, row.closed_mb)) is not None
    ]
    if off:
        worst, setting, name = max(off)
        yield (
            f"Measured and closed form differ by {percent(worst, 2)} at most ({setting} on the {name} shape), "
            f"over {len(off)} measurements; the papers store their projections, which Dibit draws again."
        )
    cuda = [f"{mb(row.closed_cuda_mb)} on the {name} shape" for name, row in rows if row.closed_cuda_mb is not None]
    if cuda:
        where = "On CUDA, where torch’s dropout mask takes 1 byte an element and not 4"
        yield f"{where}, plain FP32 would keep {listed(cuda)}."


def _table(shape: Shape) -> Record:
    plain = next((row.measured_mb for row in shape.rows if row.setting == "FP32"), None)
    layers = f", {shape.layers} layers of {shape.hidden}" if shape.layers and shape.hidden else ""
    logged = any(row.log_mb is not None for row in shape.rows)

    def less(row: MemoryRow) -> str:
        return f"{number(plain / row.measured_mb, 1)} ×" if plain and row.measured_mb else NONE

    return table(
        f"memory-{slug(shape.name)}",
        f"Saved MB (2²⁰ bytes) on the {shape.name} shape ({shape.nodes:,} nodes, {shape.edges:,} edges{layers}), by "
        "Dibit’s ledger and by the allocator.",
        [
            SETTING,
            Column("saved MB", lambda row: Cell(number(row.measured_mb), strong=True)),
            Column("authors’ log", lambda row: paper_cell(number(row.log_mb))),
            Column("off the log", lambda row: percent(deviation(row.measured_mb, row.log_mb), 2, sign=True)),
            Column("closed form", lambda row: paper_cell(number(row.closed_mb))),
            Column("off the form", lambda row: percent(deviation(row.measured_mb, row.closed_mb), 2, sign=True)),
            Column("allocator", lambda row: number(row.allocator_mb)),
            Column("bytes a node", lambda row: number(row.bytes_per_node, 0)),
            Column("less than FP32", less),
        ],
        [("", shape.rows)],
        [] if logged else [f"No log of the authors exists for {shape.name}: the closed form stands alone."],
    )


def _kinds_table(shape: Shape) -> Record:
    def column(kind: str) -> Column:
        return Column(kind, lambda row: number((row.by_kind or {}).get(kind, 0.0)))

    return table(
        f"memory-{slug(shape.name)}-kinds",
        f"Saved MB on the {shape.name} shape by what is kept.",
        [SETTING, *map(column, _kinds_of(shape))],
        [("", shape.rows)],
        fold=f"By what is kept, {shape.name} shape",
    )


def _kinds_of(shape: Shape) -> list[str]:
    """The kinds that some setting keeps, the known ones first."""
    found = {kind for row in shape.rows for kind, size in (row.by_kind or {}).items() if size}
    return [kind for kind in _KINDS if kind in found] + sorted(found - set(_KINDS))


def _figure(shape: Shape) -> Record:
    compressed = [row for row in shape.rows if row.setting != "FP32"]
    main = [row for row in shape.rows if row.setting in _MAIN]
    panels = [_panel(shape, main, "Saved MB, to one scale"), _panel(shape, compressed, "Saved MB, compressed alone")]
    logged = any(row.log_mb is not None for row in shape.rows)
    return Figure(
        f"memory-{slug(shape.name)}",
        f"Saved MB on the {shape.name} shape by what is kept. First to one scale, then the compressed settings on an "
        f"axis of their own{'; diamonds are the authors’ log' if logged else ''}.",
        panels,
    )


def _panel(shape: Shape, rows: list[MemoryRow], title: str) -> Panel:
    bars = [
        Marks("bar", kind, [((row.by_kind or {}).get(kind, 0.0), i) for i, row in enumerate(rows)], kind)
        for kind in _kinds_of(shape)
    ]
    ends = [max(row.measured_mb, row.log_mb or 0) for row in rows]
    sizes = [number(row.measured_mb, 1) for row in rows]
    totals = Marks("text", "ink", [(end, i) for i, end in enumerate(ends)], texts=sizes)
    log = [(row.log_mb, i) for i, row in enumerate(rows) if row.log_mb is not None]
    marks = [*bars, totals, Marks("diamond", "ink", log, "authors’ log")]
    return Panel(title, marks, [row.setting for row in rows], xlim=(0, 1.2 * max(ends, default=0) or 1))
