"""A CPU tensor's memory as a NumPy array, without a copy: what Numba kernels read and write."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_TYPES = {
    torch.float32: "<f4",
    torch.float64: "<f8",
    torch.uint8: "|u1",
    torch.int8: "|i1",
    torch.int16: "<i2",
    torch.int32: "<i4",
    torch.int64: "<i8",
    torch.bool: "|b1",
}


class _Memory:
    """NumPy's array interface of a contiguous CPU tensor; the array holds this object, and so the tensor."""

    __slots__ = ("__array_interface__", "owner")

    def __init__(self, x: Tensor) -> None:
        self.owner = x
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "shape": tuple(x.shape),
            "typestr": _TYPES[x.dtype],
            "data": (x.data_ptr(), False),
        }


def array(x: Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor, shared, as `x.numpy()` gives it.

    `numpy()` would forbid the owner of the memory to resize it, for good; reversible layers and sharded training do so.
    """
    return np.asarray(_Memory(x if x.is_contiguous() else x.contiguous()))
