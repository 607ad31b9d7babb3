"""Memory: saved MB by setting, beside the authors' log and the closed form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dibit.reproduce.panels import Dot, Figure, RowPanel
from dibit.reproduce.records import SETTING, Fact, Record, paper
from dibit.reproduce.schema import JsonObject
from dibit.tools.markdown import Column, Table, strong, table
from dibit.tools.number_format import NONE, deviation, mb, number, percent, slug

TITLE = "Memory"
CLAIM = (
    "The papers count what autograd keeps from the forward to the backward pass. EXACT projects each saved activation "
    "to an eighth of its width and rounds it to 2 bits, with one range a node; i-EXACT lets a block of up to 1,024 "
    "elements share one range. The authors’ log of ogbn-arxiv says 30.47 MB for the first, 25.56 MB for the second."
)
_MAIN = {"EXACT": "EXACT", "G/R = 64": "i-EXACT, blocks of 1,024", "default": "Dibit’s default"}
_KINDS = ("linear inputs", "norm inputs", "ReLU", "dropout", "targets", "other")


class MemoryRow(JsonObject):
    setting: str
    measured_mb: float
    allocator_mb: float | None = None
    closed_mb: float | None = None
    closed_cuda_mb: float | None = None
    log_mb: float | None = None
    bytes_per_node: float | None = None
    by_kind: dict[str, float] | None = None


class ShapeMemory(JsonObject):
    name: str
    nodes: int
    edges: int
    rows: list[MemoryRow]
    hidden: int | None = None
    layers: int | None = None


class Results(JsonObject):
    shapes: list[ShapeMemory]


def records(results: Results) -> Iterator[Record]:
    for shape in results.shapes[:1]:
        rows = {row.setting: row for row in shape.rows}
        for setting in filter(rows.__contains__, _MAIN):
            detail = _beside(rows[setting], rows.get("FP32"))
            yield Fact(f"{_MAIN[setting]}: saved on {shape.name}", mb(rows[setting].measured_mb), detail)
    yield from _sentences([(shape.name, row) for shape in results.shapes for row in shape.rows])
    for shape in results.shapes:
        if shape.rows:
            yield from (_figure(shape), _table(shape))


def _beside(row: MemoryRow, plain: MemoryRow | None) -> str:
    for reference, name in ((row.log_mb, "the authors’ log"), (row.closed_mb, "the closed form")):
        if reference is not None:
            return f"{name}: {number(reference)}, {percent(deviation(row.measured_mb, reference), 1, sign=True)}"
    if plain is None or not row.measured_mb:
        return "not a setting of the papers"
    ratio = number(plain.measured_mb / row.measured_mb, 0)
    return f"{ratio} times less than plain FP32’s {mb(plain.measured_mb)}; not a setting of the papers"


def _sentences(rows: Sequence[tuple[str, MemoryRow]]) -> Iterator[str]:
    found = [(deviation(row.measured_mb, row.closed_mb), row.setting, name) for name, row in rows]
    off = [(abs(off), setting, name) for off, setting, name in found if off is not None]
    if off:
        worst, setting, name = max(off)
        yield (
            f"Measured and closed form differ by {percent(worst, 2)} at most ({setting} on the {name} shape), "
            f"over {len(off)} measurements; the papers store their projections, which Dibit draws again."
        )


def _table(shape: ShapeMemory) -> Table:
    plain = next((row.measured_mb for row in shape.rows if row.setting == "FP32"), None)
    layers = f", {shape.layers} layers of {shape.hidden}" if shape.layers and shape.hidden else ""
    logged = any(row.log_mb is not None for row in shape.rows)

    def less(row: MemoryRow) -> str:
        return f"{number(plain / row.measured_mb, 1)} ×" if plain and row.measured_mb else NONE

    def kept(kind: str) -> Column:
        return (kind, lambda row: number((row.by_kind or {}).get(kind, 0.0)))

    return table(
        f"Saved MB (2²⁰ bytes) on the {shape.name} shape ({shape.nodes:,} nodes, {shape.edges:,} edges{layers}), by "
        "Dibit’s ledger and by the allocator, and by what is kept.",
        [
            SETTING,
            ("saved MB", lambda row: strong(number(row.measured_mb))),
            ("authors’ log", lambda row: paper(number(row.log_mb))),
            ("off the log", lambda row: percent(deviation(row.measured_mb, row.log_mb), 2, sign=True)),
            ("closed form", lambda row: paper(number(row.closed_mb))),
            ("on CUDA", lambda row: paper(number(row.closed_cuda_mb))),
            ("off the form", lambda row: percent(deviation(row.measured_mb, row.closed_mb), 2, sign=True)),
            ("allocator", lambda row: number(row.allocator_mb)),
            ("bytes a node", lambda row: number(row.bytes_per_node, 0)),
            ("less than FP32", less),
            *map(kept, _kinds(shape)),
        ],
        [("", shape.rows)],
        [
            *([] if logged else [f"No log of the authors exists for {shape.name}: the closed form stands alone."]),
            "On CUDA torch’s dropout mask takes 1 byte an element, and not 4.",
        ],
    )


def _kinds(shape: ShapeMemory) -> list[str]:
    """What some setting keeps, the known kinds first."""
    found = {kind for row in shape.rows for kind, size in (row.by_kind or {}).items() if size}
    return [kind for kind in _KINDS if kind in found] + sorted(found - set(_KINDS))


def _figure(shape: ShapeMemory) -> Figure:
    bars = []
    for row in shape.rows:
        parts = {kind: size for kind in _kinds(shape) if (size := (row.by_kind or {}).get(kind))}
        others = {} if row.log_mb is None else {"authors’ log": row.log_mb}
        bars.append((row.setting, Dot(parts=parts or {row.setting: row.measured_mb}, others=others)))
    return Figure(
        f"memory-{slug(shape.name)}",
        f"Saved MB on the {shape.name} shape by what is kept. First to one scale, then the compressed settings on an "
        "axis of their own; diamonds are the authors’ log.",
        [
            RowPanel("Saved MB, to one scale", [("", [bar for bar in bars if bar[0] in ("FP32", *_MAIN)])]),
            RowPanel("Saved MB, compressed alone", [("", [bar for bar in bars if bar[0] != "FP32"])]),
        ],
    )
