"""Published splits: one, or several, of which ``--split`` or the seed takes one."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from dibit.tools.errors import UserError, shown

Masks: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]
NAMES = ("train_mask", "val_mask", "test_mask")


def oriented(masks: Masks, nodes: int, source: str) -> Masks:
    """Return the masks as (N,) or (N, K), whichever way round several splits lie.

    Args:
        masks: Training, validation and test nodes, bool (N,), (N, K) or (K, N).
        nodes: N.
        source: What to call it in a message, such as "In graph.npz".

    Raises:
        UserError: A mask does not fit.
    """
    for name, mask in zip(NAMES, masks, strict=True):
        if mask.dtype != bool or mask.ndim not in (1, 2) or nodes not in mask.shape or mask.size == 0:
            raise UserError(
                f"{source}, {name} is {mask.dtype} of shape {mask.shape}, expected bool of shape ({nodes:,},), or "
                f"({nodes:,}, K) or (K, {nodes:,}) for K splits."
            )
        if mask.shape == (nodes, nodes) and nodes > 1:
            raise UserError(
                f"{source}, {name} has shape {mask.shape}, which does not tell nodes from splits; expected a number of "
                "splits that is not the number of nodes. Leave some splits out."
            )
    found = [mask.T if mask.ndim == 2 and mask.shape[0] != nodes else mask for mask in masks]
    counts = {mask.shape[1] for mask in found if mask.ndim == 2}
    if len(counts) > 1:
        shapes = " and ".join(f"{name} {mask.shape}" for name, mask in zip(NAMES, masks, strict=True))
        raise UserError(f"{source}, the masks have different numbers of splits ({shapes}); expected one number.")
    return found[0], found[1], found[2]


def overlap(masks: Masks) -> np.ndarray:
    """Where a node is in two parts of one split, bool (N, K) with K = 1 for masks (N,)."""
    train, val, test = (mask if mask.ndim == 2 else mask[:, None] for mask in masks)
    return (train & val) | (train & test) | (val & test)


def chosen(masks: Masks | None, split: int | None, name: str) -> Masks | None:
    """Return the masks of one split, (N,); without a number all of them.

    Raises:
        UserError: There is no split of this number.
    """
    if split is None:
        return masks
    if masks is None:
        raise UserError(
            f"--split is {shown(split)}, but {shown(name)} has no published split; leave --split out, then one is "
            "drawn from --seed, or give --split-file."
        )
    count = max((mask.shape[1] for mask in masks if mask.ndim == 2), default=1)
    if split >= count:
        expected = f"a number from 0 to {count - 1}" if count > 1 else "0, or leave it out"
        raise UserError(
            f"--split is {shown(split)}, but {shown(name)} has {count} published split{'s'[: count > 1]}; expected "
            f"{expected}."
        )
    train, val, test = (mask if mask.ndim == 1 else np.ascontiguousarray(mask[:, split]) for mask in masks)
    return train, val, test
