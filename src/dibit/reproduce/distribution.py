"""Are normalised activations uniform, as EXACT assumes, or clipped normal, as i-EXACT says?"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from dibit.experiments.cases import Case, case
from dibit.experiments.stages import stages
from dibit.reproduce.plan import Measurement, Reproduction, Values, key
from dibit.reproduce.variants import DISTRIBUTION, variants
from dibit.study import Activation, ClippedNormal, divergence, fit, histogram, uniform

BINS = 60
LARGE_ATOM = 0.2  # of all elements in one bin, beyond what the model puts there


def measurements(run: Reproduction) -> list[Measurement]:
    """One a graph: all settings, epochs and layers."""
    return [_measurement(run, case(graph, "sage", run.plan.epochs, run.plan.full)) for graph in run.main_graphs()]


def table(run: Reproduction, results: Values) -> dict[str, Any]:
    """Histograms, models, divergences, and what they say in words."""
    graphs = list(results.values())
    return {"bins": BINS, "graphs": graphs, "verdicts": verdicts([row for graph in graphs for row in graph["rows"]])}


def look_at(a: Activation, setting: str, epoch: int) -> dict[str, Any]:
    """One activation against the models: CN[1/R], R the width of a row, and CN[1/G], G the elements of a block."""
    h = a.normalised()
    found = histogram(h, a.bits, BINS)
    models = {}
    if a.width >= 3:
        models["CN[1/R]"] = ClippedNormal.sharing(a.bits, a.width).masses(BINS)
    if a.count != a.width:
        models["CN[1/G]"] = ClippedNormal.sharing(a.bits, a.count).masses(BINS)
    divergences = {"uniform": divergence(found, uniform(BINS))}
    divergences |= {name: divergence(found, masses) for name, masses in models.items()}
    shared = "CN[1/G]" if "CN[1/G]" in models else "CN[1/R]"  # the papers' D: elements that share a range
    fitted = fit(h, a.bits)
    return {
        "setting": setting,
        "epoch": epoch,
        "module": a.module,
        "operation": a.operation,
        "count": a.count,
        "width": a.width,
        "elements": h.size,
        "histogram": _rounded(found),
        "models": {name: _rounded(masses) for name, masses in models.items()},
        "divergence": divergences,
        "fit": {"sigma": fitted.sigma, "divergence": divergence(found, fitted.masses(BINS))},
        "nearest": min(divergences, key=lambda name: divergences[name]),
        "atom": float((found - models[shared]).max()),
        "holds": divergences[shared] < divergences["uniform"],
    }


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """Plain sentences on where the papers' model holds, one or two a setting."""
    sentences = []
    for setting in DISTRIBUTION:
        own = [row for row in rows if row["setting"] == setting]
        if not own:
            continue
        sentences.append(_verdict(setting, own))
        lumpy = [row for row in own if row["atom"] > LARGE_ATOM]
        if lumpy:
            most = max(lumpy, key=lambda row: row["atom"])
            sentences.append(
                f"{setting}: the model does not describe {len(lumpy)} of the {len(own)} activations, which have a lump "
                f"of equal values; of {most['module'] or 'the model'}, {100 * most['atom']:.0f} % of the elements lie "
                "in one bin beyond what the clipped normal puts there (what ReLU and dropout have set to zero)."
            )
    return sentences


def _verdict(setting: str, rows: list[dict[str, Any]]) -> str:
    good = [row for row in rows if row["holds"]]
    shared = [min(d for name, d in row["divergence"].items() if name != "uniform") for row in rows]
    factor = statistics.median(row["divergence"]["uniform"] / s for row, s in zip(rows, shared, strict=True))
    text = (
        f"{setting}: with D the elements that share a range, the clipped normal is nearer than the uniform density on "
        f"{len(good)} of {len(rows)} activations (layers and epochs)"
    )
    if any("CN[1/G]" in row["divergence"] for row in rows):
        by_row = sum(row["nearest"] == "CN[1/R]" for row in rows)
        text += f", and on {by_row} CN[1/R], which ignores that a block spans many rows, is the nearest of all"
    compared = f"{factor:.1f} times nearer" if factor >= 1 else f"{1 / factor:.1f} times farther"
    return f"{text}; the better of the two is in the median {compared} than the uniform density."


def _measurement(run: Reproduction, case: Case) -> Measurement:
    plan = run.plan
    return Measurement(
        case.name,
        key("distribution", graph=case.graph.fingerprint(), stages=list(plan.stages), bins=BINS),
        lambda note: measure(case, plan.stages, note),
    )


def measure(case: Case, epochs: tuple[int, ...], note: Callable[[str], None]) -> dict[str, Any]:
    """{"name", "model", "rows"}: histograms and divergences of what each setting quantises on one graph."""
    rows = []
    for stage in stages(case, epochs, variants()["i-EXACT"], note):
        for setting in DISTRIBUTION:
            config = variants()[setting]
            assert config is not None
            rows += [look_at(a, setting, stage.epoch) for a in stage.activations(config)]
    return {"name": case.graph.name, "model": case.settings.model.model, "rows": rows}


def _rounded(masses: Any) -> list[float]:
    return [round(float(mass), 6) for mass in masses]
