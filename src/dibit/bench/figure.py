"""Error of the gradient, drawn: against bytes kept, and as a map of networks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dibit.bench.gradient import FAMILIES
from dibit.recipes import BOUNDED
from dibit.tools.figures import INK, SOFT, figure, grid, legend_above, plain_log, svg_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {
    "papers": "#d55e00",
    "all rows": "#7a6a4f",
    "rows uniformly": "#56a0d3",
    "rows by norm": "#aa4499",
    "rows by gradient": "#009e73",
}


def gradient_figure(results: Sequence[Mapping[str, Any]]) -> bytes:
    """SVG: a row of panels a graph and model, a panel an epoch, from what `dibit.bench.gradient.measure` returns."""
    rows = [(found["model"], graph, found["epochs"]) for found in results for graph in found["graphs"]]

    def draw() -> Figure:
        from matplotlib.lines import Line2D
        from matplotlib.ticker import FuncFormatter

        columns = max(len(epochs) for _, _, epochs in rows)
        panels = figure(60 + 175 * len(rows))
        axes = panels.subplots(len(rows), columns, squeeze=False, sharex="row", sharey="row")
        for line, (model, graph, epochs) in zip(axes, rows, strict=True):
            known = {row["setting"]: row for row in graph["rows"]}
            for ax, epoch in zip(line, epochs, strict=False):
                for family, members in FAMILIES.items():
                    own = [known[name] for name in members if name in known and name != "8 bit"]  # off the scale
                    points = [(row["bytes_per_node"], row["errors"][str(epoch)]) for row in own]
                    if points:
                        style = "o" if family in ("papers", "all rows") else "o-"
                        ax.plot(*zip(*points, strict=True), style, color=COLORS[family], markersize=3.5)
                for name in BOUNDED:
                    if name in known:
                        at = known[name]["bytes_per_node"], known[name]["errors"][str(epoch)]
                        ax.plot(*at, "o", color=COLORS["rows by gradient"], markersize=7, markerfacecolor="none")
                        ax.annotate(name, at, xytext=(4, 5), textcoords="offset points", fontsize=7.5, color=INK)
                ax.set_xscale("log")
                ax.set_yscale("log")
                plain_log(ax.xaxis)
                ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                grid(ax, "y")
                ax.set_title(f"{graph['graph']}, epoch {epoch}", fontsize=8)
            line[0].set_ylabel(f"squared error, {model}", color=SOFT)
        for ax in axes[-1]:
            ax.set_xlabel("bytes a node")
        handles = [Line2D([], [], color=color, marker="o", label=name) for name, color in COLORS.items()]
        legend_above(panels, handles, columns=5)
        return panels

    return svg_of(draw).encode()


def noise_figure(results: Mapping[str, Any]) -> bytes:
    """SVG: a heat map a graph, epoch and setting, from what `dibit.bench.noise.measure` returns.

    A row a model and norm, without and with residual connections, a column a number of layers.
    """
    rows = results["rows"]
    panels = list(dict.fromkeys((row["graph"], row["epoch"], row["setting"]) for row in rows))
    lines = list(dict.fromkeys((row["model"], row["norm"], row["residual"]) for row in rows))
    layers = sorted({row["layers"] for row in rows})
    found = {
        (row["graph"], row["epoch"], row["setting"], row["model"], row["norm"], row["residual"], row["layers"]): row
        for row in rows
    }

    def draw() -> Figure:
        from matplotlib.colors import TwoSlopeNorm

        columns = len({panel[2] for panel in panels})
        height = -(-len(panels) // columns)
        drawing = figure(60 + (30 + 13 * len(lines)) * height)
        axes = drawing.subplots(height, columns, squeeze=False, sharex=True, sharey=True)
        for ax, panel in zip(axes.flat, panels, strict=False):
            values = [
                [found.get((*panel, *line, count), {"error": math.nan})["error"] for count in layers] for line in lines
            ]
            shades = [[math.log10(min(max(x, 1e-3), 1e3)) if x == x else math.nan for x in row] for row in values]
            ax.imshow(shades, cmap="RdYlGn_r", norm=TwoSlopeNorm(0, -3, 3), aspect="auto")
            for y, row in enumerate(values):
                for x, value in enumerate(row):
                    if value == value:
                        text = f"{value:.2g}" if value < 1000 else f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
                        ax.text(x, y, text, ha="center", va="center", fontsize=5.5, color=INK)
            ax.set_xticks(range(len(layers)), [str(count) for count in layers], fontsize=7)
            names = [f"{m}, {n}{', residual' if r else ''}" for m, n, r in lines]
            ax.set_yticks(range(len(lines)), names, fontsize=6)
            ax.tick_params(length=0)
            for side in ax.spines.values():
                side.set_visible(False)
            ax.set_title(f"{panel[2]}: {panel[0]}, epoch {panel[1]}", fontsize=8)
        for ax in axes[-1]:
            ax.set_xlabel("layers", color=SOFT)
        return drawing

    return svg_of(draw).encode()
