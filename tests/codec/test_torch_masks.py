"""Torch's own masks, drawn faster: the same bits, and a generator that has moved on by as much."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest
import torch

from dibit.codec import torch_masks
from dibit.codec.backends.reference import pack_mask
from dibit.codec.torch_masks import bernoulli_bits

WORDS = 624

pytestmark = pytest.mark.skipif(
    bernoulli_bits(1 << 14, 0.5) is None, reason="on this processor torch draws in another way"
)


@pytest.fixture(autouse=True)
def generator() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


def draws() -> Iterator[tuple[int, int, float]]:
    """Words drawn before, elements, and the probability: at every kind of place in a block of words."""
    chance = random.Random(0)
    for before in (0, 1, 2, 622, 623, 624, 625, 1247, 1248):
        yield before, 1 << 13, 0.5
    for count in range(8192, 8192 + WORDS, 39):
        yield chance.randrange(2000), count, chance.choice((0.9, 0.5, 0.2, 1 / 3, 1e-9, 1 - 2**-53, 2**-53))
    for _ in range(20):
        yield chance.randrange(10_000), chance.randrange(8192, 100_000), chance.random()


@pytest.mark.parametrize(("before", "count", "keep"), list(draws()))
def test_bits_and_state_are_torchs(before: int, count: int, keep: float) -> None:
    torch.manual_seed(before)
    torch.empty(before, dtype=torch.int32).random_()
    state = torch.get_rng_state()
    given, after = pack_mask(torch.empty(count).bernoulli_(keep)), torch.get_rng_state()
    torch.set_rng_state(state)
    bits = bernoulli_bits(count, keep)
    assert bits is not None
    assert torch.equal(bits, given)
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(torch.randn(5), (torch.set_rng_state(after), torch.randn(5))[1])


@pytest.mark.parametrize("keep", [0.5, 0.3, 0.75])
def test_at_the_limit(keep: float) -> None:
    """A draw that equals the limit is not below it: the generator is set to words that make such a draw."""
    limit = int(keep * 2**53)
    for number, kept in ((limit - 1, True), (limit, limit < keep * 2**53), (limit + 1, False)):
        words = torch_masks.private.read(torch.get_rng_state())[0]
        words[2], words[3] = _untempered(number >> 32), _untempered(number & 0xFFFFFFFF)
        state = torch_masks.private.written(torch.get_rng_state(), words, 2)
        torch.set_rng_state(state)
        assert bool(torch.empty(1).bernoulli_(keep)) is kept
        torch.set_rng_state(state)
        bits = bernoulli_bits(1 << 13, keep)
        assert bits is not None
        assert bool(bits[0] & 1) is kept


def _untempered(y: int) -> int:
    """The word that is tempered to y: each step undone by going through it again until no bit changes."""
    y ^= y >> 18
    y ^= (y << 15) & 0xEFC60000
    x = y
    for _ in range(5):
        x = y ^ ((x << 7) & 0x9D2C5680)
    word = x
    for _ in range(3):
        word = x ^ (word >> 11)
    return word & 0xFFFFFFFF


def test_a_thread_that_draws_meanwhile() -> None:
    """No number is given out twice: the generator moves on by all that both threads have drawn."""
    torch.manual_seed(0)
    stop, count, drawn, masks = threading.Event(), 1 << 21, 0, 0

    def draw() -> None:
        nonlocal drawn
        while not stop.is_set():
            torch.empty(1, dtype=torch.int32).random_()
            drawn += 1

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for _ in range(8):
            masks += bernoulli_bits(count, 0.5) is not None
    finally:
        stop.set()
        thread.join()
    expected = torch.Generator().manual_seed(0)
    torch.empty(drawn + 2 * count * masks, dtype=torch.int32).random_(generator=expected)
    assert torch.equal(torch.get_rng_state(), expected.get_state())


def test_small_ones_are_left_to_torch() -> None:
    before = torch.get_rng_state()
    assert bernoulli_bits(100, 0.5) is None
    assert torch.equal(torch.get_rng_state(), before)
