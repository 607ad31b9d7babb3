"""Figures as SVG: a piece a panel and an entry of the legend, which flow into rows as wide as the screen."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.sax.saxutils import escape

from dibit.reproduce.panels import Figure, Heading, Marks, Panel
from dibit.tools.errors import require
from dibit.tools.figures import FAMILY, INK, SOFT, figure, grid, plain_log, svg_of
from dibit.tools.number_format import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

WIDTH, SMALL = 326, 157  # CSS pixels of a panel: one, or two small ones, on a phone of 358 pixels
DARK = "invert(1) hue-rotate(180deg)"  # a CSS filter: dark becomes light, and a colour stays that colour
_SHEET = 676  # pixels of a figure's own file
_FONT, _ROW = 8.0, 20  # points of text (8 are 10.7 pixels), pixels of a row

# One colour a setting, in every figure; they stay apart for colour-blind readers by hue and by lightness.
COLORS = {
    "ink": INK,
    "soft": SOFT,
    "rail": "#c3c9d0",
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
KINDS: dict[str, dict[str, Any]] = {  # of marks, in matplotlib's words; "ls" is linestyle, "mew" markeredgewidth
    "dot": {"marker": "o", "ms": 6, "ls": "", "mew": 0},
    "seed": {"marker": "o", "ms": 3.5, "ls": "", "mew": 0, "alpha": 0.5},
    "hollow": {"marker": "o", "ms": 5.5, "ls": "", "mfc": "none"},
    "ring": {"marker": "o", "ms": 8, "ls": "", "mfc": "none"},
    "diamond": {"marker": "D", "ms": 4.5, "ls": "", "mew": 0},
    "stroke": {"marker": "|", "ms": 10, "ls": "", "mew": 2},
    "cross": {"marker": "x", "ms": 4.5, "ls": ""},
    "rail": {"lw": 2},
    "interval": {"lw": 2, "solid_capstyle": "butt"},
    "line": {"marker": "o", "ms": 3.5},
    "line dashed": {"marker": "o", "ms": 3.5, "ls": (0, (4, 2))},
    "line dotted": {"marker": "o", "ms": 3.5, "ls": (0, (1, 1.5))},
    "level": {"lw": 1.2},
    "guide": {"lw": 1},
    "guide dashed": {"lw": 1, "ls": (0, (4, 2))},
    "filled": {"lw": 0.9},
    "steps": {"lw": 1.3},
    "steps dashed": {"lw": 1.3, "ls": (0, (3, 1.5))},
    "bar": {},
    "text": {"ha": "left"},
    "text left": {"ha": "right"},
}
_FAINT = 0.35  # opacity of what is filled below steps


class Piece(NamedTuple):
    """A panel or an entry of the legend: its size in CSS pixels, and its SVG."""

    width: float
    height: float
    svg: str


class Drawn(NamedTuple):
    """A figure, whose pieces flow into rows as wide as the screen."""

    legend: list[Piece]
    panels: list[Piece]


def draw(shown: Figure) -> Drawn:
    """Draw a figure, light; `DARK` makes it dark."""
    entries = {marks.label: marks for panel in shown.panels for marks in panel.marks if marks.label and marks.at}
    legend = [_piece(partial(_entry, marks), f"{shown.name} {label}", True) for label, marks in entries.items()]
    width = SMALL if shown.small else WIDTH
    panels = [_piece(partial(_panel, panel, width), f"{shown.name} {i}") for i, panel in enumerate(shown.panels)]
    return Drawn(legend, panels)


def sheet(shown: Figure, drawn: Drawn) -> bytes:
    """One SVG of a whole figure, for a file of its own."""
    placed, top = "", 0.0
    for pieces, gap in ((drawn.legend, 14), (drawn.panels, (_SHEET - 4 * SMALL) / 3 if shown.small else 24)):
        x = height = 0.0
        for piece in pieces:
            if x + piece.width > _SHEET + 1:
                x, top, height = 0.0, top + height + 8, 0.0
            placed += piece.svg.replace("<svg ", f'<svg x="{x:g}" y="{top:g}" ', 1)
            x, height = x + piece.width + gap, max(height, piece.height)
        top += height + 10
    dark = f"@media (prefers-color-scheme: dark) {{ :root {{ filter: {DARK} }} }}"
    body = f"<title>{escape(shown.alt)}</title><style>{dark}</style>{placed}"
    return f"{_root(_SHEET, top, f'0 0 {_SHEET} {top:g}')}{body}</svg>\n".encode()


def _piece(draw: Callable[[], Drawing], salt: str, tight: bool = False) -> Piece:
    """Draw with ids that are a piece's own, for all pieces are in one page."""
    svg = svg_of(draw, _FONT + tight, salt, tight)
    head, _, body = svg.partition("</metadata>")
    _, _, points, high = re.findall(r'viewBox="([-\d.]+) ([-\d.]+) ([\d.]+) ([\d.]+)"', head)[0]
    width, height = float(points) / 0.75, float(high) / 0.75
    body = re.sub(r"<g id=\"[^\"]*\"", "<g", re.sub(r"<style.*?</style>", "", body))
    return Piece(width, height, _root(width, height, f"0 0 {points} {high}") + body.strip())


def _root(width: float, height: float, box: str) -> str:
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width:.5g}" height="{height:.5g}" viewBox="{box}" font-family="{FAMILY}" stroke-linejoin="round">'
    )


def _entry(marks: Marks) -> Drawing:
    style, color = KINDS[marks.kind], COLORS.get(marks.color, SOFT)
    if marks.kind in ("bar", "filled"):
        faint = _FAINT if marks.kind == "filled" else 1
        handle = require("matplotlib.patches", "study").Patch(color=color, alpha=faint, label=marks.label)
    else:
        handle = require("matplotlib.lines", "study").Line2D([], [], color=color, label=marks.label, **style)
    drawing = figure(20, WIDTH)
    drawing.legend(handles=[handle], loc="upper left")
    return drawing


def _panel(panel: Panel, width: float) -> Drawing:
    curves = 120 if width == SMALL else 220
    height = (_ROW * len(panel.rows) or curves) + 44 + 14 * bool(panel.subtitle) + 18 * bool(panel.xlabel)
    drawing = figure(height, width)
    drawing.suptitle(short(panel.title, 24 if width == SMALL else 44), x=0, ha="left")
    ax = drawing.subplots()
    if panel.subtitle:
        ax.set_title(" ", fontsize=7.5)  # room for it
        ax.text(0, 1.03, panel.subtitle, color=SOFT, fontsize=7.5, transform=_from_left(ax, ax.transAxes))
    ax.set_xlabel(panel.xlabel)
    if panel.xlim:
        ax.set_xlim(panel.xlim)
    left = [0.0] * len(panel.rows)
    for marks in panel.marks:
        if marks.at:
            _draw_marks(ax, marks, panel, left)
    if panel.scale == "log":
        ax.set_xscale("log")
        low, high = ax.get_xlim()
        plain_log(ax.xaxis, (1, 2, 5) if high < 50 * low else (1,))
    elif panel.scale == "linear":
        ax.locator_params(nbins=3 if width == SMALL else 6)
    if panel.rows:
        _set_rows(ax, panel.rows)
    else:
        _set_curves(ax, panel)
    return drawing


def _from_left(ax: Axes, across: Any) -> Any:
    """Coordinates that begin at the figure's left edge, and have their height from `across`."""
    return require("matplotlib.transforms", "study").blended_transform_factory(ax.figure.transFigure, across)


def _set_rows(ax: Axes, rows: Sequence[str]) -> None:
    named = [(i, label) for i, label in enumerate(rows) if not isinstance(label, Heading)]
    ax.set_yticks([i for i, _ in named], [short(label, 24) for _, label in named])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    grid(ax, "x")
    for i, label in enumerate(rows):
        if isinstance(label, Heading):
            band = ax.axhspan(i - 0.45, i + 0.45, -2, color="#e6e8eb", linewidth=0, clip_on=False, zorder=3)
            band.set_in_layout(False)
            place = {"transform": _from_left(ax, ax.transData), "va": "center", "zorder": 4}
            ax.text(0.005, i, short(label), weight="bold", **place).set_in_layout(False)


def _set_curves(ax: Axes, panel: Panel) -> None:
    grid(ax, "y")
    ax.spines["left"].set_visible(False)
    ax.tick_params(length=0)
    if panel.ylim:
        ax.set_ylim(0, panel.ylim)
    if panel.scale == "powers":
        counts = sorted({x for marks in panel.marks for x, _ in marks.at})
        ax.set_xscale("log", base=2)
        ax.set_xticks(counts, [f"{count:,}" for count in counts])
        ax.minorticks_off()


def _draw_marks(ax: Axes, marks: Marks, panel: Panel, left: list[float]) -> None:
    color, style = COLORS.get(marks.color, SOFT), KINDS[marks.kind]
    if marks.kind == "bar":
        for x, y in marks.at:
            ax.barh(y, x, 0.7, left[int(y)], color=color, edgecolor="white", linewidth=0.6)
            left[int(y)] += x
    elif marks.kind in ("rail", "interval"):
        first, last = panel.xlim or (-math.inf, math.inf)
        for (x, end), y in marks.at:
            low, high = min(x, end), max(x, end)
            ax.plot([max(low, first), min(high, last)], [y, y], color=color, **style)
            for beyond, edge, arrow in ((low < first, first, "<"), (high > last, last, ">")):
                if beyond:
                    ax.plot(edge, y, arrow, color=color, markersize=6, markeredgewidth=0, clip_on=False)
    elif marks.kind.startswith("guide"):
        for x, _ in marks.at:
            ax.axvline(x, color=color, **style)
    elif marks.kind.startswith("text"):
        place = ((6, 0), "center") if panel.rows else ((3 if marks.kind == "text" else -3, -2), "top")
        style = style | {"va": place[1], "textcoords": "offset points", "fontsize": 7.5, "weight": "bold"}
        for at, text in zip(marks.at, marks.texts, strict=True):
            ax.annotate(text, at, place[0], color=color, **style)
    elif marks.kind in ("filled", "steps", "steps dashed"):
        values, edges = [y for _, y in marks.at], [x for x, _ in marks.at]
        edges.append(panel.xlim[1] if panel.xlim else edges[-1])
        if marks.kind == "filled":
            ax.stairs(values, edges, fill=True, color=color, alpha=_FAINT)
        ax.stairs(values, edges, color=color, baseline=None, **style)
    else:
        ax.plot(*zip(*marks.at, strict=True), color=color, **style)
