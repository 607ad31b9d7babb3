"""Programs: a tensor as the operations that made it, run again in the backward pass to the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dibit._torch.autocast import exact_dtypes
from dibit.recompute.repeatable import IN_PLACE


@dataclass(frozen=True)
class Slot:
    """An earlier result of a program, by its place."""

    at: int


@dataclass(frozen=True)
class Program:
    """Operations in order; slots count the leaves first, then the operations.

    Attributes:
        leaves: how many there are.
        calls: function, arguments, keyword arguments, and the identity under which a constant result is shared.
    """

    leaves: int
    calls: tuple[tuple[Any, Any, Any, Any], ...]

    def run(self, leaves: Sequence[Tensor], shared: Shared) -> Tensor:
        """Compute the last result again, bit for bit."""
        results: list[Any] = list(leaves)
        with torch.no_grad(), exact_dtypes(leaves[0].device if leaves else torch.device("cpu")):
            for function, args, kwargs, identity in self.calls:
                value = None if identity is None else shared.get(identity)
                if value is None:
                    args, kwargs = _filled(args, results), _filled(kwargs, results)
                    if function in IN_PLACE:
                        args = (args[0].clone(), *args[1:])
                    value = function(*args, **kwargs)
                    if identity is not None:
                        shared.put(identity, value)
                results.append(value)
        return results[-1]


class Shared:
    """Constants that several programs of one pass compute (indices, weights), held from the first to the last use."""

    def __init__(self) -> None:
        self.wanted: dict[Any, int] = {}
        self.values: dict[Any, Tensor] = {}

    def want(self, identity: Any) -> None:
        self.wanted[identity] = self.wanted.get(identity, 0) + 1

    def get(self, identity: Any) -> Tensor | None:
        left = self.wanted[identity] = self.wanted.get(identity, 0) - 1
        value = self.values.get(identity)
        if left <= 0:
            self.values.pop(identity, None)
        return value

    def put(self, identity: Any, value: Tensor) -> None:
        if self.wanted.get(identity, 0) > 0:
            self.values[identity] = value


def _filled(value: Any, results: Sequence[Tensor]) -> Any:
    if isinstance(value, Slot):
        return results[value.at]
    if isinstance(value, tuple):
        return tuple(_filled(item, results) for item in value)
    if isinstance(value, dict):
        return {name: _filled(item, results) for name, item in value.items()}
    return value
