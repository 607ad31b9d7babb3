"""Memory: saved MB by setting, beside the authors' log and the closed form."""

from __future__ import annotations

from typing import Any

from dibit.reproduce.tables import Cell, Column, Fact, Table, table, theirs
from dibit.tools.errors import require
from dibit.tools.figures import INK, KINDS, Layout, Picture, figure, grid, legend_above, picture
from dibit.tools.number_format import NONE, deviation, listed, mb, number, percent, slug

TITLE = "Memory"
CLAIM = (
    "The papers count what autograd keeps from the forward to the backward pass. EXACT projects each saved activation "
    "to an eighth of its width and rounds it to 2 bits, with one range a node; i-EXACT lets a block of up to 1,024 "
    "elements share one range. The authors’ log of ogbn-arxiv says 30.47 MB for the first, 25.56 MB for the second."
)
_BLOCKS = "G/R = 64"  # i-EXACT's own choice
_MAIN = ("FP32", "EXACT", _BLOCKS, "default")


def facts(results: dict[str, Any]) -> list[Fact]:
    found = []
    for shape in results["shapes"][:1]:
        by_setting = {row["setting"]: row for row in shape["rows"]}
        for setting, name in (("EXACT", "EXACT"), (_BLOCKS, "i-EXACT, blocks of 1,024")):
            if row := by_setting.get(setting):
                found.append(Fact(f"{name}: saved on {shape['name']}", mb(row["measured_mb"]), _beside(row)))
        ours, plain = by_setting.get("default"), by_setting.get("FP32")
        if ours and plain and ours["measured_mb"]:
            ratio = number(plain["measured_mb"] / ours["measured_mb"], 0)
            detail = f"{ratio} times less than plain FP32’s {mb(plain['measured_mb'])}; not a setting of the papers"
            found.append(Fact(f"Dibit’s default: saved on {shape['name']}", mb(ours["measured_mb"]), detail))
    return found


def sentences(results: dict[str, Any]) -> list[str]:
    off = [
        (abs(off), row["setting"], shape["name"])
        for shape in results["shapes"]
        for row in shape["rows"]
        if (off := deviation(row["measured_mb"], row.get("closed_mb"))) is not None
    ]
    said = []
    for shape in results["shapes"]:
        kept = [f"{r['setting']} {mb(r['measured_mb'])}" for r in shape["rows"] if r["setting"] in _MAIN]
        if kept:
            said.append(f"On the {shape['name']} shape autograd keeps: {', '.join(kept)}.")
    if off:
        worst, setting, name = max(off)
        said.append(
            f"Measured and closed form differ by {percent(worst, 2)} at most ({setting} on the {name} shape), "
            f"over {len(off)} measurements; the papers store their projections, which Dibit draws again."
        )
    on_cuda = [
        f"{mb(row['closed_cuda_mb'])} on the {shape['name']} shape"
        for shape in results["shapes"]
        for row in shape["rows"]
        if row.get("closed_cuda_mb") is not None
    ]
    if on_cuda:
        said.append(
            "On CUDA, where torch’s dropout mask takes 1 byte an element and not 4, plain FP32 would keep "
            f"{listed(on_cuda)}."
        )
    return said


def tables(results: dict[str, Any]) -> list[Table]:
    return [table for shape in results["shapes"] if shape["rows"] for table in (_table(shape), _kinds(shape))]


def pictures(results: dict[str, Any]) -> list[Picture]:
    return [_picture(shape) for shape in results["shapes"] if shape["rows"]]


def _beside(row: dict[str, Any]) -> str:
    log, closed = row.get("log_mb"), row.get("closed_mb")
    reference, name = (log, "the authors’ log") if log is not None else (closed, "the closed form")
    if reference is None:
        return "no number of the papers"
    return f"{name}: {number(reference)}, {percent(deviation(row['measured_mb'], reference), 1, sign=True)}"


def _about(shape: dict[str, Any]) -> str:
    layers, hidden = shape.get("layers"), shape.get("hidden")
    model = f", {layers} layers of {hidden}" if layers and hidden else ""
    return f"{shape['name']} shape ({shape['nodes']:,} nodes, {shape['edges']:,} edges{model})"


def _table(shape: dict[str, Any]) -> Table:
    plain = next((row["measured_mb"] for row in shape["rows"] if row["setting"] == "FP32"), None)
    columns = [
        Column("setting", numeric=False),
        Column("saved MB"),
        Column("authors’ log"),
        Column("off the log"),
        Column("closed form"),
        Column("off the form"),
        Column("allocator"),
        Column("bytes a node"),
        Column("less than FP32"),
    ]
    rows = []
    for row in shape["rows"]:
        measured, log, closed = row["measured_mb"], row.get("log_mb"), row.get("closed_mb")
        rows.append(
            [
                row["setting"],
                Cell(number(measured), strong=True),
                theirs(number(log)),
                percent(deviation(measured, log), 2, sign=True),
                theirs(number(closed)),
                percent(deviation(measured, closed), 2, sign=True),
                number(row.get("allocator_mb")),
                number(row.get("bytes_per_node"), 0),
                NONE if not plain or not measured else f"{number(plain / measured, 1)} ×",
            ]
        )
    logged = any(row.get("log_mb") is not None for row in shape["rows"])
    return table(
        f"memory-{slug(shape['name'])}",
        f"Saved MB (2²⁰ bytes) on the {_about(shape)}, by Dibit’s ledger and by the allocator.",
        columns,
        [("", rows)],
        [] if logged else [f"No log of the authors exists for {shape['name']}: the closed form stands alone."],
    )


def _kinds(shape: dict[str, Any]) -> Table:
    kinds = _kinds_of(shape)
    rows = [[row["setting"], *(number((row.get("by_kind") or {}).get(k, 0.0)) for k in kinds)] for row in shape["rows"]]
    return table(
        f"memory-{slug(shape['name'])}-kinds",
        f"Saved MB on the {shape['name']} shape by what is kept.",
        [Column("setting", numeric=False), *map(Column, kinds)],
        [("", rows)],
        fold=f"By what is kept, {shape['name']} shape",
    )


def _kinds_of(shape: dict[str, Any]) -> list[str]:
    """The kinds that some setting keeps, the known ones first."""
    found = {kind for row in shape["rows"] for kind, size in (row.get("by_kind") or {}).items() if size}
    return [kind for kind in KINDS if kind in found] + sorted(found - set(KINDS))


def _picture(shape: dict[str, Any]) -> Picture:
    name = shape["name"]
    logs = [row for row in shape["rows"] if row.get("log_mb") is not None]
    numbers = ", ".join(f"{row['setting']} {number(row['measured_mb'])}" for row in shape["rows"])
    told = ", ".join(f"{row['setting']} {number(row['log_mb'])}" for row in logs)
    marks = f" The authors’ log: {told}." if logs else " There is no log of the authors for it."
    return picture(
        f"memory-{slug(name)}",
        f"Saved MB on the {name} shape by what is kept. First to one scale, then the compressed settings on an axis of "
        f"their own{'; diamonds are the authors’ log' if logs else ''}.",
        f"Stacked bars of saved MB on the {name} shape: {numbers}.{marks}",
        lambda layout: _draw(shape, layout),
    )


def _draw(shape: dict[str, Any], layout: Layout) -> Any:
    rows = shape["rows"]
    compressed = [row for row in rows if row["setting"] != "FP32"]
    scale = [row for row in rows if row["setting"] in _MAIN]
    panels = [(part, title) for part, title in ((scale, "To one scale"), (compressed, "Compressed alone")) if part]
    heights = [len(part) for part, _ in panels]
    if layout.wide:
        drawn = figure(layout, 90 + 25 * max(heights))
        axes = drawn.subplots(1, len(panels), squeeze=False, width_ratios=[1, 1.6][: len(panels)]).flat
    else:
        drawn = figure(layout, 165 + 22 * sum(heights))
        axes = drawn.subplots(len(panels), 1, squeeze=False, height_ratios=heights).flat
    kinds = _kinds_of(shape)
    colors = {kind: KINDS.get(kind, KINDS["other"]) for kind in kinds}
    for ax, (part, title) in zip(axes, panels, strict=True):
        left = [0.0] * len(part)
        for kind in kinds:
            sizes = [(row.get("by_kind") or {}).get(kind, 0.0) for row in part]
            ax.barh(range(len(part)), sizes, 0.72, left, color=colors[kind], edgecolor="white", linewidth=0.6)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
        top = max(row["measured_mb"] for row in part) or 1
        for i, row in enumerate(part):
            end = max(left[i], row["measured_mb"], row.get("log_mb") or 0)
            ax.text(end + 0.02 * top, i, f"{row['measured_mb']:,.1f}", va="center", weight="bold")
            if part is compressed and row.get("log_mb") is not None:
                ax.plot(row["log_mb"], i, "D", color=INK, markersize=4, markerfacecolor="white")
        ax.set_yticks(range(len(part)), [row["setting"] for row in part])
        ax.set(xlim=(0, 1.17 * top), ylim=(len(part) - 0.5, -0.5), xlabel="saved MB")
        ax.set_title(title)
        grid(ax, "x")
    patches, lines = require("matplotlib.patches", "study"), require("matplotlib.lines", "study")
    handles = [patches.Patch(color=color, label=kind) for kind, color in colors.items()]
    if any(row.get("log_mb") is not None for row in compressed):
        style = {"color": INK, "markersize": 4, "markerfacecolor": "white"}
        handles.append(lines.Line2D([], [], marker="D", linestyle="", label="authors’ log", **style))
    legend_above(drawn, handles, layout.pick(7, 3))
    return drawn
