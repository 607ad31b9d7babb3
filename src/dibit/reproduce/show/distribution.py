"""Distribution: real activations against the uniform density and the clipped normal."""

from __future__ import annotations

from typing import Any

from dibit.reproduce.tables import Cell, Column, Fact, Table, table
from dibit.tools.errors import require
from dibit.tools.figures import COLORS, SOFT, Layout, Picture, figure, legend_above, picture
from dibit.tools.number_format import MODEL, by_setting, module_labels, number, percent, short, slug

TITLE = "Distribution"
CLAIM = (
    "i-EXACT rests its levels on a model: a normalised projected activation in [0, 3] follows the clipped normal "
    "CN[1/D] and not the uniform density. The paper compares both with the histogram of real activations by "
    "Jensen-Shannon divergence, layer by layer."
)
_MODELS = {"CN[1/R]": (COLORS["normal"], "-"), "CN[1/G]": ("#4b1d43", (0, (3, 1.5)))}


def facts(results: dict[str, Any]) -> list[Fact]:
    rows = [row for graph in results["graphs"] for row in graph["rows"]]
    detail = "activations (layers and epochs): nearer to CN[1/D] than to the uniform density"
    return [
        Fact(f"{setting}: the model holds", f"{sum(row['holds'] for row in own)} of {len(own)}", detail)
        for setting, own in by_setting(rows)
    ]


def sentences(results: dict[str, Any]) -> list[str]:
    return list(results.get("verdicts") or [])


def tables(results: dict[str, Any]) -> list[Table]:
    found = []
    for graph in results["graphs"]:
        epochs = sorted({row["epoch"] for row in graph["rows"]}, reverse=True)
        found += [_table(graph, epoch, folded=epoch != epochs[0]) for epoch in epochs]
    return found


def pictures(results: dict[str, Any]) -> list[Picture]:
    found = []
    for graph in results["graphs"]:
        for setting, own in by_setting(graph["rows"]):
            last = max(row["epoch"] for row in own)
            found.append(_picture(graph, setting, last, [row for row in own if row["epoch"] == last]))
    return found


def _table(graph: dict[str, Any], epoch: int, folded: bool) -> Table:
    rows = [row for row in graph["rows"] if row["epoch"] == epoch]
    models = sorted({name for row in rows for name in row["divergence"]} - {"uniform"}, reverse=True)
    columns = [
        Column("module", numeric=False),
        Column("operation", numeric=False),
        *(Column(f"to {name}") for name in ("uniform", *models)),
        Column("holds", numeric=False),
        Column("largest lump"),
        Column("share a range"),
        Column("width"),
        Column("elements"),
    ]
    groups = [(setting, [_cells(row, models) for row in own]) for setting, own in by_setting(rows)]
    name = f"{graph['name']}, {graph['model']}, epoch {epoch}"
    return table(
        f"distribution-{slug(graph['name'], graph['model'], epoch)}",
        f"Jensen-Shannon divergence (base 2: 0 is equal, 1 is apart) of real activations to each model, {name}. The "
        "nearest is bold. Holds: the clipped normal of the elements that share a range is nearer than the uniform "
        "density. Largest lump: what a single bin holds beyond what that clipped normal puts there.",
        columns,
        groups,
        fold=f"Earlier: epoch {epoch}, {graph['name']}, {graph['model']}" if folded else "",
    )


def _cells(row: dict[str, Any], models: list[str]) -> list[Cell | str]:
    divergence, nearest = row["divergence"], row["nearest"]
    return [
        row["module"] or MODEL,
        row["operation"],
        *(Cell(number(divergence.get(name), 4), strong=name == nearest) for name in ("uniform", *models)),
        "yes" if row["holds"] else Cell("no", strong=True),
        percent(row.get("atom"), 1),
        number(row["count"], 0),
        number(row.get("width"), 0),
        number(row.get("elements"), 0),
    ]


def _picture(graph: dict[str, Any], setting: str, epoch: int, rows: list[dict[str, Any]]) -> Picture:
    numbers = "; ".join(f"{label} {_in_words(row)}" for label, row in zip(module_labels(rows), rows, strict=True))
    name = f"{graph['name']}, {graph['model']}, {setting}, epoch {epoch}"
    return picture(
        f"distribution-{slug(graph['name'], graph['model'], setting)}",
        f"Normalised activations by layer ({name}): % of the elements in each of {len(rows[0]['histogram'])} bins "
        "over [0, 3]. Bars that leave a panel carry their number. Below each name, the divergence to the uniform "
        "density (U), to CN[1/R] (R) and to CN[1/G] (G).",
        f"Histograms of normalised activations, {name}, with the Jensen-Shannon divergence: {numbers}.",
        lambda layout: _draw(setting, rows, layout),
    )


def _in_words(row: dict[str, Any]) -> str:
    return ", ".join(f"{number(value, 3)} to {name}" for name, value in row["divergence"].items())


def _in_short(row: dict[str, Any]) -> str:
    short = {"uniform": "U", "CN[1/R]": "R", "CN[1/G]": "G"}
    return " · ".join(f"{short.get(name, name)} {number(value, 3)}" for name, value in row["divergence"].items())


def _draw(setting: str, rows: list[dict[str, Any]], layout: Layout) -> Any:
    patches, lines = require("matplotlib.patches", "study"), require("matplotlib.lines", "study")
    columns = min(layout.pick(4, 2), len(rows))
    lies = -(-len(rows) // columns)
    drawn = figure(layout, 50 + lies * layout.pick(150, 130))
    axes = drawn.subplots(lies, columns, squeeze=False, sharex=True, sharey=True).flatten()
    inner = [100 * mass for row in rows for masses in row["models"].values() for mass in masses[1:-1]]
    top = 2.6 * max(inner, default=1.7)  # an atom would flatten everything else: it is cut, and carries its number
    color = COLORS.get(setting, SOFT)
    for ax, row, label in zip(axes, rows, module_labels(rows), strict=False):
        _draw_panel(ax, row, label, color, top, layout)
    for ax in axes[len(rows) :]:
        ax.set_visible(False)
    names = [name for name in _MODELS if any(name in row["models"] for row in rows)]
    legend_above(
        drawn,
        [
            patches.Patch(facecolor=color, alpha=0.45, edgecolor=color, label="measured"),
            lines.Line2D([], [], color=COLORS["uniform"], label="uniform"),
            *(lines.Line2D([], [], color=_MODELS[n][0], linestyle=_MODELS[n][1], label=n) for n in names),
        ],
        4,
    )
    return drawn


def _draw_panel(ax: Any, row: dict[str, Any], label: str, color: str, top: float, layout: Layout) -> None:
    bins = len(row["histogram"])
    edges = [3 * i / bins for i in range(bins + 1)]
    measured = [100 * mass for mass in row["histogram"]]
    models = {name: [100 * mass for mass in masses] for name, masses in row["models"].items()}
    ax.stairs(measured, edges, fill=True, color=color, alpha=0.35)
    ax.stairs(measured, edges, color=color, linewidth=0.9)
    ax.plot([0, 3], [100 / bins] * 2, color=COLORS["uniform"], linewidth=1.2)
    for name, masses in models.items():
        line, dashes = _MODELS.get(name, (SOFT, "-"))
        ax.stairs(masses, edges, color=line, linestyle=dashes, linewidth=1.3, baseline=None)
    for i, mass in enumerate(measured):
        if mass > top and mass == max(
            measured[max(0, i - bins // 6) : i + bins // 6]
        ):  # numbers of neighbours would collide
            right = i < bins / 2  # on the side where there is room
            place = {"xytext": (3 if right else -3, -1), "textcoords": "offset points", "va": "top"}
            ha = "left" if right else "right"
            ax.annotate(
                f"{mass:.0f} %", (edges[i + 1] if right else edges[i], top), ha=ha, fontsize=layout.small, **place
            )
    ax.set(xlim=(0, 3), ylim=(0, top))
    ax.set_xticks([0, 1, 2, 3])
    ax.tick_params(labelsize=layout.small, length=2)
    ax.tick_params(axis="x", labelbottom=True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(f"{short(label, 24)}\n", fontsize=layout.font - layout.pick(0.5, 0))
    below = ax.text(0, 1.03, _in_short(row), transform=ax.transAxes, color=SOFT, fontsize=7.6)
    below.set_in_layout(False)  # it may be wider than its panel; the panel shall not shrink for it
