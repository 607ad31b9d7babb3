"""A tensor's memory as a NumPy array."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

_DTYPES = {
    torch.float32: np.float32, torch.float64: np.float64, torch.uint8: np.uint8, torch.int8: np.int8,
    torch.int16: np.int16, torch.int32: np.int32, torch.int64: np.int64, torch.bool: np.bool_,
}  # fmt: skip


def array(x: Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor, shared, as `x.numpy()` gives it.

    `numpy()` would forbid the owner of the memory to resize it, for good; reversible layers and sharded training do so.
    """
    if not x.is_contiguous():
        x = x.contiguous()
    memory = (ctypes.c_char * x.nbytes).from_address(x.data_ptr())
    memory.owner = x  # type: ignore[attr-defined]  # the memory lives as long as the array
    return np.ndarray(x.shape, _DTYPES[x.dtype], buffer=memory)  # type: ignore[arg-type]
