"""Large buffers on huge pages: a fresh one of 87 MB costs 20 ms of page faults otherwise, most of an element-wise pass.

torch allocates the memory (and counts it); the kernel is only advised, where transparent huge pages are on "madvise".
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

MIN_BYTES = 1 << 22  # bytes; for smaller results torch allocates as it likes
_OWN_MAPPING = 1 << 25  # bytes; glibc maps larger blocks on their own, on its heap huge pages would stay behind
_HUGEPAGE, _PAGE = 14, 4096


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """An uninitialised contiguous tensor."""
    x = torch.empty(shape, dtype=dtype, device=device)
    if x.nbytes > _OWN_MAPPING and x.device.type == "cpu" and (advise := _madvise()) is not None:
        start = -(-x.data_ptr() // _PAGE) * _PAGE
        advise(start, (x.data_ptr() + x.nbytes - start) // _PAGE * _PAGE, _HUGEPAGE)
    return x


def empty_like(x: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of the shape, dtype and device of x."""
    return empty(x.shape, x.dtype, x.device)


def worth_huge_pages(*tensors: Tensor) -> bool:
    """Whether a result of these tensors' size is worth a buffer of its own: large, on the CPU."""
    return all(x.nbytes >= MIN_BYTES and x.device.type == "cpu" for x in tensors)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    mode = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    try:
        if sys.platform != "linux" or "[madvise]" not in mode.read_text():
            return None
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise  # type: ignore[no-any-return]
