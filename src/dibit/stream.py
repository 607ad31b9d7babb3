"""Seeds that follow torch's default generator and never move it.

A compressed pass needs fresh random numbers, the same after `torch.manual_seed` or a restored generator state, and must
leave the model's own draws where they are. So its key is a hash of the state, and the state is *marked*: the
lowest 31 bits of the Mersenne Twister's first word count up. They are the 31 bits of its 624 words that its recurrence
never reads, and the word itself has been given out, or will be overwritten, before the next number: all draws stay what
they were, while `get_rng_state`, `set_rng_state` and `manual_seed` carry, restore and reset the count.
"""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import Tensor

_WORD, _FREE = slice(24, 32), 2**31 - 1  # the first word in the state's bytes, after the seed and the position


def fresh_key() -> int:
    """64 bits that no other pass has, a function of torch's default generator."""
    generator = torch.default_generator
    state = generator.get_state()
    key = hashlib.blake2b(state.numpy().tobytes(), digest_size=8).digest()
    if _draws_ignore_marks():
        generator.set_state(marked(state))
    else:
        torch.empty((), dtype=torch.int64).random_()
    return int.from_bytes(key, "little")


def marked(state: Tensor) -> Tensor:
    """A generator's state (uint8) with one more mark."""
    state = state.clone()
    word = state[_WORD].view(torch.int64)
    word.copy_((word & ~_FREE) | ((word + 1) & _FREE))
    return state


def capturing(device: torch.device) -> bool:
    """Whether what runs on this device is written down as a CUDA graph, to be run again."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def replayed_key(device: torch.device) -> Tensor:
    """int64 0-d, drawn from the device's own generator, whose place torch moves on at each replay of a CUDA graph."""
    return torch.empty((), dtype=torch.int64, device=device).random_()


@functools.cache
def _draws_ignore_marks() -> bool:
    """Whether this torch keeps its generator's state as described above."""
    generator = torch.Generator()
    for before in (0, 7, 624):
        generator.manual_seed(before)
        torch.rand(before, generator=generator)
        state = generator.get_state()
        mark = marked(state)
        plain = torch.rand(700, generator=generator)
        generator.set_state(mark)
        kept = torch.equal(generator.get_state(), mark) and not torch.equal(mark, state)
        if not kept or not torch.equal(plain, torch.rand(700, generator=generator)):
            return False
    return True
