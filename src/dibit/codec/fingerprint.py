"""64 bits of a tensor's content, to tell whether it has changed. In goes a tensor, out comes a number.

The content is read as words of 8 bytes, the last one filled up with zeros. The fingerprint is the sum over i of
mix(word_i + (i + 1) * GOLDEN) modulo 2^64, where mix is SplitMix64's finaliser. The sum may be taken in any order, by
any number of threads. A word that changes or moves changes the sum, but for a chance of 2^-64.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from dibit.codec.numpy_views import array
from dibit.codec.rng import GOLDEN, splitmix64

_PART = 1 << 20  # this many words are read at a time on a device, so that temporary memory stays small
_FEW = 1 << 13  # up to this many bytes Python's own hash is faster than a kernel


def fingerprint(x: Tensor) -> int | Tensor:
    """The fingerprint of a strided tensor of any shape and dtype; comparable within this process.

    Returns:
        A number for a CPU's tensor; elsewhere an int64 0-d tensor, so that the device is not waited for.
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
    """The definition, in plain torch: the fingerprint, int64 0-d, of bytes uint8 (n,)."""
    if flat.numel() % 8 or flat.storage_offset() % 8:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    words = flat.view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, words.numel(), _PART):
        part = words[start : start + _PART]
        number = torch.arange(start + 1, start + 1 + part.numel(), dtype=torch.int64, device=flat.device)
        total += splitmix64(part + number * (GOLDEN - 2**64)).sum()
    return total
