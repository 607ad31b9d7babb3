"""Test accuracy over seeds: models, real graphs, and the papers' own data sets where they can be loaded."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from dibit.experiments.cases import MODELS, Case, case
from dibit.reproduce.paper import remembered
from dibit.reproduce.plan import Measurement, Reproduction, Values
from dibit.reproduce.training import training
from dibit.reproduce.variants import ACCURACY
from dibit.tools.errors import UserError
from dibit.tools.statistics import paired_difference
from dibit.train.settings import Settings

PAPERS = ("arxiv-sage", "arxiv-gcn", "arxiv-gcn2", "arxiv-gat", "flickr-sage", "flickr-gcn", "flickr-gcn2")
ON_EVERY_GRAPH = ("sage", "gcn")  # at the small size the others run on the first graph alone


def measurements(run: Reproduction) -> list[Measurement]:
    """One a graph, model, setting and seed."""
    seeds = range(run.plan.seeds)
    return [training(run, each, setting, seed) for each in cases(run) for seed in seeds for setting in ACCURACY]


def table(run: Reproduction, results: Values) -> dict[str, Any]:
    """By graph, model and setting, with the paired difference to FP32."""
    rows = []
    for each in cases(run):
        runs = {
            setting: {
                seed: results[name]
                for seed in range(run.plan.seeds)
                if (name := f"{each.name} {setting} seed {seed}") in results
            }
            for setting in ACCURACY
        }
        rows += [_row(each, setting, runs) for setting in ACCURACY if runs[setting]]
    skipped = [{"graph": graph, "why": why} for graph, why in run.missing.items()]
    if not run.plan.full:
        skipped.append({"graph": "ogbn-arxiv, Flickr", "why": "The papers' own data sets are part of --full."})
    return {"rows": rows, "skipped": skipped, "paper": remembered()}


@functools.cache  # the table is drawn after every training: the graphs are loaded once
def cases(run: Reproduction) -> list[Case]:
    """Models on graphs; in full the papers' settings too."""
    graphs = run.graphs()
    found = [
        case(graph, model, run.plan.epochs, run.plan.full)
        for graph in graphs
        for model in MODELS
        if run.plan.full or graph is graphs[0] or model in ON_EVERY_GRAPH
    ]
    return found + (_papers(run) if run.plan.full and not run.plan.datasets else [])


def _papers(run: Reproduction) -> list[Case]:
    """The papers' hyper-parameters on their own data sets, as far as those can be loaded."""
    from dibit.train.arguments import read_yaml
    from dibit.train.data.load import load_graph
    from dibit.train.presets import preset_files

    files: dict[str, Path] = preset_files()
    found = []
    for name in PAPERS:
        settings = Settings.from_flat(read_yaml(files[name])).updated(root=run.plan.root)
        if settings.data.dataset in run.missing:
            continue
        try:
            found.append(Case(load_graph(settings.data, 0), settings))
        except UserError as error:
            run.missing[settings.data.dataset] = str(error)
    return found


def _row(case: Case, setting: str, runs: dict[str, dict[int, Any]]) -> dict[str, Any]:
    own, plain = runs[setting], runs["FP32"]
    first = next(iter(own.values()))
    paired = [own[seed]["test"] - plain[seed]["test"] for seed in own if seed in plain]
    model = case.settings.model
    difference = paired_difference(paired) if setting != "FP32" and paired else None
    return {
        "graph": case.graph.name,
        "model": model.model,
        "layers": model.layers,
        "hidden": model.hidden,
        "epochs": case.settings.optimisation.epochs,
        "recipe": setting,
        "seeds": list(own),
        "test": [run["test"] for run in own.values()],
        "saved_mb": first["saved_mb"],
        "peak_mb": first["peak_mb"],
        "seconds": first["seconds"],
        "difference": difference,
    }
