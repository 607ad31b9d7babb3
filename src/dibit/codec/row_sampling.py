r"""Which rows are kept, with probabilities that both passes know: by a score of one byte a row.

A score is the binary exponent of a row's squared norm, so that adding up, comparing and storing cost next to nothing;
in steps of :math:`\sqrt 2` the probabilities are so near to the best ones that the error grows by a hundredth.
Probabilities are integers out of `ONE`: sums are exact, so the rows are the same wherever they are drawn again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dibit.codec import ops
from dibit.codec.keep_probabilities import FLOOR, LEFT_OUT, ONE, chances

__all__ = ["FLOOR", "LEFT_OUT", "ONE", "by_length", "chances", "picked", "row_scores", "together", "unevenness"]


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


def by_length(gradients: Tensor, lengths: Tensor) -> Tensor:
    """The score of |dY_n| |x_n|, from those of both: uint8 (N,); `LEFT_OUT` where the gradient's is."""
    product = (gradients.to(torch.int16) + lengths.to(torch.int16) - 127).clamp_(0, LEFT_OUT - 1).to(torch.uint8)
    product = torch.where((gradients == 0) | (lengths == 0), 0, product)
    return torch.where(gradients == LEFT_OUT, LEFT_OUT, product)


def unevenness(scores: Tensor) -> float:
    """The mean of |x_n|^2 over the square of the mean of |x_n|, from scores uint8 (N,): 1 where all are alike."""
    rows = torch.bincount(scores, minlength=256).double()
    code = torch.arange(256, device=scores.device, dtype=torch.float64)
    value = torch.exp2((code - 127) / 2)
    rows[LEFT_OUT] = value[0] = 0
    first, second = torch.stack(((rows * value).sum(), (rows * value.square()).sum())).tolist()
    return float(second * float(rows.sum()) / first**2) if first > 0 else 1.0


def together(a: Tensor, b: Tensor) -> Tensor:
    """The score of the sum of two squared norms, not finite where one of them is not."""
    sum_ = (torch.maximum(a, b) + ((a == b) & (a > 0))).clamp_(max=LEFT_OUT - 1)
    return torch.where((a == LEFT_OUT) | (b == LEFT_OUT), LEFT_OUT, sum_)
