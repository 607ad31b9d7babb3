"""``python -m tests.reproduce.tiny reproduce tuned ...``: ``dibit`` with cells on a tiny graph."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from dibit.cli import main
from dibit.reproduce import tuned
from tests.train.conftest import small_arrays

SETTINGS = {"layers": 2, "hidden": 16, "dropout": 0.5, "norm": "layer", "weight_decay": 5e-5, "epochs": 300}
_PAIR = {"none": (0, 1), "default": (0,)}
CELLS = {
    cell.name: cell
    for cell in (
        tuned.TunedCell("tiny", "sage", SETTINGS, 93.0, _PAIR, split=True),
        tuned.TunedCell("tiny", "gcn", SETTINGS, None, {"none": (0,)}, label="public"),
        tuned.TunedCell("tiny", "sage", SETTINGS | {"lr": 1e30}, None, {"none": (0,)}, label="diverges"),
        tuned.TunedCell("tiny", "sage", SETTINGS | {"epochs": 10**6}, None, {"none": (0,)}, label="long"),
    )
}
FIRST = ("tiny-sage", "tiny-gcn-public")
UNITS = ("tiny-sage-none-0", "tiny-sage-default-0", "tiny-sage-none-1", "tiny-gcn-public-none-0")


def write_graph(root: Path) -> None:
    """A graph with a split of its own, and the authors' in a file of its own."""
    root.mkdir()
    part = np.arange(60) % 5
    masks = {"train_mask": part < 3, "val_mask": part == 3, "test_mask": part == 4}
    np.savez(root / "tiny.npz", **small_arrays(), **masks)
    parts = np.split(np.random.default_rng(0).permutation(60), (36, 48))
    np.savez(root / "tiny_tuned_split.npz", **dict(zip(("train", "valid", "test"), parts, strict=True)))


if __name__ == "__main__":
    tuned.CELLS, tuned.FIRST = CELLS, FIRST
    sys.exit(main())
