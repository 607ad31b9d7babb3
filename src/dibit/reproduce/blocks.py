"""Block sizes: bytes, time, gradient error and accuracy for G/R = 1 to 64 and for one range a tensor."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import dibit
from dibit.experiments.cases import Case, case
from dibit.experiments.shapes import ARXIV, Shape, random_graph, sage
from dibit.experiments.stages import stages
from dibit.reproduce.paper import CLAIMS
from dibit.reproduce.plan import Measurement, Reproduction, Values, key
from dibit.reproduce.training import training
from dibit.reproduce.variants import BLOCKS, variants
from dibit.tools.units import MB

TIMING = f"{ARXIV.name} seconds a step"


def measurements(run: Reproduction) -> list[Measurement]:
    """The interleaved timing; on each graph the gradient's error, and a training a setting and seed."""
    plan = run.plan
    found = [
        Measurement(
            TIMING,
            key("timing", shape=asdict(ARXIV), rounds=plan.rounds, settings=list(BLOCKS)),
            partial(time_steps, ARXIV, plan.rounds),
        )
    ]
    for each in _cases(run):
        epochs = (0, plan.epochs)
        found.append(
            Measurement(
                f"{each.name} gradient error",
                key("gradient", graph=each.graph.fingerprint(), epochs=list(epochs), draws=plan.draws),
                partial(gradient_errors, each, epochs, plan.draws),
            )
        )
        found += [training(run, each, setting, seed) for setting in BLOCKS for seed in range(plan.seeds)]
    return found


def table(run: Reproduction, results: Values) -> dict[str, Any]:
    """By setting, on the shape and on each graph."""
    plan, graphs = run.plan, []
    for each in _cases(run):
        errors = results.get(f"{each.name} gradient error", {})
        rows = []
        for setting in BLOCKS:
            runs = [results.get(f"{each.name} {setting} seed {seed}") for seed in range(plan.seeds)]
            there = [run for run in runs if run is not None]
            if there:
                rows.append(
                    {
                        "setting": setting,
                        "saved_mb": there[0]["saved_mb"],
                        "gradient_error": errors.get(setting, {}),
                        "test": [run["test"] for run in there],
                    }
                )
        graphs.append(
            {
                "name": each.graph.name,
                "model": each.settings.model.model,
                "epochs": plan.epochs,
                "seeds": list(range(plan.seeds)),
                "rows": rows,
            }
        )
    return {"timing": results.get(TIMING), "graphs": graphs, "paper": CLAIMS}


def time_steps(shape: Shape, rounds: int, note: Callable[[str], None]) -> dict[str, Any]:
    """Seconds of a training step, settings interleaved: every round runs each once; the first round is dropped.

    The ratios are medians over the rounds of the ratio within a round, so that a slow spell hits both sides.
    """
    import torch
    from torch.nn.functional import cross_entropy

    x, adjacency = random_graph(shape)
    torch.manual_seed(0)
    y = torch.randint(shape.classes, (shape.nodes,))
    train = torch.randperm(shape.nodes)[: shape.train]
    models, saved = {}, {}
    for setting in BLOCKS:
        model = sage(shape)
        dibit.compress(model, variants()[setting])
        models[setting] = model, torch.optim.Adam(model.parameters(), lr=0.01)
        with dibit.track(model) as ledger:
            model(x, adjacency)
        saved[setting] = (ledger.total + 8 * shape.train) / MB
    seconds: dict[str, list[float]] = {setting: [] for setting in BLOCKS}
    for number in range(rounds + 1):
        for setting, (model, optimizer) in models.items():
            note(f"round {number} of {rounds}, {setting}")
            start = time.perf_counter()
            optimizer.zero_grad()
            cross_entropy(model(x, adjacency)[train], y[train]).backward()
            optimizer.step()
            seconds[setting].append(time.perf_counter() - start)
    rows = []
    for setting, times in seconds.items():
        exact, plain = (
            [a / b for a, b in zip(times[1:], seconds[other][1:], strict=True)] for other in ("EXACT", "FP32")
        )
        low, _, high = statistics.quantiles(exact, n=4) if rounds > 1 else (exact[0],) * 3
        rows.append(
            {
                "setting": setting,
                "saved_mb": saved[setting],
                "seconds": statistics.median(times[1:]),
                "to_exact": statistics.median(exact),
                "to_fp32": statistics.median(plain),
                "low": low,
                "high": high,
            }
        )
    return {"shape": shape.name, "nodes": shape.nodes, "edges": shape.edges, "rounds": rounds, "rows": rows}


def gradient_errors(
    case: Case, epochs: tuple[int, ...], draws: int, note: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Relative squared error of the whole gradient, by setting and epoch of a plain training."""
    errors: dict[str, dict[str, float]] = {setting: {} for setting in BLOCKS if setting != "FP32"}
    for stage in stages(case, epochs, None, note):
        for setting, own in errors.items():
            note(f"epoch {stage.epoch}, {setting}")
            config = variants()[setting]
            assert config is not None
            own[str(stage.epoch)] = stage.gradient_error(config, draws).mean
    return errors


def _cases(run: Reproduction) -> list[Case]:
    return [case(graph, "sage", run.plan.epochs, run.plan.full) for graph in run.main_graphs()]
