"""Small graphs, real ones where present, and ways to run the command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DATA = Path(__file__).parents[2] / "../shared/data"


@pytest.fixture
def real() -> Callable[[str], Path]:
    """The path of a real graph, or a skip."""

    def find(name: str) -> Path:
        path = DATA / f"{name}.npz"
        if not path.is_file():
            pytest.skip(f"the real graph {name}.npz is not beside the repository (../shared/data)")
        return path

    return find


def small_arrays(nodes: int = 60, classes: int = 3, seed: int = 0) -> dict[str, Any]:
    """A small graph in the .npz format: edges mostly within classes, dense features."""
    rng = np.random.default_rng(seed)
    y = np.arange(nodes) % classes
    source, target = rng.integers(nodes, size=(2, 12 * nodes))
    kept = (y[source] == y[target]) | (rng.random(len(source)) < 0.1)
    source, target = source[kept], target[kept]
    x = rng.standard_normal((nodes, 8)).astype(np.float32) + np.eye(8, dtype=np.float32)[y]
    edges = np.stack([np.concatenate([source, target]), np.concatenate([target, source])])
    return {"edge_index": edges.astype(np.int32), "x": x, "y": y.astype(np.int16)}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A small graph as a file."""
    path = tmp_path / "small.npz"
    np.savez(path, **small_arrays())
    return path


def command(*words: object, **kwargs: Any) -> subprocess.Popen[str]:
    """Start ``python -m dibit`` on one thread, so that sums have one order."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "dibit", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **kwargs,
    )
