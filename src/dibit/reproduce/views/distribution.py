"""Distribution: real activations against the uniform density and the clipped normal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dibit.reproduce.panels import Figure, Histogram
from dibit.reproduce.records import Fact, Record
from dibit.reproduce.schema import JsonObject
from dibit.reproduce.views.layers import LAYER, LayerRow, by_setting, labels
from dibit.tools.markdown import Column, Table, strong, table
from dibit.tools.number_format import number, percent, slug

TITLE = "Distribution"
CLAIM = (
    "i-EXACT rests its levels on a model: a normalised projected activation in [0, 3] follows the clipped normal "
    "CN[1/D] and not the uniform density. The paper compares both with the histogram of real activations by "
    "Jensen-Shannon divergence, layer by layer."
)
_SHORT = {"uniform": "U", "CN[1/R]": "R", "CN[1/G]": "G"}


class DistributionRow(LayerRow):
    epoch: int
    histogram: list[float]
    divergence: dict[str, float]
    models: dict[str, list[float]]
    nearest: str
    holds: bool
    width: int | None = None
    atom: float | None = None


class GraphDistribution(JsonObject):
    name: str
    model: str
    rows: list[DistributionRow]


class Results(JsonObject):
    graphs: list[GraphDistribution]
    verdicts: list[str] | None = None


def records(results: Results) -> Iterator[Record]:
    for setting, own in by_setting([row for graph in results.graphs for row in graph.rows]):
        detail = "activations (layers and epochs): nearer to CN[1/D] than to the uniform density"
        yield Fact(f"{setting}: the model holds", f"{sum(row.holds for row in own)} of {len(own)}", detail)
    yield from results.verdicts or ()
    for graph in results.graphs:
        for setting, own in by_setting(graph.rows):
            last = max(row.epoch for row in own)
            yield _figure(graph, setting, last, [row for row in own if row.epoch == last])
        for epoch in sorted({row.epoch for row in graph.rows}, reverse=True):
            yield _table(graph, epoch)


def _table(graph: GraphDistribution, epoch: int) -> Table:
    def divergence(name: str) -> Column:
        def value(row: DistributionRow) -> str:
            text = number(row.divergence.get(name), 4)
            return strong(text) if name == row.nearest else text

        return f"to {name}", value

    rows = [row for row in graph.rows if row.epoch == epoch]
    models = sorted({name for row in rows for name in row.divergence} - {"uniform"}, reverse=True)
    return table(
        f"Jensen-Shannon divergence (base 2: 0 is equal, 1 is apart) of real activations to each model, {graph.name}, "
        f"{graph.model}, epoch {epoch}. The nearest is bold. Holds: the clipped normal of the elements that share a "
        "range is nearer than the uniform density. Largest lump: what a single bin holds beyond what that clipped "
        "normal puts there.",
        [
            *(*LAYER, divergence("uniform"), *map(divergence, models)),
            ("holds", lambda row: "yes" if row.holds else strong("no")),
            ("largest lump", lambda row: percent(row.atom, 1)),
            ("share a range", lambda row: number(row.count, 0)),
            ("width", lambda row: number(row.width, 0)),
            ("elements", lambda row: number(row.elements, 0)),
        ],
        by_setting(rows),
    )


def _figure(graph: GraphDistribution, setting: str, epoch: int, rows: Sequence[DistributionRow]) -> Figure:
    inner = [100 * mass for row in rows for masses in row.models.values() for mass in masses[1:-1]]
    top = 2.6 * max(inner, default=1.7)  # an atom would flatten everything else: it is cut, and carries its number
    return Figure(
        f"distribution-{slug(graph.name, graph.model, setting)}",
        f"Normalised activations by layer ({graph.name}, {graph.model}, {setting}, epoch {epoch}): % of the elements "
        f"in each of {len(rows[0].histogram)} bins over [0, 3]. The largest bar that leaves a panel has its number. "
        "Below each name, the divergence to the uniform density (U), to CN[1/R] (R) and to CN[1/G] (G).",
        [_panel(row, label, top) for row, label in zip(rows, labels(rows), strict=True)],
    )


def _panel(row: DistributionRow, label: str, top: float) -> Histogram:
    bins = len(row.histogram)
    densities = {"uniform": [100 / bins] * bins} | {
        name: [100 * mass for mass in row.models[name]] for name in ("CN[1/R]", "CN[1/G]") if name in row.models
    }
    words = " · ".join(f"{_SHORT.get(name, name)} {number(value, 3)}" for name, value in row.divergence.items())
    return Histogram(label, words, row.setting, [100 * mass for mass in row.histogram], densities, top)
