"""Models on graphs, as experiments train them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dibit.train.data import NodeDataset
from dibit.train.settings import Settings

EVERY = 5  # epochs between evaluations
# Ours, but for the papers' dropout of .5 and clip of .5; GCNII with the papers' 16 layers and residual.
COMMON: dict[str, Any] = {"layers": 3, "hidden": 128, "dropout": 0.5, "norm": "batch", "lr": 0.01, "clip": 0.5}
MODELS: dict[str, dict[str, Any]] = {
    "sage": {},
    "gcn": {},
    "gcn2": {"layers": 16, "dropout": 0.1, "residual": True},
    "gat": {"heads": 4},
}


@dataclass(frozen=True, eq=False)
class Case:
    """A model on a graph.

    Attributes:
        graph: prepared.
        settings: of `dibit train`: model and optimisation are used.
    """

    graph: NodeDataset
    settings: Settings

    @property
    def name(self) -> str:
        return f"{self.graph.name} {self.settings.model.model}"


def case(graph: NodeDataset, model: str, epochs: int, full: bool = False) -> Case:
    """A model of `MODELS` to be trained for so many epochs; `full`: GCNII in the papers' own width."""
    changes = {**COMMON, **MODELS[model], "model": model, "epochs": epochs}
    if model == "gcn2" and full:
        changes["hidden"] = 256
    return Case(graph, Settings().updated(**changes, eval_every=EVERY))
