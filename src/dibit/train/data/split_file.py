"""A split from a file of its own (``--split-file``): node numbers, or masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dibit.train.data.archive import Archive
from dibit.train.data.graph import memory_bytes
from dibit.train.data.splits import NAMES as MASKS
from dibit.train.data.splits import Masks, oriented, overlap
from dibit.train.errors import UserError, shown

_PARTS = (("train",), ("val", "valid"), ("test",))  # names that node numbers of a part go by


def load_split(path: str | Path, nodes: int) -> Masks:
    """Read the split of a graph, or several.

    Args:
        path: Of an .npz file with ``train``, ``val`` (or ``valid``) and ``test``, whole numbers (count,), or with
            ``train_mask``, ``val_mask`` and ``test_mask``, bool (N,), (N, K) or (K, N).
        nodes: N.

    Raises:
        UserError: The file cannot be read, an array is missing or does not fit, or a node is in two parts.
    """
    path = Path(path)
    place = f"In {shown(path)}"
    with Archive(path, memory_bytes()) as archive:
        if any(name in archive.names for name in MASKS):
            _require(archive, MASKS)
            train, val, test = (archive.read(name) for name in MASKS)
            masks = oriented((train, val, test), nodes, place)
        else:
            names = [next((name for name in part if name in archive.names), part[0]) for part in _PARTS]
            _require(archive, names)
            train, val, test = (_mask(archive.read(name), name, nodes, place) for name in names)
            masks = train, val, test
    twice = overlap(masks).any(axis=1)
    if twice.any():
        raise UserError(
            f"{place}, node {int(twice.argmax())} is in more than one part of the split; expected every node in one at "
            "most."
        )
    return masks


def _require(archive: Archive, names: list[str] | tuple[str, ...]) -> None:
    for name in names:
        if name not in archive.names:
            have = shown(", ".join(sorted(archive.names)) or "nothing", 200)
            raise UserError(
                f"The split {shown(archive.path)} has no array {name!r} (it holds {have}); expected the node numbers "
                "train, val and test, or the masks train_mask, val_mask and test_mask."
            )


def _mask(numbers: np.ndarray, name: str, nodes: int, place: str) -> np.ndarray:
    """The nodes of one part, bool (N,)."""
    if numbers.ndim != 1 or (numbers.dtype.kind not in "iu" and numbers.size):
        raise UserError(
            f"{place}, {name} is {numbers.dtype} of shape {numbers.shape}, expected node numbers, whole and of shape "
            "(count,)."
        )
    if numbers.size and (numbers.min() < 0 or numbers.max() >= nodes):
        raise UserError(
            f"{place}, {name} names the nodes {numbers.min()} to {numbers.max()}, expected 0 to {nodes - 1}, one for "
            f"each of the graph's {nodes:,} nodes. Is the split of another graph?"
        )
    mask = np.zeros(nodes, dtype=bool)
    mask[numbers.astype(np.int64)] = True
    return mask
