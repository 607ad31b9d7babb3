"""How each section is shown: a module a section, each with the same six names.

TITLE: its heading. CLAIM: what the papers claim. `sentences(results)`: what was found, in words, to be read first.
`facts(results)`: the numbers of the summary. `tables(results)`. `pictures(results)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from dibit.reproduce.show import accuracy, blocks, distribution, memory, tuned, variance
from dibit.reproduce.tables import Fact, Table
from dibit.tools.figures import Picture


class Show(Protocol):
    """What each module of this package is."""

    TITLE: str
    CLAIM: str

    def facts(self, results: dict[str, Any]) -> Sequence[Fact]: ...
    def sentences(self, results: dict[str, Any]) -> Sequence[str]: ...
    def tables(self, results: dict[str, Any]) -> Sequence[Table]: ...
    def pictures(self, results: dict[str, Any]) -> Sequence[Picture]: ...


SHOW: dict[str, Show] = {
    "memory": memory,
    "blocks": blocks,
    "variance": variance,
    "distribution": distribution,
    "accuracy": accuracy,
    "tuned": tuned,
}
