"""Where random numbers come from: torch's default generator, in a way that other threads, and passes run again, bear.

Two kinds of numbers are drawn, and they have different needs.

*A dropout's mask* is part of what the model computes. Whatever runs a forward pass a second time (activation
checkpoints, reversible layers, gradient caches) puts torch's generator back before it, so each dropout takes one number
from the generator, in one draw, which torch makes under the generator's own lock: the same mask again, whoever
else is compressing and whether or not gradients are on. Under `dropout="mask"` torch draws the mask as it always does.

*The codec's key* must differ from pass to pass, but may not move the generator within a pass: a pass that is run again
does not compress (`dibit.compress`), and would find other numbers. The key is a hash of the generator's state, which is
only read, and of how many keys that state has given before. A state comes back only if somebody restores it, or if
nothing was drawn in between; to tell these apart, the backward pass of a pass after which nothing was drawn draws one number.
So `manual_seed` and `set_rng_state` are enough for a run to repeat itself or to go on, no two passes of any threads
have the same key, and nothing that anybody draws in a forward pass is moved by it.

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
        self.lock = threading.Lock()
        self.state: bytes | None = None
        self.count = 0


_given = _Given()
os.register_at_fork(after_in_child=lambda: setattr(_given, "lock", threading.Lock()))  # another thread may have held it


class Key:
    """The key of one pass: no other pass has it.

    Attributes:
        value: 64 bits, a function of torch's default generator.
    """

    __slots__ = ("_state", "value")

    def __init__(self) -> None:
        with _given.lock:
            self._state: bytes | None = _state()
            if self._state == _given.state:
                _given.count += 1
            else:
                _given.state, _given.count = self._state, 0
            key = hashlib.blake2b(self._state, digest_size=8, salt=_given.count.to_bytes(16, "little"))
        self.value = int.from_bytes(key.digest(), "little")

    def used(self) -> None:
        """The backward pass has come to it: the state that gave it shall not give the next one too."""
        if self._state is None:
            return
        with _given.lock:
            state, self._state = self._state, None
            if state is not None and state == _state():
                draw()
            if state is not None and state == _given.state:
                _given.state = None  # it has passed: where it is met again, somebody restored it


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


def _state() -> bytes:
    """Of torch's default generator, read under the generator's own lock."""
    return torch.default_generator.get_state().numpy().tobytes()
