"""Fewer numbers before fewer bits: random projection of columns, and uniform sampling of rows.

Neither the projection nor the rows are stored: both are functions of the seed, and drawn again where they are needed.
"""

import torch
from torch import Tensor

from dibit.codec import ops, rng
from dibit.codec.keep_probabilities import SAMPLING_SALT

_PROJECTION_SALT = 0x51F7A9D3C86B2E45  # separates the stream of projections from the others of the same seed


def projection(width: int, ratio: int, seed: Tensor, dtype: torch.dtype) -> Tensor:
    """P (width, R), entries +-1/sqrt(R) with equal probability, R = max(1, width // ratio): E[P P^T] = I (EXACT)."""
    reduced = max(1, width // ratio)
    return ops.signs(seed ^ _PROJECTION_SALT, width * reduced).to(dtype).view(width, reduced) * reduced**-0.5


def sampled_rows(rows: int, ratio: int, seed: Tensor) -> tuple[Tensor, Tensor]:
    """One row of each group of `ratio` consecutive rows.

    Returns:
        index int64 (m,) increasing, m = ceil(rows / ratio); weight float32 (m,) = 1 / probability, the group's size.
    """
    groups = torch.arange(-(-rows // ratio), device=seed.device)
    start = groups * ratio
    size = (rows - start).clamp_(max=ratio)
    # 32 random bits times the size, cut: bias below size / 2^32
    return start + ((rng.hash32(groups, seed ^ SAMPLING_SALT) * size) >> 32), size.to(torch.float32)
