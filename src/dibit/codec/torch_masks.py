"""The masks that torch's dropout draws on the CPU, as bits, some twenty times as fast as torch draws them.

`x.bernoulli_(keep)` takes two words of torch's generator for each element, makes a number of 53 bits of them, and
compares it with `keep`. Here the same is done without the tensor of floating-point numbers, and the generator is left
as torch would leave it. On processors for which torch has another way to draw, it draws.
"""

from __future__ import annotations

import functools
import importlib.util
import math

import numpy as np
import torch
from torch import Tensor

from dibit._torch.private import generator as private
from dibit.codec.layout import mask_bytes
from dibit.codec.numpy_views import array

_MIN_ELEMENTS = 1 << 13  # elements below which the generator's state takes longer to read than a mask to draw
_TRIES = 3


def bernoulli_bits(count: int, keep: float) -> Tensor | None:
    """What `torch.empty(count).bernoulli_(keep)` draws, as the bits of `pack_mask`; `None` where torch has to draw.

    Args:
        count: of elements.
        keep: the probability of a 1, between 0 and 1.

    Returns:
        A mask, uint8, of `count` bits. Torch's default generator has moved on as it does in `bernoulli_`.
    """
    if count < _MIN_ELEMENTS or not _draws_as_torch():
        return None
    for _ in range(_TRIES):
        before = torch.default_generator.get_state()
        bits, after = _drawn(count, keep, before)
        if torch.equal(torch.default_generator.get_state(), before):  # no other thread has drawn meanwhile
            torch.default_generator.set_state(after)
            return bits
    return None


def _drawn(count: int, keep: float, state: Tensor) -> tuple[Tensor, Tensor]:
    from dibit.codec.backends.cpu.kernels import twister

    words, at = private.read(state)
    limit = math.ceil(keep * 2**53)
    bits = torch.empty(mask_bytes(count), dtype=torch.uint8)
    at = twister.bernoulli_bits(0, words, at, np.uint32(limit >> 32), np.uint32(limit % 2**32), count, array(bits))
    return bits, private.written(state, words, at)


@functools.cache
def _draws_as_torch() -> bool:
    """Whether this torch, on this processor, draws as we do."""
    if not private.READS or importlib.util.find_spec("numba") is None:
        return False
    from dibit.codec.backends.reference import pack_mask

    generator = torch.Generator().manual_seed(0)
    for count, keep in ((1501, 0.3), (640, 0.5), (40_000, 1 / 3)):
        torch.empty(1, dtype=torch.int32).random_(generator=generator)  # an odd number of words
        bits, after = _drawn(count, keep, generator.get_state())
        given = torch.empty(count).bernoulli_(keep, generator=generator)
        if not (torch.equal(bits, pack_mask(given)) and torch.equal(after, generator.get_state())):
            return False
    return True
