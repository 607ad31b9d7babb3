"""Where random numbers come from: torch's default generator, in a way that other threads, and passes run again, bear.

Two kinds of numbers are drawn, and they have different needs.

*A dropout's mask* is part of what the model computes. Whatever runs a forward pass a second time (activation
checkpoints, reversible layers, gradient caches) puts torch's generator back before it, so each dropout takes one number
from the generator, in one draw, which torch makes under the generator's own lock: the same mask again, whoever
else is compressing and whether or not gradients are on. Under `dropout="mask"` torch draws the mask as it always does.

*The codec's key* must differ from pass to pass, but may not move the generator within a pass: only one of the two runs
compresses, and what is drawn after it would differ. The key is a hash of the generator's state, which is only read, and
of how many keys that state has given before. A state comes back if somebody restores it, or if nothing was drawn in
between; to tell these apart, the backward pass of a pass after which nothing was drawn draws one number. So
`manual_seed` and `set_rng_state` are enough for a run to repeat itself or to go on, no two passes of any threads have
the same key, and nothing that anybody draws in a forward pass is moved by it. Passes that are run again from within a
backward pass start from states that have given keys already: their keys are of a kind of their own.

A model whose configs all have `dropout="mask"` is promised the plain model's own draws, so there that one number is not
drawn. The price: where nothing at all is drawn between two passes, they go on counting, though the seed be set anew.
How far a state has counted is no part of the state, so a checkpoint holds it beside the scores of rows (`given`), and
whoever goes on from there counts on from there (`go_on`).

The generator's state is never written: between reading and writing it, another thread may have drawn from it, and would
draw the same numbers again.
"""

from __future__ import annotations

import hashlib
import os
import threading

import torch
from torch import Tensor

from dibit.codec.rng import seed_tensor


class _Given:
    """The state that last gave a key, and how many it has given."""

    def __init__(self) -> None:
        self.state: bytes | None = None
        self.count = 0

    def number(self, state: bytes, before: int) -> int:
        """Of one more key of this state; `before`: how many it had given where a checkpoint was made."""
        self.count = self.count + 1 if state == self.state else before
        self.state = state
        return self.count


_lock = threading.Lock()
_first, _again = _Given(), _Given()
_MOST = 16  # states of checkpoints that are remembered until they come
_loaded: dict[int, list[int]] = {}  # by their digest: how many keys of either kind they had given


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_after_fork)


class Key:
    """The key of one pass: no other pass has it.

    Args:
        name: of the pass's module, which tells passes apart that are run again from within a backward pass.
        moves: the backward pass may move the generator.

    Attributes:
        value: 64 bits, a function of torch's default generator.
    """

    __slots__ = ("_moves", "_state", "value")

    def __init__(self, name: str = "", moves: bool = True) -> None:
        again = torch._C._current_graph_task_id() != -1
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
        """The backward pass has come to it: the state that gave it shall not give the next one too."""
        if self._state is not None:
            self._passed(self._moves)

    def ended(self) -> None:
        """The forward pass has ended."""
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
    """What the next key depends on beside the generator's state, for a checkpoint.

    Returns:
        "state": a digest of the state as it is now; "first" and "again": how many keys it has given, in passes and in
        those that are run again from within a backward pass.
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
    """When the generator has the state of this digest, count on from where `given` was taken."""
    with _lock:
        _loaded.pop(state, None)
        _loaded[state] = [first, again]
        while len(_loaded) > _MOST:
            del _loaded[next(iter(_loaded))]
        for kind in (_first, _again):
            if kind.state is not None and _digest(kind.state) == state:
                kind.state = None


def restart() -> None:
    """The generator was seeded anew: what it has given in an earlier run of this process does not count."""
    go_on(_digest(_state()), 0, 0)


def draw() -> Tensor:
    """int64 0-d in [0, 2^63): one number of torch's default generator, drawn under the generator's own lock."""
    return torch.empty((), dtype=torch.int64, device="cpu").random_()


def dropout_seed(device: torch.device) -> Tensor:
    """int64 0-d on the device: the seed of one dropout's mask, one number of torch's default generator.

    While a CUDA graph is captured, of the device's own generator, anew at each replay.
    """
    if device.type == "cpu":
        return draw()
    return replayed_key(device) if capturing(device) else seed_tensor(int(draw()), device)


def capturing(device: torch.device) -> bool:
    """Whether what runs on this device is written down as a CUDA graph, to be run again."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def replayed_key(device: torch.device) -> Tensor:
    """int64 0-d, drawn from the device's own generator, whose place torch moves on at each replay of a CUDA graph."""
    return torch.empty((), dtype=torch.int64, device=device).random_()


def _before(state: bytes, again: bool) -> int:
    """How many keys of this kind a state had given where a checkpoint was made; told once."""
    found = _loaded.get(_digest(state)) if _loaded else None
    if found is None:
        return 0
    count, found[again] = found[again], 0
    return count


def _digest(state: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(state, digest_size=8).digest(), "little", signed=True)


def _state() -> bytes:
    """Of torch's default generator, read under the generator's own lock."""
    return torch.default_generator.get_state().numpy().tobytes()
