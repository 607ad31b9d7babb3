"""A split from a file of its own (``--split-file``): node numbers, or masks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, product
from pathlib import Path

import numpy as np

from dibit.tools.errors import UserError, shown
from dibit.train.data.archive import Archive
from dibit.train.data.graph import memory_bytes
from dibit.train.data.splits import NAMES as MASKS
from dibit.train.data.splits import Masks, oriented, overlap

_PARTS = (("train",), ("val", "valid"), ("test",))  # names that node numbers of a part go by


def load_split(path: str | Path, nodes: int) -> Masks:
    """Read the split of a graph, or several.

    Args:
        path: Of an .npz file with ``train``, ``val`` (or ``valid``) and ``test``, whole numbers (count,), each once; or
            with ``train_mask``, ``val_mask`` and ``test_mask``, bool (N,), (N, K) or (K, N).
        nodes: N.

    Raises:
        UserError: The file cannot be read, an array is missing or does not fit, or a node is in two parts.
    """
    path = Path(path)
    place = f"In {shown(path)}"
    with Archive(path, memory_bytes(), "split") as archive:
        have = archive.names
        for one, other in (_PARTS[1], *product(chain(*_PARTS), MASKS)):
            if one in have and other in have:
                raise UserError(f"{place}, there are both {one} and {other}, expected one of them; leave one out.")
        if any(name in have for name in MASKS):
            found = oriented(_three(archive, MASKS), nodes, place)
        else:
            names = [next((name for name in part if name in have), part[0]) for part in _PARTS]
            parts = zip(names, _three(archive, names), strict=True)
            train, val, test = (_mask(array, name, nodes, place) for name, array in parts)
            found = train, val, test
    shared = overlap(found).any(axis=1)
    if shared.any():
        raise UserError(
            f"{place}, node {int(shared.argmax())} is in more than one part of the split, expected every node in one "
            "at most; take it out of the others."
        )
    return found


def _three(archive: Archive, names: Sequence[str]) -> Masks:
    for name in names:
        if name not in archive.names:
            have = shown(", ".join(sorted(archive.names)) or "nothing", 200)
            raise UserError(
                f"The split {shown(archive.path)} has no array {name!r} (it holds {have}); expected the node numbers "
                "train, val and test, or the masks train_mask, val_mask and test_mask."
            )
    train, val, test = (archive.read(name) for name in names)
    return train, val, test


def _mask(numbers: np.ndarray, name: str, nodes: int, place: str) -> np.ndarray:
    """The nodes of one part, bool (N,)."""
    if numbers.ndim != 1 or not numbers.size or numbers.dtype.kind not in "iu":
        mask = f"; a mask goes by the name {'val' if name == 'valid' else name}_mask" if numbers.dtype == bool else ""
        raise UserError(
            f"{place}, {name} is {numbers.dtype} of shape {numbers.shape}, expected node numbers, whole and of shape "
            f"(count,), at least one{mask}."
        )
    if numbers.min() < 0 or numbers.max() >= nodes:
        raise UserError(
            f"{place}, {name} names the nodes {numbers.min()} to {numbers.max()}, expected 0 to {nodes - 1}, one for "
            f"each of the graph's {nodes:,} nodes. Is the split of another graph?"
        )
    times = np.bincount(numbers.astype(np.int64), minlength=nodes)
    if times.max() > 1:
        raise UserError(
            f"{place}, {name} names node {int(times.argmax())} {times.max()} times, expected each node once; leave the "
            "others out."
        )
    return times > 0
