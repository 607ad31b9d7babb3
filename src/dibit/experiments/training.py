"""Trainings that several sections share, each done once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dibit.reproduce.plan import Plan, Reproduction, Unit, key
from dibit.reproduce.variants import variants
from dibit.tools.errors import Interrupted
from dibit.train.data import Graph
from dibit.train.loop import train_one
from dibit.train.settings import Settings
from dibit.train.task import Task

MB = 2**20
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

    graph: Graph
    settings: Settings

    @property
    def name(self) -> str:
        return f"{self.graph.name} {self.settings.model.model}"


def case(plan: Plan, graph: Graph, model: str) -> Case:
    """A model of `MODELS` for the plan's number of epochs."""
    changes = {**COMMON, **MODELS[model], "model": model, "epochs": plan.epochs}
    if model == "gcn2" and plan.full:
        changes["hidden"] = 256  # as in the papers
    return Case(graph, Settings().updated(**changes, eval_every=EVERY))


def training(run: Reproduction, case: Case, setting: str, seed: int) -> Unit:
    """One training: test accuracy at the best validation epoch, saved and peak MB, seconds an epoch."""
    config = variants()[setting]
    flat = {k: v for group in ("model", "optimisation") for k, v in vars(getattr(case.settings, group)).items()}
    identity = key("training", config, graph=case.graph.fingerprint(), settings=flat, seed=seed)

    def compute(note: Callable[[str], None]) -> dict[str, Any]:
        folder = run.store.path / "runs" / run.store.name(identity)
        task = _task(case)
        try:
            result = train_one(
                task,
                setting,
                config,
                seed,
                folder,
                on_epoch=lambda epoch, epochs: note(f"epoch {epoch}/{epochs}"),
                last=False,  # the table at least follows
                note=run.store.manifest.add,
                resume=True,  # of the same plan; the command itself goes on where it stopped
            )
        except Interrupted as stop:
            raise KeyboardInterrupt from stop  # the checkpoint is there; the command says how to go on
        run.store.manifest.remove(below=folder)
        return {
            "test": result.test,
            "val": result.val,
            "saved_mb": result.saved_bytes / MB,
            "peak_mb": result.peak_bytes / MB,
            "seconds": result.seconds_per_epoch,
        }

    return Unit(f"{case.name} {setting} seed {seed}", identity, compute)


@lru_cache(maxsize=2)
def _task(case: Case) -> Task:
    return Task.build(case.settings.updated(quiet=True, out="."), case.graph)
