"""The Mersenne Twister MT19937 (Matsumoto and Nishimura, 1998), from which torch draws dropout's masks on the CPU."""

from __future__ import annotations

import numba as nb
import numpy as np

from dibit.codec.backends.cpu.jit import Kernel
from dibit.codec.backends.cpu.kernels.numbers import u32

_WORDS, _AHEAD = 624, 397
_HIGH, _LOW, _MATRIX = 0x80000000, 0x7FFFFFFF, 0x9908B0DF
_LOW_53 = (1 << 21) - 1  # of a number of 64 bits in two words, the part of its first word that a double takes


@nb.njit(inline="always", error_model="numpy")
def _twisted(word, following, ahead):
    mixed = (word & u32(_HIGH)) | (following & u32(_LOW))
    return ahead ^ (mixed >> u32(1)) ^ ((u32(0) - (following & u32(1))) & u32(_MATRIX))


@nb.njit(error_model="numpy", nogil=True)
def _next_words(state):
    for i in range(_WORDS - _AHEAD):  # loops of their own, so that the compiler sees that no word depends on a near one
        state[i] = _twisted(state[i], state[i + 1], state[i + _AHEAD])
    for i in range(_WORDS - _AHEAD, _WORDS - 1):
        state[i] = _twisted(state[i], state[i + 1], state[i + _AHEAD - _WORDS])
    state[_WORDS - 1] = _twisted(state[_WORDS - 1], state[0], state[_AHEAD - 1])


@nb.njit(error_model="numpy", nogil=True)
def _temper(state, out):
    for i in range(_WORDS):
        y = state[i]
        y ^= y >> u32(11)
        y ^= (y << u32(7)) & u32(0x9D2C5680)
        y ^= (y << u32(15)) & u32(0xEFC60000)
        out[i] = y ^ (y >> u32(18))


@nb.njit(inline="always", error_model="numpy")
def _below(first, second, limit_first, limit_second):
    """Whether the number of 53 bits that two words make is below a limit."""
    first &= u32(_LOW_53)
    return u32(first < limit_first) | (u32(first == limit_first) & u32(second < limit_second))


@Kernel
def bernoulli_bits(state, at, limit_first, limit_second, count, out):
    """Which of `count` draws are below the limit, as a mask's bits; the word of the state that comes next."""
    size = out.size
    for j in range(size):
        out[j] = 0
    words = np.empty(_WORDS, np.uint32)
    if at < _WORDS:
        _temper(state, words)
    first, halved = u32(0), False  # a draw whose two words lie on either side of a twist
    drawn = slot = j = 0
    while drawn < count:
        if at == _WORDS:
            _next_words(state)
            _temper(state, words)
            at = 0
        if halved:
            out[j] |= np.uint8(_below(first, words[0], limit_first, limit_second) << u32(slot))
            at, halved = 1, False
            drawn, j = drawn + 1, j + 1
            if j == size:
                j, slot = 0, slot + 1
        pairs = min((_WORDS - at) // 2, count - drawn)
        drawn += pairs
        while pairs > 0:
            run = min(pairs, size - j)
            part, pair = out[j : j + run], words[at : at + 2 * run]
            for k in range(run):
                part[k] |= np.uint8(_below(pair[2 * k], pair[2 * k + 1], limit_first, limit_second) << u32(slot))
            pairs, at, j = pairs - run, at + 2 * run, j + run
            if j == size:
                j, slot = 0, slot + 1
        if drawn < count and at == _WORDS - 1:
            first, halved, at = words[at], True, _WORDS
    return at
