"""What the sections of one reproduction share: its size, its graphs, the folder, a measurement."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dibit.config import Config
from dibit.experiments.data import load_prepared
from dibit.reproduce.store import Store
from dibit.tools.errors import UserError
from dibit.train.data import NodeDataset

SMALL = ("cora", "amazon-computers")
FULL = ("cora", "citeseer", "pubmed", "coauthor-cs", "facebookpagepage", "amazon-computers")
GENERATED = "planted"  # where no real graph can be had
_TUNED = ("cells", "recipes", "tuned_seeds", "tuned_epochs", "jobs")  # what `tuned` alone follows


@dataclass(frozen=True)
class ReproductionPlan:
    """How much is measured.

    Attributes:
        full: the papers' own sizes instead of half an hour.
        datasets: names or paths; empty: those of the size, and a generated graph where none can be loaded.
        root: folder of data sets.
        seeds: trainings of each setting.
        epochs: of each training on the graphs of `datasets`.
        rounds: of the interleaved timing, after one to warm up.
        draws: of the codec, for gradient errors and Monte Carlo.
        cells: of `tuned`, by name; empty: the first ones.
        recipes: of `tuned`; empty: those of each cell.
        tuned_seeds: of `tuned`: seeds below this; None: each cell's own.
        tuned_epochs: of `tuned`; None: the published number.
        jobs: trainings of `tuned` side by side.
    """

    full: bool = False
    datasets: tuple[str, ...] = ()
    root: str = "data"
    seeds: int = 3
    epochs: int = 50
    rounds: int = 4
    draws: int = 4
    cells: tuple[str, ...] = ()
    recipes: tuple[str, ...] = ()
    tuned_seeds: int | None = None
    tuned_epochs: int | None = None
    jobs: int = 1

    @property
    def stages(self) -> tuple[int, ...]:
        """Epochs at which a training is looked at."""
        return tuple(sorted({0, min(10, self.epochs), self.epochs}))

    def settings(self, section: str) -> dict[str, Any]:
        """The plan as plain values, as far as a section follows it."""
        own = {"cells": self.cells, "recipes": self.recipes, "seeds": self.tuned_seeds, "epochs": self.tuned_epochs}
        if section == "tuned":
            return {"full": self.full, "root": self.root, **own, "jobs": self.jobs}
        return {name: value for name, value in asdict(self).items() if name not in _TUNED}


@dataclass(frozen=True)
class Measurement:
    """One measurement that is kept: `compute(note)` gives a value for JSON, `note` takes a word on how far it is.

    Attributes:
        name: unique in its section; shown while it runs.
        key: everything that the value depends on.
        files: what `compute` writes while it runs; where there are some, it can be pickled, and runs in a process of
            its own.
    """

    name: str
    key: dict[str, Any]
    compute: Callable[[Callable[[str], None]], Any]
    files: tuple[Path, ...] = ()


Values = Mapping[str, Any]  # values by the measurements' names, as far as they are there


@dataclass(eq=False)
class Reproduction:
    """One call of the command: what its sections share.

    Attributes:
        plan: how much.
        store: where to.
        quiet: say nothing of data sets that could not be loaded.
        missing: data set -> why it could not be loaded.
    """

    plan: ReproductionPlan
    store: Store
    quiet: bool = False
    missing: dict[str, str] = field(default_factory=dict)
    _loaded: dict[str, NodeDataset] = field(default_factory=dict)

    def graphs(self) -> list[NodeDataset]:
        """The graphs of the plan, the main one last; prepared for training, loaded once.

        Raises:
            UserError: a data set that was asked for by name cannot be loaded.
        """
        if self.plan.datasets:
            return [self.load(dataset) for dataset in self.plan.datasets]
        names = FULL if self.plan.full else SMALL
        found = [graph for graph in map(self.try_load, names) if graph is not None]
        return found or [self.load(GENERATED)]

    def main_graphs(self) -> list[NodeDataset]:
        """Those that blocks, variance and distribution look at: the last one, all in full."""
        return self.graphs() if self.plan.full else self.graphs()[-1:]

    def try_load(self, dataset: str) -> NodeDataset | None:
        """A graph, or `None` with the reason in `missing`."""
        if dataset in self.missing:
            return None
        try:
            return self.load(dataset)
        except UserError as error:
            self.missing[dataset] = str(error)
            if not self.quiet:
                print(f"{dataset} is left out. {error}", file=sys.stderr, flush=True)
            return None

    def load(self, dataset: str) -> NodeDataset:
        """One graph: standardised, features wider than 500 reduced to 100 singular directions."""
        if dataset not in self._loaded:
            self._loaded[dataset] = load_prepared(dataset, self.plan.root)
        return self._loaded[dataset]


def key(what: str, config: Config | None = None, **depends: Any) -> dict[str, Any]:
    """The key of a measurement: with the version of Dibit, and a config in full."""
    return {"what": what, "dibit": _version(), "config": repr(config), **depends}


@lru_cache(maxsize=1)
def _version() -> str:
    return version("dibit")
