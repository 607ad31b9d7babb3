"""Going on from a checkpoint gives the bits of a run that was never stopped: weights, moments, draws, metrics."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dibit
from dibit.codec import seed_stream
from dibit.train import Settings, checkpoint, generators
from dibit.train.data import load_graph
from dibit.train.loop import train_one
from dibit.train.settings import RECIPES
from dibit.train.task import Task, compression_config

pytestmark = pytest.mark.slow

MODELS = ("sage", "gcn", "gin", "gat", "gcn2")
NORMS = ("none", "batch", "layer", "graph", "pair")
LOADERS: tuple[dict[str, Any], ...] = (
    {},
    {"loader": "neighbor", "batch_size": 300, "neighbors": "3"},
    {"loader": "neighbor", "batch_size": 450, "neighbors": "-1"},
    {"loader": "cluster", "parts": 6, "clusters": 2},
)
OTHERS: tuple[dict[str, Any], ...] = (
    {},
    {"precision": "bf16"},
    {"precision": "fp16"},
    {"dropout": 0.0},
    {"clip": 0.5},
    {"eval_every": 2},
    {"patience": 3},
)


def generated(count: int) -> list[dict[str, Any]]:
    """Settings of trainings; those of the fault that was, and others drawn."""
    chosen: list[dict[str, Any]] = [{}, {"recipe": "small"}, {"model": "gcn"}, {"norm": "layer"}, {"norm": "batch"}]
    chosen.append({"norm": "none", "loader": "neighbor", "batch_size": 300, "neighbors": "3", "workers": 2})
    chosen.append({"precision": "fp16", "norm": "layer"})
    # where nothing is drawn between two passes, what the codec draws depends on how many there were
    chosen += [{"recipe": recipe, "dropout": 0.0, "norm": "none"} for recipe in RECIPES]
    chosen += [{"recipe": recipe, "dropout": 0.0, "model": model} for recipe in ("exact", "iexact") for model in MODELS]
    chosen.append({"recipe": "iexact", "dropout": 0.0, "loader": "cluster", "parts": 6, "clusters": 2})
    rng = random.Random(0)
    for _ in range(count):
        own = {"recipe": rng.choice(RECIPES), "model": rng.choice(MODELS), "norm": rng.choice(NORMS)}
        chosen.append(own | rng.choice(LOADERS) | rng.choice(OTHERS))
    return chosen


def task_of(**settings: Any) -> Task:
    # more nodes than the least number of rows that is kept, so that scores decide which ones are
    common = {"dataset": "planted:3000", "hidden": 8, "layers": 2, "quiet": True, "device": "cpu", "out": "."}
    chosen = Settings.from_flat({**common, **settings})
    chosen.check()
    return Task.build(chosen, load_graph(chosen.data, chosen.run.seed))


def plain(value: Any) -> Any:
    """A checkpoint as something that can be compared; times and the number of epochs may differ."""
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in ("seconds", "epochs", "measured")}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("settings", generated(12), ids=lambda s: " ".join(map(str, s.values())) or "default")
def test_the_same_bits(tmp_path: Path, settings: dict[str, Any]) -> None:
    recipe, stop = settings.get("recipe", "default"), 2 + 2 * (len(str(settings)) % 2)  # both are evaluated
    config = compression_config(Settings.from_flat(settings).compression)

    def train(name: str, epochs: int) -> Any:
        return train_one(task_of(**settings, epochs=epochs), recipe, config, 3, tmp_path / name, resume=True)

    whole = train("whole", 7)
    train("parts", stop)
    torch.manual_seed(999)  # what this process draws in between must not matter
    random.random()
    np.random.default_rng().random()
    seed_stream.forget()
    parts = train("parts", 7)
    assert (parts.loss, parts.test, parts.val) == (whole.loss, whole.test, whole.val)
    assert (parts.best_epoch, parts.saved_bytes) == (whole.best_epoch, whole.saved_bytes)
    a, b = (plain(checkpoint.load(tmp_path / name / "checkpoint.pt")) for name in ("whole", "parts"))
    for found in (a, b):  # nothing here seeds or draws from these two
        for process in found["processes"]:
            del process["numpy"], process["python"]
    assert a.keys() == b.keys()
    for key in a:
        assert a[key] == b[key], key


@pytest.mark.parametrize("stop", [1, 2])
def test_after_a_step_that_the_scaler_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    monkeypatch.setattr(Task, "scaler", lambda self: torch.amp.GradScaler("cpu", init_scale=2.0**22))
    config = dibit.recipe("small")

    def train(name: str, epochs: int) -> dict[str, Any]:
        train_one(task_of(epochs=epochs, precision="fp16"), "small", config, 0, tmp_path / name, resume=True)
        return checkpoint.load(tmp_path / name / "checkpoint.pt")

    whole = train("whole", 8)
    assert train("parts", stop)["scaler"]["_growth_tracker"] == 0
    assert plain(train("parts", 8)["model"]) == plain(whole["model"])


def test_every_generator_goes_on() -> None:
    device = torch.device("cpu")

    def draw() -> list[float]:
        legacy: Any = np.random
        numbers = [*torch.rand(5).tolist(), *legacy.standard_normal(3).tolist()]
        return [*numbers, *(random.random() for _ in range(3)), random.gauss(0, 1)]

    draw()  # leaves the second of a pair of normal numbers behind, in both
    saved = generators.state(device)
    first = draw()
    draw()
    generators.restore(saved, device)
    assert draw() == first


def test_what_is_drawn_by_whoever_in_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader or a model may draw from NumPy or from Python's random."""
    step, legacy = Task.step, np.random

    def noisy(self: Task, model: Any, *rest: Any) -> Any:
        result = step(self, model, *rest)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.01 * (random.random() + legacy.random())
        return result

    monkeypatch.setattr(Task, "step", noisy)

    def train(name: str, epochs: int, seeded: bool) -> dict[str, Any]:
        if seeded:
            random.seed(0)
            legacy.seed(0)
        train_one(task_of(epochs=epochs), "default", dibit.recipe("default"), 0, tmp_path / name, resume=True)
        return checkpoint.load(tmp_path / name / "checkpoint.pt")["model"]

    whole = train("whole", 4, seeded=True)
    train("parts", 2, seeded=True)
    random.random()
    legacy.random()
    assert plain(train("parts", 4, seeded=False)) == plain(whole)
