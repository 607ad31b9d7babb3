"""The running operation's entry in the ledger: what it keeps, and what it would keep without Dibit."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dibit.engine.holdings import Holdings
from dibit.engine.ledger import Ledger, Row
from dibit.engine.module_stack import ModuleStack, function_name
from dibit.residuals.base import Residual, Saved
from dibit.residuals.exact import Exact, LosslessForm


class Accounting:
    """Books for whoever tracks the pass; without a ledger it does nothing.

    Attributes:
        row: of the operation that a rule is running for.
    """

    def __init__(self, ledger: Ledger | None, holdings: Holdings, stack: ModuleStack) -> None:
        self.ledger, self.holdings, self.stack = ledger, holdings, stack
        self.row: Row | None = None
        self._chunk: object = None
        self._operations: dict[tuple[str, str], int] = {}  # so far in this chunk
        self._copied: set[Any] = set()  # parameters that autocast has copied in this pass
        self._saved: list[weakref.ref[Exact]] = []  # what the running rule has saved; dead if its graph is gone

    def begin_chunk(self, program: object) -> None:
        """Begin a chunk of a program on edges: its operations share the ledger's rows of the other chunks.

        Args:
            program: its name; `None`: what follows belongs to no chunk.
        """
        self._chunk = program
        self._operations.clear()

    def _row(self, function: Any, how: str, shape: tuple[int, ...]) -> Row:
        module, operation = self.stack.module, function_name(function)
        row = Row(module, operation, how, shape)
        if self._chunk is not None:
            self._operations[module, operation] = number = self._operations.get((module, operation), 0) + 1
            row.chunk = self._chunk, module, operation, number
        return row

    def open(self, function: Any) -> None:
        """Begin a row for an operation that a rule takes."""
        if self.ledger is not None:
            self.row = self.ledger.add(self._row(function, "", ()))

    def close(self, declined: bool) -> None:
        """The rule has ended; if it declined, its row is removed."""
        row, self.row = self.row, None
        if self.ledger is not None and row is not None:
            if declined:
                self.ledger.rows.remove(row)
            else:
                self._count(row)
        self._saved.clear()

    def saved_by_rule(self, kept: Exact) -> None:
        """The running rule saves this tensor, which `note` or `kept` may enter before or after."""
        if self.row is not None:
            self._saved.append(weakref.ref(kept))

    def _count(self, row: Row) -> None:
        """Enter tensors that the rule has saved, but entered neither by `note` nor by `kept`."""
        assert self.ledger is not None
        for reference in self._saved:
            kept = reference()
            if kept is not None and not self.holdings.held(kept.x):
                before = row.kept
                self.ledger.kept_tensor(row, kept.x)
                if row.kept > before:
                    row.how = row.how or "exact"

    @contextmanager
    def entering(self, row: Row | None) -> Iterator[None]:
        """A block whose entries go into this row; `None`: nowhere."""
        before, self.row = self.row, row
        try:
            yield
        finally:
            self.row = before

    def replaced(self, residual: Saved, x: Tensor) -> None:
        """The running operation keeps x, which the model returns, in the place of a residual that was noted."""
        if self.ledger is not None and self.row is not None:
            self.ledger.dropped(residual.tensors)
            self.ledger.kept_tensor(self.row, x)
            self.row.how = "reference (returned)"

    def note(self, residual: Residual | Any) -> Any:
        """Enter a residual under the operation that is running."""
        if self.ledger is not None and self.row is not None:
            self.row.how = f"{self.row.how}; {residual.how}" if self.row.how else residual.how
            for x in residual.tensors:
                if not self.holdings.held(x):
                    self.ledger.kept_tensor(self.row, x)
        return residual

    def kept(self, *tensors: Tensor, how: str = "") -> None:
        """The running operation keeps these tensors as they are; `how` names their form."""
        if self.ledger is not None and self.row is not None:
            self.row.how = how or self.row.how
            for x in tensors:
                self.ledger.kept_tensor(self.row, x)

    def plain(self, *saved: Tensor | int | None, low: torch.dtype | None, cached: bool) -> None:
        """What the running operation would keep without Dibit: tensors, or bytes that only it would allocate.

        Args:
            saved: a tensor that autocast would convert counts as its copy in `low`.
            low: the dtype that autocast converts to; `None`: it converts nothing.
            cached: autocast converts each parameter only once.
        """
        if self.ledger is None or self.row is None:
            return
        for x in saved:
            if isinstance(x, int):
                self.row.plain += x
            elif x is not None and low not in (None, x.dtype):
                if not cached or self.holdings.key(x) not in self._copied:
                    self._copied.add(self.holdings.key(x))
                    self.row.plain += x.numel() * low.itemsize
            elif x is not None and not self.holdings.held(x):
                self.ledger.plain_tensor(self.row, x)
                self.row.shape = self.row.shape or tuple(x.shape)

    def saved(self, x: Tensor, kept: LosslessForm) -> None:
        """An operation of torch saves x itself, in this form."""
        if self.ledger is not None:
            row = self.ledger.add(self._row(self.stack.function, kept.how, tuple(x.shape)))
            self.ledger.plain_tensor(row, x)
            for form in kept.leaves:
                if not self.holdings.held(form.x):
                    self.ledger.kept_tensor(row, form.x)

    def end(self, outputs: Iterable[Tensor]) -> None:
        """The pass has ended with these outputs."""
        if self.ledger is not None:
            self.ledger.close(outputs)
        self.begin_chunk(None)
        self._copied.clear()
