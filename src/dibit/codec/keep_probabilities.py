"""How likely each row is to be kept: one probability for each of the 256 scores that a row can have.

In go the scores of all rows (one byte each, `dibit.codec.row_sampling`) and how many rows are to be kept; out come
probabilities as integers out of `FIXED_POINT_ONE`. Sums of integers are exact, so the same rows are found wherever
they are drawn again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dibit.codec import rng

FIXED_POINT_ONE = 1 << 30  # stands for probability 1
LEFT_OUT = 255  # the score of a row that is never kept; as a measurement: not finite
FLOOR = 0.3  # this share of the mean is added to each row: its gradient may grow from one step to the next
SAMPLING_SALT = 0x2B6D8E13F49AC075  # separates the stream that samples rows from the others of the same seed


def keep_probabilities(scores: Tensor, count: int) -> Tensor:
    r"""Probability of each score, out of `FIXED_POINT_ONE`: int64 (256,), :math:`\min(1, c\,(v + \lambda \bar v))`.

    v is the root of the squared norm that the score stands for, :math:`\lambda` is `FLOOR`, and c makes the
    probabilities of all rows add up to `count`.

    Args:
        scores: uint8 (N,).
        count: rows to keep.
    """
    rows = torch.bincount(scores, minlength=256).double()
    rows[LEFT_OUT] = 0
    code = torch.arange(256, device=scores.device, dtype=torch.float64)
    value = torch.exp2((code - 127) / 2)
    value[0] = value[LEFT_OUT] = 0
    mean = (rows * value).sum() / rows.sum().clamp(min=1)
    value += torch.where(mean > 0, FLOOR * mean, 1)
    # from the largest down: k scores are certain, the others share what is left of `count`
    n, v = rows.flip(0), value.flip(0)
    certain = n.cumsum(0) - n
    rest = (n * v).flip(0).cumsum(0).flip(0)
    factor = ((count - certain) / rest).nan_to_num(0.0, 0.0, 0.0)
    fits = (factor * v <= 1) & (n > 0)
    c = torch.where(fits.any(), factor[fits.int().argmax()], torch.inf)  # none fits: every row is certain
    probability = ((c * value).clamp(max=1) * FIXED_POINT_ONE).floor().long()
    probability[LEFT_OUT] = 0
    return probability


def sampling_start(seed: Tensor) -> Tensor:
    """Where systematic sampling begins: int64 0-d in [0, `FIXED_POINT_ONE`)."""
    return rng.hash32(torch.zeros((), dtype=torch.int64, device=seed.device), seed ^ SAMPLING_SALT) >> 2
