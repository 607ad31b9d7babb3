r"""Which rows are kept, with probabilities that both passes know: by a score of one byte a row.

A score is the binary exponent of a row's squared norm, so that adding up, comparing and storing cost next to nothing;
in steps of :math:`\sqrt 2` the probabilities are so near to the best ones that the error grows by a hundredth.
Probabilities are integers out of `ONE`: sums are exact, so the rows are the same wherever they are drawn again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dibit.codec import ops, rng
from dibit.codec.reference import ONE

LEFT_OUT = 255  # the score of a row that is never kept; as a measurement: not finite
FLOOR = 0.3  # of the mean score is added to each: a row's gradient may grow from one step to the next
_START = 0x2B6D8E13F49AC075


def picked(scores: Tensor, count: int, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Systematic sampling without replacement.

    Args:
        scores: uint8 (N,), see `row_scores`.
        count: rows to keep, at most those that are not `LEFT_OUT`.
        seed: int64 0-d.

    Returns:
        index int64 (count,), increasing; weight float32 (count,) = 1 / probability. What rounding the probabilities
        down leaves over may end in a last entry with weight 0.
    """
    start = rng.hash32(torch.zeros((), dtype=torch.int64, device=seed.device), seed ^ _START) >> 2
    return ops.pick_rows(scores, chances(scores, count), start, count)


def chances(scores: Tensor, count: int) -> Tensor:
    r"""Probability of each score, out of `ONE`: int64 (256,), :math:`\min(1, c\,(v + \lambda \bar v))`.

    v is the root of the squared norm that the score stands for, :math:`\lambda` is `FLOOR`, and c makes the
    probabilities of all rows add up to `count`.
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
    chance = ((c * value).clamp(max=1) * ONE).floor().long()
    chance[LEFT_OUT] = 0
    return chance


def row_scores(x: Tensor) -> Tensor:
    """The binary exponent of the squared norm of each row of x (N, D): uint8 (N,), `LEFT_OUT` where not finite."""
    return ops.row_scores(x.reshape(x.shape[0], x.shape[1:].numel()).contiguous())


def together(a: Tensor, b: Tensor) -> Tensor:
    """The score of the sum of two squared norms, not finite where one of them is not."""
    sum_ = (torch.maximum(a, b) + ((a == b) & (a > 0))).clamp_(max=LEFT_OUT - 1)
    return torch.where((a == LEFT_OUT) | (b == LEFT_OUT), LEFT_OUT, sum_)
