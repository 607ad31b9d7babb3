"""Blocks: memory, time, gradient error and accuracy against the block size G/R."""

from __future__ import annotations

from typing import Any

from dibit.reproduce.tables import Cell, Column, Fact, Table, table, theirs
from dibit.tools.errors import require
from dibit.tools.figures import COLORS, INK, SOFT, Layout, Picture, figure, grid, legend_above, picture, plain_log
from dibit.tools.number_format import (
    NONE,
    between,
    deviation,
    mean,
    number,
    percent,
    points,
    seed_count,
    short,
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
_MARKERS = "osD^vPX*"


def facts(results: dict[str, Any]) -> list[Fact]:
    timing, paper, found = results.get("timing"), results.get("paper") or {}, []
    by_setting = {row["setting"]: row for row in timing["rows"]} if timing else {}
    if (exact := by_setting.get("EXACT")) and (blocks := by_setting.get(_BLOCKS)):
        off = deviation(blocks["saved_mb"], exact["saved_mb"])
        claim = f"the paper: {paper.get('less_memory', '> 15 %')} less"
        found.append(Fact(f"Memory of {_BLOCKS} against EXACT", percent(off, 1, sign=True), claim))
        if blocks.get("to_exact") is not None:
            middle = ""
            if blocks.get("low") is not None and blocks.get("high") is not None:
                low, high = (percent(blocks[end] - 1, 1, sign=True) for end in ("low", "high"))
                middle = f"; quartiles {low} to {high}"
            claim = f"the paper: {paper.get('faster', 'about 5 %')} faster{middle}"
            found.append(Fact(f"Time of {_BLOCKS} against EXACT", percent(blocks["to_exact"] - 1, 1, sign=True), claim))
    return found


def sentences(results: dict[str, Any]) -> list[str]:
    said = []
    for setting in (_BLOCKS, "whole tensor"):
        ratios = []
        for graph in results["graphs"]:
            errors = {row["setting"]: _last(row) for row in graph["rows"]}
            exact, other = errors.get("EXACT"), errors.get(setting)
            if exact and other is not None:
                ratios.append(other / exact)
        if ratios:
            what = "the whole tensor as one block" if setting == "whole tensor" else setting
            said.append(
                f"With {what}, the gradient’s squared error after the last epoch is {between(ratios, number)} times "
                "EXACT’s."
            )
    shifts = [
        shift
        for graph in results["graphs"]
        for row in graph["rows"]
        if row["setting"] != "FP32" and (shift := mean(_paired(graph, row))) is not None
    ]
    if shifts:
        said.append(
            f"Against plain FP32 with the same seeds, the mean test accuracy of the settings moves by "
            f"{points(min(shifts))} to {points(max(shifts))} points."
        )
    return said


def tables(results: dict[str, Any]) -> list[Table]:
    found, timing = [], results.get("timing")
    if timing and timing["rows"]:
        found.append(_timing_table(timing, results.get("paper") or {}))
    return found + [_graph_table(graph) for graph in results["graphs"] if graph["rows"]]


def pictures(results: dict[str, Any]) -> list[Picture]:
    timing = results.get("timing") or {"rows": [], "shape": ""}
    graphs = [graph for graph in results["graphs"] if graph["rows"]]
    if not timing["rows"] and not graphs:
        return []
    first = min((float(e) for g in graphs for row in g["rows"] for e in row["gradient_error"]), default=0.0)
    before = f"after epoch {first:g}" if first else "before training"
    parts = []
    if timing["rows"]:
        parts.append("saved MB and time a step " + ", ".join(map(_timing_words, timing["rows"])))
    for graph in graphs:
        rows = [row for row in graph["rows"] if _last(row) is not None]
        parts.append(
            f"{graph['name']}, gradient error and test accuracy "
            + ", ".join(f"{r['setting']} {number(_last(r))} and {spread(r['test'])} %" for r in rows)
        )
    return [
        picture(
            "blocks",
            "Against the block size: saved MB and time a step"
            + (f" on the {timing['shape']} shape (bars: quartiles over rounds)" if timing["rows"] else "")
            + ", the squared error of the whole gradient relative to its square (filled: after the last epoch, "
            f"hollow: {before}), and the change of test accuracy against plain FP32 (small: each seed).",
            f"Four panels against G/R. {'; '.join(parts)}.",
            lambda layout: _draw(timing, graphs, layout),
        )
    ]


def _timing_words(row: dict[str, Any]) -> str:
    return f"{row['setting']} {number(row['saved_mb'])} MB, {number(row.get('to_exact'))} of EXACT’s time"


def _epochs(row: dict[str, Any]) -> list[str]:
    return sorted(row["gradient_error"], key=float)


def _last(row: dict[str, Any]) -> float | None:
    epochs = _epochs(row)
    return row["gradient_error"][epochs[-1]] if epochs else None


def _paired(graph: dict[str, Any], row: dict[str, Any]) -> list[float]:
    """Test accuracies less plain FP32's with the same seeds; nothing where they cannot be paired."""
    plain: list[float] = next((r["test"] for r in graph["rows"] if r["setting"] == "FP32"), [])
    return [a - b for a, b in zip(row["test"], plain, strict=True)] if len(plain) == len(row["test"]) else []


def _timing_table(timing: dict[str, Any], paper: dict[str, str]) -> Table:
    exact = next((row["saved_mb"] for row in timing["rows"] if row["setting"] == "EXACT"), None)
    columns = [
        Column("setting", numeric=False),
        Column("saved MB"),
        Column("against EXACT"),
        Column("the paper"),
        Column("s a step"),
        Column("time to EXACT"),
        Column("quartiles"),
        Column("the paper"),
        Column("time to FP32"),
    ]
    rows = []
    for row in timing["rows"]:
        own = row["setting"] == _BLOCKS
        low, high = row.get("low"), row.get("high")
        rows.append(
            [
                row["setting"],
                Cell(number(row["saved_mb"]), strong=True),
                NONE if row["setting"] == "FP32" else percent(deviation(row["saved_mb"], exact), 1, sign=True),
                theirs(f"{paper['less_memory']} less" if own and "less_memory" in paper else NONE),
                number(row["seconds"], 3),
                Cell(number(row.get("to_exact"), 3), strong=True),
                NONE if low is None or high is None else f"{number(low, 3)} to {number(high, 3)}",
                theirs(f"{paper['faster']} faster" if own and "faster" in paper else NONE),
                number(row.get("to_fp32"), 3),
            ]
        )
    rounds = f" Medians over {timing['rounds']} rounds, settings in turn." if timing.get("rounds") else ""
    return table(
        "blocks-timing",
        f"Saved MB and seconds a step on the {timing['shape']} shape ({timing['nodes']:,} nodes, "
        f"{timing['edges']:,} edges).{rounds}",
        columns,
        [("", rows)],
    )


def _graph_table(graph: dict[str, Any]) -> Table:
    epochs = sorted({epoch for row in graph["rows"] for epoch in row["gradient_error"]}, key=float)
    columns = [
        Column("setting", numeric=False),
        Column("saved MB"),
        *(Column(f"gradient error, epoch {epoch}") for epoch in epochs),
        Column("test accuracy %"),
        Column("minus FP32, points"),
    ]
    rows = [
        [
            row["setting"],
            number(row["saved_mb"]),
            *(number(row["gradient_error"].get(epoch), 3) for epoch in epochs),
            spread(row["test"]),
            NONE if row["setting"] == "FP32" else points(mean(_paired(graph, row))),
        ]
        for row in graph["rows"]
    ]
    about = [
        graph["model"],
        *([f"{graph['epochs']} epochs"] if graph.get("epochs") else []),
        seed_count(graph.get("seeds")),
    ]
    return table(
        f"blocks-{slug(graph['name'], graph['model'])}",
        f"Blocks on {graph['name']} ({', '.join(about)}). Gradient error: the expected squared error of the whole "
        "gradient over the squared gradient.",
        columns,
        [("", rows)],
    )


def _draw(timing: dict[str, Any], graphs: list[dict[str, Any]], layout: Layout) -> Any:
    lines = require("matplotlib.lines", "study")
    settings = ["EXACT", *(f"G/R = {2**i}" for i in range(1, 7)), "whole tensor"]
    present = {row["setting"] for row in timing["rows"]} | {row["setting"] for g in graphs for row in g["rows"]}
    settings = [s for s in settings if s in present] + sorted(present - set(settings) - {"FP32"})
    where = {setting: i for i, setting in enumerate(settings)}
    titles = ["Saved MB", "Time a step, EXACT = 1", "Squared error of the gradient", "Test accuracy minus FP32, points"]
    drawn = figure(layout, layout.pick(480, 760 + 15 * len(graphs)))
    axes = drawn.subplots(*layout.pick((2, 2), (4, 1)), sharex=False).flatten()
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title)
        labels = ["whole" if s == "whole tensor" else s.removeprefix("G/R = ") for s in settings]
        ax.set_xticks(range(len(settings)), labels)
        ax.set_xlim(-0.5, len(settings) - 0.5)
        grid(ax, "y")
    for ax in axes[layout.pick(2, 3) :]:
        ax.set_xlabel("G/R (EXACT is 1)", labelpad=2)
    _draw_timing(axes[0], axes[1], timing["rows"], where, layout.small)
    width = min(0.16, 0.7 / max(1, len(graphs)))
    for k, graph in enumerate(graphs):
        marker, shift = _MARKERS[k % len(_MARKERS)], width * (k - (len(graphs) - 1) / 2)
        _draw_graph(axes[2], axes[3], graph, where, marker, shift)
    axes[3].axhline(0, color=COLORS["FP32"], linewidth=1)
    errors = [e for g in graphs for row in g["rows"] for e in row["gradient_error"].values() if e > 0]
    if errors:
        axes[2].set_yscale("log")
        axes[2].set_ylim(min(errors) / 1.3, max(errors) * 1.3)
        plain_log(axes[2].yaxis)
    handles = [
        lines.Line2D(
            [],
            [],
            marker=_MARKERS[k % len(_MARKERS)],
            linestyle="",
            color=SOFT,
            label=short(f"{g['name']}, {g['model']}"),
        )
        for k, g in enumerate(graphs)
    ]
    if handles:
        legend_above(drawn, handles, layout.pick(3, 1))
    for ax in axes:
        if not ax.has_data():
            ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color=SOFT)
    return drawn


def _draw_timing(memory: Any, time: Any, rows: list[dict[str, Any]], where: dict[str, int], small: float) -> None:
    for row in rows:
        if row["setting"] not in where:
            continue
        x, color = where[row["setting"]], COLORS.get(row["setting"], SOFT)
        memory.bar(x, row["saved_mb"], 0.68, color=color)
        memory.text(x, row["saved_mb"], f"{row['saved_mb']:.1f}", ha="center", va="bottom", fontsize=small)
        if row.get("to_exact") is not None:
            low, high = row.get("low"), row.get("high")
            if low is not None and high is not None:
                time.plot([x, x], [low, high], color=color, linewidth=2)
            time.plot(x, row["to_exact"], "o", color=color, markersize=6)
    if not rows:
        return
    memory.margins(y=0.15)
    lines: list[tuple[float, str, str, Any]] = [(_FASTER, "paper", INK, (0, (4, 3)))]
    lines += [
        (row["to_exact"], "FP32", COLORS["FP32"], (0, (1, 1.5)))
        for row in rows
        if row["setting"] == "FP32" and row.get("to_exact") is not None
    ]
    time.axhline(1, color=COLORS["EXACT"], linewidth=1, zorder=0.5)
    sides = ("top", "bottom") if len(lines) > 1 else ("center",)  # the names of near lines point away from each other
    for (level, name, color, dashes), side in zip(sorted(lines, key=lambda line: line[0]), sides, strict=True):
        time.axhline(level, color=color, linewidth=1, linestyle=dashes, zorder=0.5)
        place = time.get_yaxis_transform()
        time.text(1.01, level, name, transform=place, color=color, va=side, fontsize=small)
    time.margins(y=0.12)


def _draw_graph(
    error: Any, change: Any, graph: dict[str, Any], where: dict[str, int], marker: str, shift: float
) -> None:
    rows = [row for row in graph["rows"] if row["setting"] in where]
    filled = [(where[row["setting"]] + shift, _last(row)) for row in rows if _last(row) is not None]
    error.plot(*zip(*filled, strict=True), color="#c3c9d0", linewidth=1, zorder=1) if filled else None
    for row in rows:
        x, color = where[row["setting"]] + shift, COLORS.get(row["setting"], SOFT)
        epochs = _epochs(row)
        if epochs:
            error.plot(x, row["gradient_error"][epochs[-1]], marker, color=color, markersize=5.5)
        if len(epochs) > 1:
            first = row["gradient_error"][epochs[0]]
            error.plot(x, first, marker, color=color, markersize=5.5, markerfacecolor="white", zorder=1.5)
        paired = [100 * d for d in _paired(graph, row)]
        if paired:
            change.plot([x] * len(paired), paired, marker, color=color, markersize=2.5, alpha=0.55, markeredgewidth=0)
            change.plot(x, mean(paired), marker, color=color, markersize=6)
