"""The variance of rounding: the papers' table for any bit width, and real activations, by formula and by draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dibit.codec.normal_levels import expected_variance, normal_levels, sigma
from dibit.experiments.cases import Case, case
from dibit.experiments.stages import stages
from dibit.reproduce.paper import VARIANCE
from dibit.reproduce.plan import Measurement, Reproduction, Values, key
from dibit.reproduce.variants import variants
from dibit.study import measured_variance, monte_carlo, optimal_levels, uniform_levels

BITS = (2, 4, 8)
SETTINGS = ("EXACT", "i-EXACT")


def papers_table() -> list[dict[str, Any]]:
    """Expected variance under CN[1/D], uniform and optimal levels, for each bit width and D; the papers' beside it."""
    rows = []
    for bits in BITS:
        for count in VARIANCE:
            levels = normal_levels(bits, count)
            uniform, optimal = expected_variance(uniform_levels(bits), count), expected_variance(levels, count)
            names = ("sigma", "uniform", "alpha", "optimal", "reduction")
            rows.append(
                {
                    "bits": bits,
                    "count": count,
                    "sigma": sigma(bits, count),
                    "levels": list(levels),
                    "uniform": uniform,
                    "optimal": optimal,
                    "reduction": 1 - optimal / uniform,
                    "paper": dict(zip(names, VARIANCE[count], strict=True)) if bits == 2 else None,
                }
            )
    return rows


def measurements(run: Reproduction) -> list[Measurement]:
    """One a graph: the activations of a trained model."""
    return [_measurement(run, case(graph, "sage", run.plan.epochs, run.plan.full)) for graph in run.main_graphs()]


def table(run: Reproduction, results: Values) -> dict[str, Any]:
    """The papers' table and what was measured."""
    return {"table": papers_table(), "measured": list(results.values())}


def _measurement(run: Reproduction, case: Case) -> Measurement:
    plan = run.plan
    return Measurement(
        case.name,
        key("variance", graph=case.graph.fingerprint(), epochs=plan.epochs, draws=plan.draws, settings=list(SETTINGS)),
        lambda note: _measure(case, plan.epochs, plan.draws, note),
    )


def _measure(case: Case, epochs: int, draws: int, note: Callable[[str], None]) -> dict[str, Any]:
    rows = []
    (stage,) = stages(case, (epochs,), variants()["i-EXACT"], note)
    for setting in SETTINGS:
        config = variants()[setting]
        assert config is not None
        for a in stage.activations(config):
            note(f"{setting} {a.module}")
            h = a.normalised()
            row: dict[str, Any] = {
                "setting": setting,
                "module": a.module,
                "operation": a.operation,
                "count": a.count,
                "elements": h.size,
            }
            normal = normal_levels(a.bits, a.count)
            for name, levels in (
                ("uniform", uniform_levels(a.bits)),
                ("normal", normal),
                ("fitted", optimal_levels(h, a.bits)),
            ):
                drawn = monte_carlo(a, levels, draws)
                row[name] = {
                    "analytic": measured_variance(h, levels),
                    "monte_carlo": drawn.mean,
                    "error": drawn.error,
                    "expected": expected_variance(levels, a.count),
                    "levels": list(levels),
                }
            rows.append(row)
    return {"graph": case.graph.name, "model": case.settings.model.model, "epoch": epochs, "rows": rows}
