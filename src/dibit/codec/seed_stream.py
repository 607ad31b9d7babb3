"""Where seeds come from: torch's default generator, read so that threads and repeated passes do not disturb each other.

Two kinds of seeds are needed, with different demands.

*The seed of a dropout's mask* is part of what the model computes. Whatever runs a forward pass a second time
(activation checkpoints, reversible layers, gradient caches) first sets torch's generator back. So each dropout takes
one number from the generator, in one draw, which torch makes under the generator's own lock: the second run gets the
same mask, whatever other threads do, and whether or not gradients are on. Under `dropout="mask"` torch draws the mask
as it always does.

*The codec's key* must differ from pass to pass, but drawing it may not move the generator within a pass: of two runs
of a pass only one compresses, and what is drawn after the key would differ between them. So the key is a hash of the
generator's state, which is only read, and of a count: how many keys this state has given before.

A pass may find a state again because somebody restored it, or because nothing was drawn since the last pass. In the
first case keys must repeat, in the second they must not. To tell the cases apart, the backward pass draws one number
if nothing was drawn since its forward pass. The effect: `manual_seed` and `set_rng_state` are enough for a run to
repeat itself or to continue, no two passes of any threads have the same key, and nothing that anybody draws in a
forward pass changes. Passes that are run again from within a backward pass start from states that have given keys
already, so they count separately.

A model whose configs all have `dropout="mask"` is promised the plain model's own draws, so there the backward pass
draws nothing. The price: where nothing at all is drawn between two passes, the count goes on, even if the seed is set
anew. The count is no part of the generator's state, so a checkpoint stores it (`given`), and a run that continues from
the checkpoint sets it (`go_on`).

The generator's state is never written: between reading and writing it another thread may have drawn from it, and would
draw the same numbers again.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dibit._torch.private.autograd import backward_pass
from dibit.codec.rng import seed_tensor


class _Given:
    """The generator's state that last gave a key, and how many keys it has given."""

    def __init__(self) -> None:
        self.state: bytes | None = None
        self.count = 0

    def number(self, state: bytes, before: int) -> int:
        """The number of the next key of this state; `before`: keys that it had given when a checkpoint was made."""
        self.count = self.count + 1 if state == self.state else before
        self.state = state
        return self.count


_lock = threading.Lock()
_captured = ""  # see `as_if_captured`
_first, _again = _Given(), _Given()
_MOST = 16  # at most this many generator states from loaded checkpoints are remembered
_loaded: dict[int, list[int]] = {}  # digest of such a state -> how many keys of either kind it had given


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_after_fork)


class Key:
    """The key of one forward pass; no other pass has the same.

    Args:
        name: of the pass's module, which tells passes apart that are run again from within a backward pass.
        moves: whether the backward pass may draw a number from the generator.

    Attributes:
        value: 64 bits, a function of torch's default generator.
    """

    __slots__ = ("_moves", "_state", "value")

    def __init__(self, name: str = "", moves: bool = True) -> None:
        again = backward_pass() != -1
        with _lock:
            state = _state()
            given = _again if again else _first
            number = given.number(state, _before(state, again) if state != given.state else 0)
            if not again and not number and state == _again.state:
                _again.state = None  # somebody restored it
        self._state: bytes | None = state
        self._moves = moves
        label = repr((name, number)) if again else str(number)
        key = hashlib.blake2b(state, digest_size=8, key=label.encode()[-64:])
        self.value = int.from_bytes(key.digest(), "little")

    def used(self) -> None:
        """To be called when the backward pass uses the key: the state that gave it shall not give the next one."""
        if self._state is not None:
            self._passed(self._moves)

    def ended(self) -> None:
        """To be called when the forward pass ends."""
        if self._state is not None:
            self._passed(False)

    def _passed(self, moves: bool) -> None:
        with _lock:
            state = self._state
            if state == _state():
                if not moves:
                    return
                draw()
            self._state = None
            if state == _first.state:
                _first.state = None  # nothing but restoring it brings it back


def given() -> dict[str, int]:
    """What the next key depends on besides the generator's state, for a checkpoint; `go_on` takes it.

    Returns:
        "state": a digest of the generator's state; "first" and "again": how many keys this state has given to passes,
        and to passes that are run again from within a backward pass.
    """
    with _lock:
        state = _state()
        digest = _digest(state)
        first, again = (
            kind.count + 1 if state == kind.state else before
            for kind, before in zip((_first, _again), _loaded.get(digest, (0, 0)), strict=True)
        )
        return {"state": digest, "first": first, "again": again}


def go_on(state: int, first: int, again: int) -> None:
    """Continue the counts of a checkpoint (`given`), as soon as the generator has the state of this digest."""
    with _lock:
        _loaded.pop(state, None)
        _loaded[state] = [first, again]
        while len(_loaded) > _MOST:
            del _loaded[next(iter(_loaded))]
        for kind in (_first, _again):
            if kind.state is not None and _digest(kind.state) == state:
                kind.state = None


def restart() -> None:
    """To be called after the generator is seeded anew: keys given in an earlier run of this process do not count."""
    go_on(_digest(_state()), 0, 0)


def forget() -> None:
    """Forget which keys this process has given, so that it goes on as a new process would."""
    with _lock:
        _first.state = _again.state = None
        _loaded.clear()


def draw() -> Tensor:
    """int64 0-d in [0, 2^63): one number of torch's default generator, drawn under the generator's own lock."""
    return torch.empty((), dtype=torch.int64, device="cpu").random_()


def dropout_seed(device: torch.device) -> Tensor:
    """int64 0-d on the device: the seed of one dropout's mask, one number of torch's default generator.

    While a CUDA graph is captured, the number comes from the device's own generator, and each replay draws another.
    """
    if capturing(device):
        return replayed_key(device)
    return draw() if device.type == "cpu" else seed_tensor(int(draw()), device)


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on this device."""
    return device.type == _captured or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


@contextmanager
def as_if_captured(device: str) -> Iterator[None]:
    """Within it, a type of device draws as if a CUDA graph captured all that is done: to show it on a CPU."""
    global _captured
    before, _captured = _captured, device
    try:
        yield
    finally:
        _captured = before


def replayed_key(device: torch.device) -> Tensor:
    """int64 0-d, drawn from the device's own generator, which torch advances at each replay of a CUDA graph."""
    return torch.empty((), dtype=torch.int64, device=device).random_()


def _before(state: bytes, again: bool) -> int:
    """How many keys of this kind a state had given when a checkpoint was made; 0 at the second call."""
    found = _loaded.get(_digest(state)) if _loaded else None
    if found is None:
        return 0
    count, found[again] = found[again], 0
    return count


def _digest(state: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(state, digest_size=8).digest(), "little", signed=True)


def _state() -> bytes:
    """The state of torch's default generator, read under the generator's own lock."""
    return torch.default_generator.get_state().numpy().tobytes()
