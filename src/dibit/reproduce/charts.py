"""Figures as SVG: one column as wide as a phone, which a larger screen enlarges."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from dibit.reproduce.panels import Dot, Figure, Histogram, RowPanel
from dibit.tools.errors import require
from dibit.tools.figures import INK, SOFT, figure, grid, legend_above, plain_log, svg_of
from dibit.tools.number_format import number, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing
    from matplotlib.figure import SubFigure

DARK = "invert(1) hue-rotate(180deg)"  # a CSS filter: dark becomes light, and a colour stays that colour
_WIDTH, _ROW, _FONT = 326, 20, 8.0  # CSS pixels of a figure and of a row, points of text (8 are 10.7 pixels)

# One colour a setting, in every figure; they stay apart for colour-blind readers by hue and by lightness.
COLORS = {
    "ink": INK,
    "FP32": "#4d4d4d",
    "EXACT": "#d55e00",
    "EXACT + VM": "#d08a1f",
    "G/R = 2": "#6aa5d8",
    "G/R = 4": "#5896cd",
    "G/R = 8": "#4687bf",
    "G/R = 16": "#3476b0",
    "G/R = 32": "#2165a1",
    "G/R = 64": "#0f5591",
    "i-EXACT": "#0f5591",  # its blocks of 1,024 elements are G/R = 64
    "i-EXACT + VM": "#aa4499",
    "whole tensor": "#152a45",
    "no projection": "#7a6a4f",
    "default": "#009e73",
    "none": "#4d4d4d",
    "exact": "#d55e00",
    "iexact": "#0f5591",  # recipes
    # levels, and the densities they are made for
    "uniform": "#767676",
    "normal": "#aa4499",
    "fitted": "#8a8a1f",
    "block normal": "#4b1d43",
    # what is kept
    "linear inputs": "#5b93cf",
    "norm inputs": "#e07b54",
    "ReLU": "#c2a233",
    "dropout": "#2f9e7e",
    "targets": "#d4709a",
    "other": "#8f8f8f",
}
MARKS: dict[str, dict[str, Any]] = {  # of `Dot.others`, in matplotlib's words
    "authors’ log": {"color": INK, "marker": "D", "ms": 4.5, "mew": 0},
    "uniform": {"color": COLORS["uniform"], "marker": "o", "ms": 6, "mew": 0},
    "clipped normal": {"color": COLORS["normal"], "marker": "D", "ms": 4.5, "mew": 0},
    "fitted": {"color": COLORS["fitted"], "marker": "|", "ms": 10, "mew": 2},
    "expected": {"color": INK, "marker": "x", "ms": 4.5},
}
DENSITIES: dict[str, dict[str, Any]] = {  # of `Histogram.densities`
    "uniform": {"color": COLORS["uniform"], "lw": 1.2},
    "CN[1/R]": {"color": COLORS["normal"], "lw": 1.3},
    "CN[1/G]": {"color": COLORS["block normal"], "lw": 1.3, "ls": (0, (3, 1.5))},
}
_RAIL, _BAND = "#c3c9d0", "#e6e8eb"
_BESIDE: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7.5, "weight": "bold"}


def draw(shown: Figure) -> str:
    """Draw a figure as SVG, light; `DARK` makes it dark."""
    return svg_of(partial(_figure, shown), _FONT, shown.name)


def file(shown: Figure, svg: str) -> bytes:
    """A drawn figure as a file of its own: with its description, and dark where the reader's screen is."""
    dark = f"@media (prefers-color-scheme: dark) {{ :root {{ filter: {DARK} }} }}"
    return svg.replace(">", f"><title>{escape(shown.alt)}</title><style>{dark}</style>", 1).encode()


def _figure(shown: Figure) -> Drawing:
    columns = 2 if isinstance(shown.panels[0], Histogram) else 1
    heights = list(map(_height, shown.panels))
    lines = [max(heights[i : i + columns]) for i in range(0, len(heights), columns)]
    drawing = figure(sum(lines), _WIDTH)
    places = drawing.add_gridspec(len(lines), columns, height_ratios=lines)
    entries: dict[str, Any] = {}
    for i, panel in enumerate(shown.panels):
        part = drawing.add_subfigure(places[divmod(i, columns)])
        part.suptitle(short(panel.title, 44 if columns == 1 else 24), x=0, ha="left")
        ax = part.subplots()
        _draw_rows(ax, panel) if isinstance(panel, RowPanel) else _draw_histogram(ax, panel)
        handles, labels = ax.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if entries:
        side_by_side = max(1, int(_WIDTH // (30 + 6 * max(map(len, entries)))))
        drawing.set_figheight((sum(lines) + 6 + 15 * math.ceil(len(entries) / side_by_side)) / 96)
        legend_above(drawing, list(entries.values()), side_by_side)
    return drawing


def _height(panel: RowPanel | Histogram) -> float:
    """CSS pixels of a panel."""
    if isinstance(panel, Histogram):
        return 178
    rows = sum(len(rows) + bool(heading) for heading, rows in panel.filled)
    return _ROW * rows + 44 + 18 * bool(panel.xlabel)


def _draw_rows(ax: Axes, panel: RowPanel) -> None:
    if panel.xlim:
        ax.set_xlim(panel.xlim)
    for guide in panel.guides:
        style: dict[str, Any] = {"label": guide.label, "ls": (0, (4, 2))} if guide.label else {}
        ax.axvline(guide.x, color=COLORS.get(guide.color, SOFT), lw=1, **style)
    named, y = {}, 0
    for heading, rows in panel.filled:
        if heading:
            _draw_heading(ax, y, heading)
            y += 1
        for label, dot in rows:
            (_draw_bar if dot.parts else _draw_dot)(ax, y, label, dot)
            for name, x in dot.others.items():
                ax.plot(x, y, ls="", label=name, **MARKS[name])
            named[y] = short(label, 24)
            y += 1
    if any(dot.parts for _, rows in panel.filled for _, dot in rows):
        ax.margins(x=0.2)  # room for the totals
    if panel.log:
        ax.set_xscale("log")
        low, high = ax.get_xlim()
        plain_log(ax.xaxis, (1, 2, 5) if high < 50 * low else (1,))
    else:
        ax.locator_params(axis="x", nbins=6)
    ax.set_yticks(list(named), list(named.values()))
    ax.set_ylim(y - 0.4, -0.6)
    ax.set_xlabel(panel.xlabel)
    grid(ax, "x")


def _draw_heading(ax: Axes, y: int, heading: str) -> None:
    """A band over the whole width."""
    place = {"transform": _from_left(ax, ax.transData), "va": "center", "weight": "bold", "zorder": 4}
    ax.axhspan(y - 0.45, y + 0.45, -2, color=_BAND, lw=0, clip_on=False, zorder=3).set_in_layout(False)
    ax.text(0.005, y, short(heading), **place).set_in_layout(False)


def _draw_bar(ax: Axes, y: int, label: str, dot: Dot) -> None:
    left = 0.0
    for part, size in dot.parts.items():
        named = part if part != label else "_"
        ax.barh(y, size, 0.7, left, color=COLORS.get(part, SOFT), edgecolor="white", linewidth=0.6, label=named)
        left += size
    ax.annotate(number(left, 1), (max([left, *dot.others.values()]), y), (6, 0), va="center", **_BESIDE)


def _draw_dot(ax: Axes, y: int, label: str, dot: Dot) -> None:
    color = COLORS.get(label, SOFT)
    rail = [x for x in (dot.earlier, dot.value) if x is not None] if dot.earlier is not None else dot.others.values()
    if rail:
        ax.plot([min(rail), max(rail)], [y, y], color=_RAIL, lw=2)
    if dot.earlier is not None:
        ax.plot(dot.earlier, y, "o", color=color, ms=5.5, mfc="none")
    ax.plot(dot.values, [y] * len(dot.values), "o", color=color, ms=3.5, mew=0, alpha=0.5)
    if dot.low is not None and dot.high is not None:
        ax.plot([dot.low, dot.high], [y, y], color=color, lw=2, solid_capstyle="butt")
    if dot.value is not None:
        ax.plot(dot.value, y, "o", color=color, ms=6, mew=0)


def _draw_histogram(ax: Axes, panel: Histogram) -> None:
    ax.set_title(" ", fontsize=7.5)  # room for the line below the title
    ax.text(0, 1.03, panel.words, color=SOFT, fontsize=7.5, transform=_from_left(ax, ax.transAxes))
    bins, measured = len(panel.measured), panel.measured
    edges, color = [3 * i / bins for i in range(bins + 1)], COLORS.get(panel.color, SOFT)
    ax.stairs(measured, edges, fill=True, color=color, alpha=0.35, label="measured")
    ax.stairs(measured, edges, color=color, baseline=None, lw=0.9)
    for name, masses in panel.densities.items():
        ax.stairs(masses, edges, baseline=None, label=name, **DENSITIES[name])
    largest = max(range(bins), key=measured.__getitem__)
    if measured[largest] > panel.top:
        x, shift, side = (edges[largest + 1], 3, "left") if largest < bins / 2 else (edges[largest], -3, "right")
        ax.annotate(f"{measured[largest]:.0f} %", (x, panel.top), (shift, -2), ha=side, va="top", **_BESIDE)
    ax.set_xlim(0, 3)
    ax.set_ylim(0, panel.top)
    ax.locator_params(nbins=3)
    grid(ax, "y")
    ax.spines["left"].set_visible(False)
    ax.tick_params(length=0)


def _from_left(ax: Axes, across: Any) -> Any:
    """Coordinates that begin at the panel's left edge, and have their height from `across`."""
    part: SubFigure = ax.figure  # type: ignore[assignment]
    return require("matplotlib.transforms", "study").blended_transform_factory(part.transSubfigure, across)
