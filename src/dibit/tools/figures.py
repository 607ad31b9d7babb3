"""Figures: drawn with matplotlib in Dibit's style, as SVG that is the same at every run."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dibit.tools.errors import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, LINE = "#1f2933", "#5b6570", "#9aa3ad"
FAMILY = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"


def svg_of(draw: Callable[[], Figure], font: float = 9.5, salt: str = "") -> str:
    """SVG of a figure under Dibit's style.

    Args:
        draw: Returns the figure.
        font: Points of its text (4/3 of a CSS pixel).
        salt: Sets its ids apart from those of other figures in a page.
    """
    # A style context and bare Figure objects: neither pyplot, nor the backend, nor the caller's rcParams are touched.
    with require("matplotlib.style", "study").context(["default", _style(font, salt)]):
        buffer = io.StringIO()
        draw().savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": "Dibit"})
    # The reader's own sans-serif type; laid out with DejaVu, which few are wider than. Each text names its family: said
    # once, on the root, it is the same for half the bytes. Of ids only those stay that the drawing refers to.
    plain = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", buffer.getvalue(), flags=re.DOTALL)
    plain = re.sub(r" font-family: [^;\"]*;?", "", re.sub(r'<g id="[^"]*"', "<g", plain))
    return plain[plain.index("<svg") :].replace("<svg ", f'<svg font-family="{FAMILY}" stroke-linejoin="round" ', 1)


def figure(height: float, width: float = 800) -> Figure:
    """Return an empty figure of `width` x `height` CSS pixels."""
    return require("matplotlib.figure", "study").Figure(figsize=(width / 96, height / 96), layout="constrained")


def legend_above(figure: Figure, handles: Sequence[Any], columns: int) -> None:
    """Put one legend for all panels on top, outside of them."""
    figure.legend(handles=list(handles), loc="outside upper left", ncols=columns)


def plain_log(axis: Any, steps: Sequence[float] = (1, 2, 5)) -> None:
    """Label a logarithmic axis (`ax.xaxis` or `ax.yaxis`) at the steps of each power of ten with plain numbers."""
    ticker = require("matplotlib.ticker", "study")
    axis.set_major_locator(ticker.LogLocator(subs=steps))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())
    axis.set_minor_locator(ticker.NullLocator())


def grid(ax: Axes, along: str) -> None:
    """Draw faint lines across the axis that is read off, "x" or "y", and no frame."""
    ax.grid(axis=along, color=LINE, alpha=0.3, linewidth=0.8)  # type: ignore[arg-type]
    ax.spines[["top", "right", "left" if along == "x" else "right"]].set_visible(False)
    ax.tick_params(axis="y" if along == "x" else "x", length=0)


def _style(font: float, salt: str) -> dict[str, Any]:
    small = max(font - 0.5, 7.5)
    return {
        "font.family": "DejaVu Sans",
        "font.size": font,
        "figure.titlesize": font,
        "figure.titleweight": "bold",
        "axes.titlesize": font,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": font,
        "axes.labelcolor": SOFT,
        "axes.edgecolor": LINE,
        "axes.axisbelow": True,
        "axes.linewidth": 0.8,
        "axes.unicode_minus": True,
        "axes.formatter.use_mathtext": False,
        "axes.formatter.useoffset": False,
        "text.color": INK,
        "text.parse_math": False,  # a graph's name may hold dollars
        "xtick.labelsize": small,
        "ytick.labelsize": small,
        "xtick.color": LINE,
        "ytick.color": LINE,
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
        "svg.hashsalt": f"dibit{salt}",
        "figure.constrained_layout.h_pad": 0.05,
        "figure.constrained_layout.w_pad": 0.05,
    }
