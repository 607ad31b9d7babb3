"""The state of torch's generator on the CPU, a Mersenne Twister, as the numbers that come next follow from it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dibit._torch.private.registry import find

WORDS = 624  # of 32 bits
# Bytes of `Generator.get_state()`: how many words are left, and one more; the next word; the words, 8 bytes each.
_LEFT, _NEXT, _STATE = slice(8, 12), slice(16, 24), slice(24, 24 + 8 * WORDS)


def _layout() -> bool:
    """Whether the bytes are laid out as above: seeding is published, and a draw moves on by a word."""
    generator = torch.Generator().manual_seed(5489)
    words, at = _read(generator.get_state())
    expected = [5489]
    for i in range(1, WORDS):
        expected.append((1812433253 * (expected[-1] ^ (expected[-1] >> 30)) + i) & 0xFFFFFFFF)
    torch.empty(3, dtype=torch.int32).random_(generator=generator)
    if at != WORDS or words.tolist() != expected or _read(generator.get_state())[1] != 3:
        raise NotImplementedError
    return True


def _read(state: Tensor) -> tuple[np.ndarray, int]:
    raw = state.numpy()
    left = int(raw[_LEFT].view(np.int32)[0])
    return raw[_STATE].view(np.uint64).astype(np.uint32), WORDS + 1 - left if left > 1 else WORDS


READS = find(
    "torch.Generator.get_state()[8:5016]", "draw torch's dropout masks faster than torch", "time", look=_layout
)


def read(state: Tensor) -> tuple[np.ndarray, int]:
    """The words of a generator's state, uint32 (624,), and which of them comes next; 624: they are used up.

    Args:
        state: what `torch.Generator.get_state` gave; only where `READS`.
    """
    return _read(state)


def written(state: Tensor, words: np.ndarray, at: int) -> Tensor:
    """The state with these words, of which this one comes next."""
    state = state.clone()
    raw = state.numpy()
    raw[_STATE].view(np.uint64)[:] = words
    raw[_LEFT].view(np.int32)[0] = WORDS + 1 - at
    raw[_NEXT].view(np.uint64)[0] = at
    return state
