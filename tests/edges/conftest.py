"""What all tests of sums over edges share."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from dibit.edges import functions
from dibit.edges.deferred import PendingCall


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small gathers are deferred, too."""
    monkeypatch.setattr(functions, "MIN_DEFERRED_ELEMENTS", 1)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls that were deferred, and then made after all."""
    calls: list[Any] = []
    make = PendingCall.make

    def counted(cell: PendingCall) -> Tensor:
        if cell.value is None:
            calls.append(cell.function)
        return make(cell)

    monkeypatch.setattr(PendingCall, "make", counted)
    return calls
