"""Distribution: real activations against the uniform density and the clipped normal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dibit.reproduce.panels import Figure, Marks, Panel
from dibit.reproduce.records import Cell, Column, Fact, Record, table
from dibit.reproduce.schema import Distribution, DistributionGraph, DistributionRow
from dibit.reproduce.views.layers import LAYER, by_setting, labels
from dibit.tools.number_format import number, percent, slug

TITLE = "Distribution"
CLAIM = (
    "i-EXACT rests its levels on a model: a normalised projected activation in [0, 3] follows the clipped normal "
    "CN[1/D] and not the uniform density. The paper compares both with the histogram of real activations by "
    "Jensen-Shannon divergence, layer by layer."
)
_SHORT = {"uniform": "U", "CN[1/R]": "R", "CN[1/G]": "G"}


def records(results: Distribution) -> Iterator[Record]:
    for setting, own in by_setting([row for graph in results.graphs for row in graph.rows]):
        detail = "activations (layers and epochs): nearer to CN[1/D] than to the uniform density"
        yield Fact(f"{setting}: the model holds", f"{sum(row.holds for row in own)} of {len(own)}", detail)
    yield from results.verdicts or ()
    for graph in results.graphs:
        for setting, own in by_setting(graph.rows):
            last = max(row.epoch for row in own)
            yield _figure(graph, setting, last, [row for row in own if row.epoch == last])
        epochs = sorted({row.epoch for row in graph.rows}, reverse=True)
        for epoch in epochs:
            yield _table(graph, epoch, folded=epoch != epochs[0])


def _table(graph: DistributionGraph, epoch: int, folded: bool) -> Record:
    def divergence(name: str) -> Column:
        return Column(f"to {name}", lambda row: Cell(number(row.divergence.get(name), 4), strong=name == row.nearest))

    rows = [row for row in graph.rows if row.epoch == epoch]
    models = sorted({name for row in rows for name in row.divergence} - {"uniform"}, reverse=True)
    return table(
        f"distribution-{slug(graph.name, graph.model, epoch)}",
        f"Jensen-Shannon divergence (base 2: 0 is equal, 1 is apart) of real activations to each model, {graph.name}, "
        f"{graph.model}, epoch {epoch}. The nearest is bold. Holds: the clipped normal of the elements that share a "
        "range is nearer than the uniform density. Largest lump: what a single bin holds beyond what that clipped "
        "normal puts there.",
        [
            *(*LAYER, divergence("uniform"), *map(divergence, models)),
            Column("holds", lambda row: Cell("yes" if row.holds else "no", strong=not row.holds), numeric=False),
            Column("largest lump", lambda row: percent(row.atom, 1)),
            Column("share a range", lambda row: number(row.count, 0)),
            Column("width", lambda row: number(row.width, 0)),
            Column("elements", lambda row: number(row.elements, 0)),
        ],
        by_setting(rows),
        fold=f"Earlier: epoch {epoch}, {graph.name}, {graph.model}" if folded else "",
    )


def _figure(graph: DistributionGraph, setting: str, epoch: int, rows: Sequence[DistributionRow]) -> Record:
    inner = [100 * mass for row in rows for masses in row.models.values() for mass in masses[1:-1]]
    top = 2.6 * max(inner, default=1.7)  # an atom would flatten everything else: it is cut, and carries its number
    return Figure(
        f"distribution-{slug(graph.name, graph.model, setting)}",
        f"Normalised activations by layer ({graph.name}, {graph.model}, {setting}, epoch {epoch}): % of the elements "
        f"in each of {len(rows[0].histogram)} bins over [0, 3]. Bars that leave a panel carry their number. Below each "
        "name, the divergence to the uniform density (U), to CN[1/R] (R) and to CN[1/G] (G).",
        [_panel(row, label, top) for row, label in zip(rows, labels(rows), strict=True)],
        small=True,
    )


def _panel(row: DistributionRow, label: str, top: float) -> Panel:
    bins = len(row.histogram)

    def percents(masses: Sequence[float]) -> list[tuple[float, float]]:
        return [(3 * i / bins, 100 * mass) for i, mass in enumerate(masses)]

    measured = [100 * mass for mass in row.histogram]
    marks = [
        Marks("filled", row.setting, percents(row.histogram), "measured"),
        Marks("level", "uniform", [(0, 100 / bins), (3, 100 / bins)], "uniform"),
    ]
    for kind, color, name in (("steps", "normal", "CN[1/R]"), ("steps dashed", "block normal", "CN[1/G]")):
        marks.append(Marks(kind, color, percents(row.models.get(name, ())), name))
    for i, mass in enumerate(measured):
        # of near ones the largest, for numbers of neighbours would collide
        if mass > top and mass == max(measured[max(0, i - bins // 6) : i + bins // 6]):
            kind, edge = ("text", i + 1) if i < bins / 2 else ("text left", i)
            marks.append(Marks(kind, "ink", [(3 * edge / bins, top)], texts=[f"{mass:.0f} %"]))
    found = " · ".join(f"{_SHORT.get(name, name)} {number(value, 3)}" for name, value in row.divergence.items())
    return Panel(label, marks, subtitle=found, xlim=(0, 3), ylim=top)
