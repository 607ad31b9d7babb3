"""Error of the gradient against bytes kept, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dibit.bench.gradient import FAMILIES
from dibit.reproduce.figures import INK, SOFT, WIDE, Layout, drawn, figure, grid, legend_above, plain_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {
    "papers": "#d55e00",
    "all rows": "#7a6a4f",
    "rows uniformly": "#56a0d3",
    "rows by norm": "#aa4499",
    "rows by gradient": "#009e73",
}
_MARKED = ("default", "small")


def gradient_figure(results: Sequence[Mapping[str, Any]]) -> bytes:
    """SVG: a row of panels a graph and model, a panel an epoch, from what `dibit.bench.gradient.measure` returns."""
    rows = [(found["model"], graph, found["epochs"]) for found in results for graph in found["graphs"]]

    def draw(layout: Layout) -> Figure:
        from matplotlib.lines import Line2D
        from matplotlib.ticker import FuncFormatter

        columns = max(len(epochs) for _, _, epochs in rows)
        panels = figure(layout, 60 + 175 * len(rows))
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
                for name in _MARKED:
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

    return drawn(draw, WIDE)
