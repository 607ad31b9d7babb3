"""The seeds of one forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from dibit.codec import mix, seed_tensor
from dibit.codec.seed_stream import Key, capturing, replayed_key
from dibit.engine.module_stack import ModuleStack


class Draws:
    """Seeds of the codec. Their stream is a function of torch's default generator and draws nothing from it.

    Args:
        stack: whose outermost module is part of the key.
        seeded_dropout: dropout's masks are drawn from seeds, too.

    Attributes:
        key: of the pass, once it has drawn; residuals call its `used` in the backward pass.
    """

    def __init__(self, stack: ModuleStack, seeded_dropout: bool) -> None:
        self.key: Key | None = None
        self._stack, self._seeded_dropout = stack, seeded_dropout
        self._replayed: Tensor | None = None
        self._count = 0

    def seed(self, purpose: str, device: torch.device, *more: int) -> Tensor:
        """A fresh seed, int64 (), on the device.

        While a CUDA graph is captured a number would be written into it once and for all: there the key is drawn on the
        device, anew at each replay.
        """
        if capturing(device):
            self._count += 1
            if self._replayed is None:
                self._replayed = replayed_key(device)
            return self._replayed ^ mix(self._count, purpose, *more)
        if self.key is None:
            self.key = Key(self._stack.names[0] if self._stack.names else "", self._seeded_dropout)
        self._count += 1
        return seed_tensor(mix(self.key.value, purpose, self._count, *more), device)

    def end(self) -> None:
        """The forward pass has ended."""
        if self.key is not None:
            self.key.ended()
