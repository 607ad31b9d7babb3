"""The kernel of the fingerprint of content."""

from __future__ import annotations

import numba as nb
import numpy as np

from dibit.codec.backends.cpu.jit import Kernel, inlined
from dibit.codec.backends.cpu.kernels.numbers import CHUNK
from dibit.codec.rng import GOLDEN, M1, M2

_GOLDEN, _M1, _M2 = np.uint64(GOLDEN), np.uint64(M1 + 2**64), np.uint64(M2 + 2**64)


@Kernel
def fingerprint(words, rest):
    tasks = (words.size + CHUNK - 1) // CHUNK
    sums = np.zeros(tasks + 1, np.uint64)
    for task in nb.prange(tasks):
        start = task * CHUNK
        part = words[start : start + CHUNK]
        total = np.uint64(0)
        for k in range(part.size):
            total += _mixed(part[k] + np.uint64(start + k + 1) * _GOLDEN)
        sums[task] = total
    if rest.size:
        last = np.uint64(0)
        for k in range(rest.size):
            last |= np.uint64(rest[k]) << np.uint64(8 * k)
        sums[tasks] = _mixed(last + np.uint64(words.size + 1) * _GOLDEN)
    return np.int64(sums.sum())


@inlined
def _mixed(z):
    z = (z ^ (z >> np.uint64(30))) * _M1
    z = (z ^ (z >> np.uint64(27))) * _M2
    return z ^ (z >> np.uint64(31))
