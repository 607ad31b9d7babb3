"""Where a training stands, and what a checkpoint of it must agree with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

import dibit
from dibit.tools.errors import UserError
from dibit.train.task import Task


@dataclass
class TrainingProgress:
    """Where a training stands, beside the weights: all of it goes into a checkpoint."""

    epoch: int = 0
    val: float = -1.0
    test: float = 0.0
    best_epoch: int = 0
    last_val: float | None = None
    since_best: int = 0
    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    noise: list[tuple[int, float]] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    steps: int = 0
    unmeasured: int = 0  # steps since noise was measured last
    warned: bool = False


def identity(task: Task, name: str, config: dibit.Config | None, seed: int) -> dict[str, Any]:
    """What a checkpoint must agree with to be gone on with."""
    split, digest = task.split(seed), hashlib.blake2b(digest_size=8)
    for part in (split.train, split.val, split.test):
        digest.update(part.numpy().tobytes() + b"|")
    return {
        "recipe": name,
        "seed": seed,
        "config": repr(config),
        "settings": task.settings.flat(),
        "graph": task.graph.fingerprint(),
        "split": digest.hexdigest(),
    }


def load_weights(path: Path, loaded: dict[str, Any], model: nn.Module) -> None:
    """Put a checkpoint's weights into a model."""
    try:
        model.load_state_dict(loaded["model"])
    except RuntimeError as error:
        raise UserError(
            f"The checkpoint {path} does not fit the model ({' '.join(str(error).split())[:120]}); another version of "
            "PyTorch Geometric made it: go on with that one, or start anew with another --out."
        ) from error


def own_seed(seed: int, *more: int) -> int:
    """A seed for one process."""
    return int.from_bytes(hashlib.blake2b(repr((seed, *more)).encode(), digest_size=7).digest(), "big")
