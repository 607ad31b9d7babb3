"""Test accuracy at tuned baselines: published settings and splits, where plain training is at its best.

Luo, Shi and Wu, "Classic GNNs are Strong Baselines: Reassessing GNNs for Node Classification" (NeurIPS 2024 Datasets
and Benchmarks, arXiv:2406.08993). A cell is a graph and a model with their published hyper-parameters.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dibit.reproduce.plan import Measurement, Reproduction, ReproductionPlan, Values
from dibit.tools.errors import UserError, nearest, shown
from dibit.tools.statistics import paired_difference
from dibit.tools.units import MB
from dibit.train.run_folder import BEST, CHECKPOINT
from dibit.train.settings import RECIPES, Settings

HARMLESS = -0.003  # a loss of accuracy below this, 0.3 points, is none that counts
REACHED = 0.99  # of plain's best validation accuracy: how soon it is reached is compared
_COMMON: dict[str, Any] = {"lr": 1e-3, "eval_every": 2, "jk": "last", "undirected": True, "self_loops": True}
_GAT: dict[str, Any] = {"heads": 1, "bias": False}
_DENSE: dict[str, Any] = {"norm": "layer", "weight_decay": 5e-5, "epochs": 1000}
_CITATION: dict[str, Any] = {"norm": "none", "weight_decay": 5e-4, "epochs": 500}
_TWENTY, _TEN, _FIVE = tuple(range(20)), tuple(range(10)), tuple(range(5))


@dataclass(frozen=True)
class TunedCell:
    """A graph and a model.

    Attributes:
        graph: Name of the data set.
        model: Of `dibit train`.
        settings: Published ones, by the names of `dibit train`.
        published: Test accuracy in %, mean over seeds; None for a setting of our own.
        recipes: Recipe -> seeds. Each is compared with "none" on the seeds that both have.
        label: Sets cells of one graph and model apart.
        split: Whether the split is the authors' own, in GRAPH_tuned_split.npz beside the graph's file; else the
            public one.
    """

    graph: str
    model: str
    settings: dict[str, Any]
    published: float | None
    recipes: dict[str, tuple[int, ...]]
    label: str = ""
    split: bool = False

    @property
    def name(self) -> str:
        """graph-model, and the label."""
        return "-".join(part for part in (self.graph, self.model, self.label) if part)

    def train_settings(self, root: str, epochs: int | None = None) -> Settings:
        """Settings of `dibit train`."""
        split = str(Path(root) / f"{self.graph.replace('-', '_')}_tuned_split.npz") if self.split else None
        found = Settings().updated(
            **{**_COMMON, **self.settings}, dataset=self.graph, root=root, model=self.model, split_file=split
        )
        return found if epochs is None else found.updated(epochs=epochs)


def _pair(seeds: Sequence[int], **more: Sequence[int]) -> dict[str, tuple[int, ...]]:
    return {"none": tuple(seeds), "default": tuple(seeds), **{recipe: tuple(own) for recipe, own in more.items()}}


def _cell(
    graph: str,
    model: str,
    hidden: int,
    layers: int,
    dropout: float,
    published: float | None,
    recipes: dict[str, tuple[int, ...]],
    *groups: dict[str, Any],
    label: str = "",
    split: bool = False,
    **more: Any,
) -> TunedCell:
    settings = {"hidden": hidden, "layers": layers, "dropout": dropout}
    for group in groups:
        settings |= group
    return TunedCell(graph, model, settings | more, published, recipes, label, split)


CELLS: dict[str, TunedCell] = {
    cell.name: cell
    for cell in (
        _cell("amazon-computers", "sage", 64, 4, 0.3, 93.25, _pair(_TWENTY, iexact=_FIVE), _DENSE, split=True),
        _cell("amazon-computers", "gcn", 512, 3, 0.5, 93.99, _pair(_FIVE), _DENSE, split=True),
        _cell("amazon-computers", "gat", 64, 2, 0.5, 94.09, _pair(_FIVE), _DENSE, _GAT, split=True),
        # As deep and wide as that study's GraphSAGE for minesweeper, on a graph that is here.
        _cell("amazon-computers", "sage", 64, 15, 0.2, None, _pair(_FIVE), _DENSE, label="15-layers", split=True,
              norm="batch", linear_skip=True),
        _cell("cora", "gcn", 512, 3, 0.7, 85.10, _pair(_TEN), _CITATION),
        _cell("cora", "sage", 256, 3, 0.7, 83.88, _pair(_TEN), _CITATION),
        _cell("pubmed", "gcn", 256, 2, 0.7, 81.12, _pair(_TEN), _CITATION, lr=5e-3),
        _cell("pubmed", "sage", 512, 4, 0.7, 79.72, _pair(_FIVE), _CITATION, lr=5e-3),
        _cell("pubmed", "gat", 512, 2, 0.5, 80.28, _pair(_FIVE), _CITATION, _GAT, lr=1e-2),
    )
}  # fmt: skip
FIRST = ("amazon-computers-sage", "amazon-computers-gcn")  # those of a call that names none


def measurements(run: Reproduction) -> list[Measurement]:
    """One a cell, seed and recipe: the pairs of a seed come one after the other."""
    return [unit for unit, _, _ in _planned(run)]


def _planned(run: Reproduction) -> Iterator[tuple[Measurement, TunedCell, Settings]]:
    plan = run.plan
    for cell in cells(plan.cells):
        settings = cell.train_settings(plan.root, plan.tuned_epochs)
        wanted = [recipe for recipe in cell.recipes if not plan.recipes or recipe in plan.recipes]
        for seed in sorted({seed for recipe in wanted for seed in cell.recipes[recipe]}):
            if plan.tuned_seeds is None or seed < plan.tuned_seeds:
                for recipe in wanted:
                    if seed in cell.recipes[recipe]:
                        yield _measurement(run, cell, settings, recipe, seed), cell, settings


def cells(names: Sequence[str]) -> list[TunedCell]:
    """The cells of these names, each once ("all": every one); without any, those of `FIRST`.

    Raises:
        UserError: There is none of a name.
    """
    for name in names:
        if name not in (*CELLS, "all"):
            raise UserError(f"There is no cell {name!r}, expected {', '.join(CELLS)} or all.{nearest(name, CELLS)}")
    return [CELLS[name] for name in dict.fromkeys(CELLS if "all" in names else names or FIRST)]


def check(plan: ReproductionPlan) -> None:
    """Raise `UserError` for cells and recipes that are not there."""
    here = dict.fromkeys(recipe for cell in cells(plan.cells) for recipe in cell.recipes)
    for recipe in plan.recipes:
        if recipe not in RECIPES:
            raise UserError(f"--recipe is {recipe!r}, expected {', '.join(RECIPES)}.{nearest(recipe, RECIPES)}")
        if recipe not in here:
            raise UserError(f"--recipe is {recipe}, which none of these cells has; expected {', '.join(here)}.")


def check_data(run: Reproduction) -> None:
    """Load what is still to be trained on, once: what cannot be loaded is said before hours of work, and what has to be
    downloaded is there before several trainings ask for it.

    Raises:
        UserError: A graph or its split cannot be loaded.
    """
    from dibit.train.data.load import load_graph

    seen = set()
    for unit, cell, settings in _planned(run):
        if settings.data not in seen and (run.store.overwrite or run.store.held(unit.key) is None):
            seen.add(settings.data)
            graph = load_graph(settings.data, 0)
            if graph.masks is None:
                raise UserError(
                    f"{shown(cell.graph)} has no published split in --root {shown(run.plan.root)}, which {cell.name} "
                    "is trained on; expected train_mask, val_mask and test_mask in its file."
                )
            graph.split(0)


def _measurement(run: Reproduction, cell: TunedCell, settings: Settings, recipe: str, seed: int) -> Measurement:
    name = f"{cell.name} {recipe} seed {seed}"
    # The recipe by its name alone: what is measured stays of use when a recipe learns another setting.
    identity = {
        "what": f"tuned-{cell.name}-{recipe}-{seed}",
        "settings": {**_COMMON, **cell.settings, "epochs": settings.optimisation.epochs},
        "graph": {"dataset": cell.graph, "split": "tuned" if cell.split else "public"},
    }
    folder = run.store.path / "runs" / run.store.name(identity)
    files = tuple(folder / name for name in (CHECKPOINT, BEST))
    return Measurement(name, identity, partial(train, settings, recipe, seed, folder), files)


def train(settings: Settings, recipe: str, seed: int, folder: Path, note: Callable[[str], None]) -> dict[str, Any]:
    """Train one model, going on from what is in `folder`; see `dibit.train.loop.train_one`.

    Returns:
        Metrics from 0 to 1, MB, seconds; "improvements": (epoch, validation accuracy) where it was the best so far.
    """
    import warnings
    from dataclasses import replace

    import dibit
    from dibit.train.data.load import load_graph
    from dibit.train.loop import train_one
    from dibit.train.task import Task, compression_config

    warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
    settings = settings.updated(quiet=True, out=str(folder), recipe=recipe)
    graph = load_graph(settings.data, 0)
    result = train_one(
        Task.build(settings, graph),
        recipe,
        compression_config(replace(settings.compression, recipe=recipe)),
        seed,
        folder,
        on_epoch=lambda epoch, epochs: note(f"epoch {epoch}/{epochs}"),
        last=False,
        resume=True,
        log=False,
    )
    best, improvements = -1.0, []
    for epoch, value in result.curve:
        if value > best:
            best = value
            improvements.append([epoch, round(value, 6)])
    return {
        "config": repr(compression_config(replace(settings.compression, recipe=recipe))),
        "dibit": dibit.__version__,
        "graph": graph.fingerprint(),
        "test": result.test,
        "val": result.val,
        "best_epoch": result.best_epoch,
        "epochs": result.epochs,
        "saved_mb": result.saved_bytes / MB,
        "plain_mb": result.plain_bytes / MB,
        "peak_mb": result.peak_bytes / MB,
        "seconds": result.seconds_per_epoch,
        "noise": statistics.median(value for _, value in result.noise) if result.noise else None,
        "improvements": improvements,
    }


def table(run: Reproduction, results: Values) -> dict[str, Any]:
    """By cell and recipe, with the paired difference to plain training, and all cells together."""
    rows = []
    for cell in CELLS.values():
        runs = {
            recipe: {seed: results[key] for seed in seeds if (key := f"{cell.name} {recipe} seed {seed}") in results}
            for recipe, seeds in cell.recipes.items()
        }
        rows += [_row(cell, recipe, own, runs["none"]) for recipe, own in runs.items() if own]
    by_recipe = {recipe: _together([row for row in rows if row["recipe"] == recipe]) for recipe in RECIPES}
    return {"rows": rows, "together": {recipe: found for recipe, found in by_recipe.items() if found}}


def _row(cell: TunedCell, recipe: str, own: dict[int, Any], plain: dict[int, Any]) -> dict[str, Any]:
    pairs = [seed for seed in own if seed in plain] if recipe != "none" else []
    differences = [own[seed]["test"] - plain[seed]["test"] for seed in pairs]
    difference = {**paired_difference(differences), "values": differences} if differences else None
    first = next(iter(own.values()))
    noise = [found["noise"] for found in own.values() if found["noise"] is not None]
    sooner = [ratio for seed in pairs if (ratio := _epochs_ratio(own[seed], plain[seed])) is not None]
    return {
        "cell": cell.name,
        "graph": cell.graph,
        "model": cell.model,
        "layers": cell.settings["layers"],
        "hidden": cell.settings["hidden"],
        "norm": cell.settings["norm"],
        "epochs": first["epochs"],
        "recipe": recipe,
        "seeds": list(own),
        "test": [found["test"] for found in own.values()],
        "published": cell.published,
        "difference": difference,
        "verdict": verdict(difference),
        "epochs_ratio": statistics.fmean(sooner) if sooner else None,
        "saved_mb": first["saved_mb"],
        "peak_mb": first["peak_mb"],
        "seconds": statistics.median(found["seconds"] for found in own.values()),
        "noise": statistics.median(noise) if noise else None,
    }


def verdict(difference: dict[str, Any] | None) -> str | None:
    """What a paired difference and its 95 % interval say: harmless, harmful or undecided; None without an interval."""
    if difference is None or difference["low"] is None:
        return None
    if difference["high"] < 0:
        return "harmful"
    return "harmless" if difference["low"] > HARMLESS else "undecided"


def _epochs_ratio(own: dict[str, Any], plain: dict[str, Any]) -> float | None:
    """Epochs to reach 99 % of plain's best validation accuracy, to plain's own; None if it was never reached."""
    goal = REACHED * plain["val"]
    first = [next((epoch for epoch, value in run["improvements"] if value >= goal), None) for run in (own, plain)]
    return None if first[0] is None or first[1] is None else first[0] / first[1]


def _together(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The mean of the cells' mean differences, each cell counting the same, with its 95 % interval.

    The variance is that of a mean of independent means, with Welch and Satterthwaite's degrees of freedom.
    """
    known = [row["difference"] for row in rows if row["difference"] and row["difference"]["pairs"] > 1]
    if not known:
        return None
    from scipy.stats import t

    parts = [(statistics.variance(d["values"]) / d["pairs"], d["pairs"] - 1) for d in known]
    mean, variance = statistics.fmean(d["mean"] for d in known), sum(part for part, _ in parts)
    below = sum(part**2 / freedom for part, freedom in parts)
    half = float(t.ppf(0.975, variance**2 / below)) * variance**0.5 / len(known) if below else 0.0
    ratios = [row["epochs_ratio"] for row in rows if row["epochs_ratio"] is not None]
    return {
        "cells": len(known),
        "mean": mean,
        "low": mean - half,
        "high": mean + half,
        "epochs_ratio": statistics.fmean(ratios) if ratios else None,
    }
