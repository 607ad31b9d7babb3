"""Trainings that several sections share, each done once."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from dibit.experiments.cases import Case
from dibit.reproduce.plan import Measurement, Reproduction, key
from dibit.reproduce.variants import variants
from dibit.tools.errors import Interrupted
from dibit.tools.units import MB
from dibit.train.loop import train_one
from dibit.train.task import Task


def training(run: Reproduction, case: Case, setting: str, seed: int) -> Measurement:
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

    return Measurement(f"{case.name} {setting} seed {seed}", identity, compute)


@lru_cache(maxsize=2)
def _task(case: Case) -> Task:
    return Task.build(case.settings.updated(quiet=True, out="."), case.graph)
