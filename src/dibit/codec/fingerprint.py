"""64 bits of a tensor's content, to tell whether it has changed.

Words of 8 bytes, the last one filled up with zeros: the sum over i of mix(word_i + (i + 1) * golden ratio) modulo 2^64,
where mix is SplitMix64's finaliser. The sum may be taken in any order, by any number of threads; a word that changes or
moves changes it, save for one chance in 2^64.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from dibit.codec.numpy_views import array
from dibit.codec.rng import GOLDEN, splitmix64

_PART = 1 << 20  # words at a time on a device: temporary memory stays small
_FEW = 1 << 13  # bytes that Python's own hash has read before a kernel has started


def fingerprint(x: Tensor) -> int | Tensor:
    """Of a strided tensor of any shape and dtype, for comparison within this process.

    Returns:
        A number on the CPU; elsewhere int64 0-d, for which nobody waits.
    """
    x = x.detach()
    flat = (x if x.is_contiguous() else x.contiguous()).resolve_conj().resolve_neg().view(-1).view(torch.uint8)
    if flat.device.type != "cpu":
        return of_bytes(flat)
    raw = array(flat)
    if raw.size <= _FEW:
        return hash(raw.tobytes())
    if not _compiled():
        return int(of_bytes(flat))
    from dibit.codec.backends.cpu.kernels import fingerprint as kernels

    if raw.ctypes.data % 8:  # a view that begins between two words
        raw = raw.copy()
    whole = raw.size // 8 * 8
    return kernels.fingerprint(whole // 8, raw[:whole].view("uint64"), raw[whole:])  # type: ignore[no-any-return]


@functools.cache
def _compiled() -> bool:
    return importlib.util.find_spec("numba") is not None


def of_bytes(flat: Tensor) -> Tensor:
    """The definition: int64 0-d for uint8 (n,)."""
    if flat.numel() % 8 or flat.storage_offset() % 8:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    words = flat.view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, words.numel(), _PART):
        part = words[start : start + _PART]
        number = torch.arange(start + 1, start + 1 + part.numel(), dtype=torch.int64, device=flat.device)
        total += splitmix64(part + number * (GOLDEN - 2**64)).sum()
    return total
