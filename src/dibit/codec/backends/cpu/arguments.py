"""How seeds and ranges become arguments of a Numba kernel (tensors do by `dibit.codec.numpy_views.array`)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dibit.codec.numpy_views import array
from dibit.codec.rng import M1, M2

_MASK64 = 2**64 - 1


def keys(seed: Tensor) -> tuple[np.uint32, np.uint32]:
    """The two halves of the key of a seed, as `dibit.codec.rng.keys` has them, in Python's integers."""
    z = int(seed) & _MASK64
    z = ((z ^ (z >> 30)) * M1) & _MASK64
    z = ((z ^ (z >> 27)) * M2) & _MASK64
    z ^= z >> 31
    return np.uint32(z & 0xFFFFFFFF), np.uint32(z >> 32)


def float32_ranges(ranges: Tensor) -> np.ndarray:
    """Ranges (blocks, 2) in float32: Numba has no bfloat16."""
    return array(ranges.to(torch.float32))
