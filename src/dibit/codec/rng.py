"""Counter-based random numbers: the number for element i is a hash of (seed, i), the same on every backend.

So nothing has to be stored, results do not depend on threads, and backends can be compared code for code.

The hash has three multiply-xorshift rounds on 32 bits, and half of a 64-bit key enters before each of the first two.
The key enters between non-linear steps, because `hash(counter ^ key)` would give every key the same multiset of
numbers. The key is the seed after a 64-bit mixer, because with the seed itself neighbouring seeds would give one
stream, shifted.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
C1, C2, C3 = 0x7FEB352D, 0x846CA68B, 0x9E3779B1  # odd; C1 and C2 from a search for low avalanche bias
M1, M2 = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64  # of SplitMix64, as signed 64-bit numbers
GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64's step
UNIT = 2.0**-24  # 24 random bits fill a float32's mantissa: every multiple of 2^-24 in [0, 1) is exact


def mix(seed: int, *labels: int | str) -> int:
    """A 63-bit seed for the purpose that the labels name, independent of the seeds of other labels."""
    text = repr((seed, *labels)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_tensor(seed: int, device: torch.device | str = "cpu") -> Tensor:
    """A seed as the 0-d int64 tensor that the codec's operators take; the device is not waited for."""
    return torch.full((), seed, dtype=torch.int64, device=device)


def keys(seed: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of the key of a seed, int64 0-d in [0, 2^32)."""
    z = splitmix64(seed)
    return z & MASK32, (z >> 32) & MASK32


def splitmix64(z: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection of 64 bits, for each element of an int64 tensor."""
    for shift, factor in ((30, M1), (27, M2)):
        z = (z ^ ((z >> shift) & (2 ** (64 - shift) - 1))) * factor  # torch shifts signed numbers: clear what comes in
    return z ^ ((z >> 31) & (2**33 - 1))


def hash32(counter: Tensor, seed: Tensor) -> Tensor:
    """32 random bits for each counter.

    Args:
        counter: int64, any shape, non-negative.
        seed: int64, 0-d.

    Returns:
        int64 of the shape of `counter`, values in [0, 2^32).
    """
    key0, key1 = keys(seed)
    # torch has no unsigned 32-bit arithmetic: products wrap in 64 bits, whose low half is what 32 bits would give.
    x = ((counter & MASK32) + key0) & MASK32
    x = ((x ^ (x >> 16)) * C1) & MASK32
    x = (x ^ (x >> 15) ^ key1) + (((counter >> 32) & MASK32) * C3)
    x = ((x & MASK32) * C2) & MASK32
    x = ((x ^ (x >> 16)) * C3) & MASK32
    return x ^ (x >> 15)


def uniform(counter: Tensor, seed: Tensor) -> Tensor:
    """float32 in [0, 1), multiples of 2^-24; shapes as `hash32`."""
    return (hash32(counter, seed) >> 8).to(torch.float32) * UNIT


def uniform_range(start: int, stop: int, seed: Tensor) -> Tensor:
    """`uniform` of the counters start .. stop - 1: float32 (stop - start,)."""
    return uniform(torch.arange(start, stop, dtype=torch.int64, device=seed.device), seed)
