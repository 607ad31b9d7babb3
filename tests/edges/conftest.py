"""What all tests of sums over edges share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from dibit.edges import functions
from dibit.edges.deferred import PendingCall
from tests.watched import watched


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small gathers are deferred, too."""
    monkeypatch.setattr(functions, "MIN_DEFERRED_ELEMENTS", 1)


@pytest.fixture
def made() -> Iterator[list[Any]]:
    """The functions of calls that were deferred, and then made after all; `None` for one that was made before."""

    def function(local: dict[str, Any]) -> Any:
        call = local["self"]
        return call.function if call.value is None else None

    with watched(PendingCall.make, note=function) as calls:
        yield calls
