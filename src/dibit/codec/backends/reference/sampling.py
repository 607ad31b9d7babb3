"""Which rows are kept: their scores, and systematic sampling by them."""

import torch
from torch import Tensor

from dibit.codec.keep_probabilities import FIXED_POINT_ONE, keep_probabilities, sampling_start


def row_scores(x: Tensor) -> Tensor:
    """uint8 (N,): the exponent bits of each row's squared norm, of a contiguous x (N, D); 255 where it is not finite.

    Norms at a power of two may fall on either side, with the order in which a backend adds.
    """
    return (x.to(torch.float32).square().sum(1).view(torch.int32) >> 23).to(torch.uint8)


def pick_rows(scores: Tensor, seed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Systematic sampling with the probabilities of `dibit.codec.keep_probabilities`, without replacement.

    Row j of the result is the row in whose share of the summed probabilities `sampling_start(seed) + j` falls.

    Args:
        scores: uint8 (N,), see `dibit.codec.row_sampling`.
        seed: int64 0-d.
        count: rows to pick, at most those that are not `LEFT_OUT`.

    Returns:
        index int64 (count,), increasing; weight float32 (count,) = 1 / probability. Since probabilities are rounded
        down, their sum may fall short of `count`: then the last entry has weight 0.
    """
    probability = keep_probabilities(scores, count)[scores.long()]
    at = sampling_start(seed) + torch.arange(count, device=scores.device) * FIXED_POINT_ONE
    index = torch.searchsorted(probability.cumsum(0), at, right=True)
    beyond = index >= scores.numel()
    index.clamp_(max=max(scores.numel() - 1, 0))
    weight = FIXED_POINT_ONE / probability[index].clamp(min=1).double()
    return index, torch.where(beyond, 0, weight).float()
