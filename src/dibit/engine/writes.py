"""Writes to tensors in a forward pass: what is kept must not change with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from dibit._torch.storage_identity import strided
from dibit._torch.user_objects import is_a
from dibit.engine.known_sources import KnownSources
from dibit.engine.lossless import LosslessForms


class Writes:
    """Is called before any operation writes to a tensor, and calls the parts of the pass that must know.

    Args:
        lossless: copies what it keeps by a reference to this memory.
        sources: forgets how the tensor was computed.
    """

    def __init__(self, lossless: LosslessForms, sources: KnownSources) -> None:
        self.holdings = lossless.holdings
        self.lossless, self.sources = lossless, sources
        self._listeners: list[Callable[[int], None]] = []
        self._reads = False

    def listen(self, listener: Callable[[int], None]) -> None:
        """Call `listener` with the identity of a storage before something writes to it."""
        self._listeners.append(listener)

    def before(self, x: Any) -> None:
        """An operation is about to change x in place, a tensor or a list of them; anything else is passed over.

        Plain torch allows it where it keeps only an operation's result, while Dibit may have kept the input.
        """
        if isinstance(x, list | tuple):
            for item in x:
                self.before(item)
        elif is_a(x, Tensor) and strided(x):
            storage = self.holdings.storage(x)
            for listener in self._listeners:
                listener(storage)
            if storage not in self.holdings.roles and not self.holdings.is_made(x):
                self.lossless.copy_aliases(x, storage)
            self.lossless.copy_leaves(storage)
            estimated = self.sources.estimate(x)
            self.holdings.count_change(storage)
            self.sources.changed(x, estimated)
            self.holdings.owners.changed(storage)

    def exposed(self, x: Any) -> None:
        """The memory of x is handed to somebody whose writes cannot be seen: NumPy, DLPack, a kernel by its address."""
        if not self._reads and is_a(x, Tensor) and strided(x):
            self.before(x)
            self.holdings.expose(self.holdings.storage(x))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A block that runs a kernel known to read what it is given, to write what it makes, and to keep neither."""
        before, self._reads = self._reads, True
        try:
            yield
        finally:
            self._reads = before

    def clear(self) -> None:
        """The pass has ended."""
        self._listeners.clear()
