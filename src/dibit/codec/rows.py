r"""Which rows are kept, with probabilities that both passes know: by a score of one byte a row.

A score is the binary exponent of a row's squared norm, so that adding up, comparing and storing cost next to nothing;
in steps of :math:`\sqrt 2` the probabilities are so near to the best ones that the error grows by a hundredth.
Probabilities are integers out of `ONE`: sums are exact, so the rows are the same wherever they are drawn again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dibit.codec import ops
from dibit.codec.chances import FLOOR, LEFT_OUT, ONE, chances

__all__ = ["FLOOR", "LEFT_OUT", "ONE", "chances", "picked", "row_scores", "together"]


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
    return ops.pick_rows(scores, seed, count)


def row_scores(x: Tensor) -> Tensor:
    """The binary exponent of the squared norm of each row of x (N, D): uint8 (N,), `LEFT_OUT` where not finite."""
    return ops.row_scores(x.reshape(x.shape[0], x.shape[1:].numel()).contiguous())


def together(a: Tensor, b: Tensor) -> Tensor:
    """The score of the sum of two squared norms, not finite where one of them is not."""
    sum_ = (torch.maximum(a, b) + ((a == b) & (a > 0))).clamp_(max=LEFT_OUT - 1)
    return torch.where((a == LEFT_OUT) | (b == LEFT_OUT), LEFT_OUT, sum_)
