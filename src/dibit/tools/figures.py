"""Figures: drawn with matplotlib in two layouts, wide and narrow, as SVG that is the same at every run."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dibit.tools.errors import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, GRID = "#1f2933", "#5b6570", "#e3e6ea"

# One colour a setting, in every figure; they stay apart for colour-blind readers by hue and by lightness.
COLORS = {
    "FP32": "#4d4d4d",
    "EXACT": "#d55e00",
    "EXACT + VM": "#e8a33d",
    "G/R = 2": "#a6cbe6",
    "G/R = 4": "#86b6da",
    "G/R = 8": "#659fcc",
    "G/R = 16": "#4687bb",
    "G/R = 32": "#296ea8",
    "G/R = 64": "#0f5591",
    "i-EXACT": "#0f5591",  # blocks of 1,024 elements: G/R = 64
    "i-EXACT + VM": "#aa4499",
    "whole tensor": "#152a45",
    "no projection": "#7a6a4f",
    "default": "#009e73",
    # levels, and the densities they are made for
    "uniform": "#767676",
    "normal": "#aa4499",
    "fitted": "#8a8a1f",
}
KINDS = {
    "linear inputs": "#77aadd",
    "norm inputs": "#ee8866",
    "ReLU": "#eedd88",
    "dropout": "#44bb99",
    "targets": "#ffaabb",
    "other": "#bbbbbb",
}
_FAMILY = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"


@dataclass(frozen=True)
class Layout:
    """How wide a figure is, in CSS pixels, and how large its text, in points (4/3 of a pixel)."""

    width: int
    font: float

    @property
    def small(self) -> float:
        """Points of labels that stand beside single marks; 7.5 points are 10 pixels."""
        return max(7.5, self.font - 1.5)

    @property
    def wide(self) -> bool:
        return self.width > 640

    def pick(self, wide: Any, narrow: Any) -> Any:
        """Return what this layout takes of the two."""
        return wide if self.wide else narrow


WIDE, NARROW = Layout(800, 9.5), Layout(358, 8.0)  # 358: what a phone of 390 pixels leaves


@dataclass(frozen=True)
class Picture:
    """A figure of the page: SVG for wide and for narrow screens, its caption, and a description in words."""

    name: str
    caption: str
    alt: str
    wide: bytes
    narrow: bytes


def picture(name: str, caption: str, alt: str, draw: Callable[[Layout], Figure]) -> Picture:
    """Draw a figure in both layouts.

    Args:
        name: Its id without "fig-", and the name of its file.
        caption: What it shows.
        alt: A description with the main numbers, for readers who do not see it.
        draw: Returns the figure for a layout; called twice, under Dibit's style.
    """
    return Picture(name, caption, alt, drawn(draw, WIDE), drawn(draw, NARROW))


def drawn(draw: Callable[[Layout], Figure], layout: Layout) -> bytes:
    """SVG of a figure in one layout, under Dibit's style."""
    # A style context and bare Figure objects: neither pyplot, nor the backend, nor the caller's rcParams are touched.
    with require("matplotlib.style", "study").context(["default", _style(layout)]):
        return _svg(draw(layout))


def figure(layout: Layout, height: float) -> Figure:
    """Return an empty figure as wide as the layout and `height` CSS pixels high."""
    return require("matplotlib.figure", "study").Figure(figsize=(layout.width / 96, height / 96), layout="constrained")


def legend_above(figure: Figure, handles: Sequence[Any], columns: int) -> None:
    """Put one legend for all panels on top, outside of them."""
    figure.legend(handles=list(handles), loc="outside upper left", ncols=columns)


def plain_log(axis: Any) -> None:
    """Label a logarithmic axis (`ax.xaxis` or `ax.yaxis`) at 1, 2, 5, 10, ... with plain numbers."""
    ticker = require("matplotlib.ticker", "study")
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())
    axis.set_minor_locator(ticker.NullLocator())


def grid(ax: Axes, along: str) -> None:
    """Draw faint lines across the axis that is read off, "x" or "y", and no frame."""
    ax.grid(axis=along, color=GRID, linewidth=0.8)  # type: ignore[arg-type]
    ax.spines[["top", "right", "left" if along == "x" else "right"]].set_visible(False)
    ax.tick_params(axis="y" if along == "x" else "x", length=0)


def _style(layout: Layout) -> dict[str, Any]:
    small = layout.font - layout.pick(0.5, 0)
    return {
        "font.family": "DejaVu Sans",
        "font.size": layout.font,
        "axes.titlesize": layout.font,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": layout.font,
        "axes.labelcolor": SOFT,
        "axes.edgecolor": "#9aa3ad",
        "axes.axisbelow": True,
        "axes.linewidth": 0.8,
        "axes.unicode_minus": True,
        "axes.formatter.use_mathtext": False,
        "axes.formatter.useoffset": False,
        "text.color": INK,
        "text.parse_math": False,  # a graph's name may hold dollars
        "xtick.labelsize": small,
        "ytick.labelsize": small,
        "xtick.color": "#9aa3ad",
        "ytick.color": "#9aa3ad",
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "legend.frameon": False,
        "legend.fontsize": small,
        "legend.handlelength": 1.3,
        "legend.columnspacing": 1.2,
        "legend.handletextpad": 0.5,
        "legend.borderaxespad": 0,
        "legend.borderpad": 0.2,
        "lines.linewidth": 1.4,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "dibit",
        "figure.constrained_layout.h_pad": 0.05,
        "figure.constrained_layout.w_pad": 0.05,
    }


def _svg(figure: Figure) -> bytes:
    """Return the figure as SVG in the reader's own sans-serif type; laid out with DejaVu, which few are wider than."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": "Dibit"})
    # Each text names the family: said once, on the root, it is the same for half the bytes.
    plain = re.sub(rb" font-family: [^;\"]*;?", b"", buffer.getvalue())
    return plain.replace(b"<svg ", f'<svg font-family="{_FAMILY}" '.encode(), 1)
