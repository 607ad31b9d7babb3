r"""Scores by which rows are kept: one byte a row, made of norms, added, multiplied and compared.

A score is the binary exponent of a row's squared norm, so that adding up, comparing and storing cost next to nothing.
Norms are told apart in steps of :math:`\sqrt 2`; the sampling error is about a hundredth above that of exact norms.
`dibit.codec.keep_probabilities` turns scores into probabilities, and `ops.pick_rows` draws the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dibit.codec import ops
from dibit.codec.keep_probabilities import LEFT_OUT

__all__ = ["LEFT_OUT", "add_scores", "by_length", "row_scores", "unevenness"]


def row_scores(x: Tensor) -> Tensor:
    """The binary exponent of the squared norm of each row of x (N, ...): uint8 (N,), `LEFT_OUT` where not finite."""
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


def add_scores(a: Tensor, b: Tensor) -> Tensor:
    """The score of the sum of two squared norms, from their scores uint8 (N,); `LEFT_OUT` where one of them is."""
    total = (torch.maximum(a, b) + ((a == b) & (a > 0))).clamp_(max=LEFT_OUT - 1)
    return torch.where((a == LEFT_OUT) | (b == LEFT_OUT), LEFT_OUT, total)
