"""The plan of a graph: its edges in the order of their targets, and in that of their sources."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dibit.codec import ops
from dibit.codec.fingerprint import fingerprint
from dibit.engine.forward_pass import ForwardPass
from dibit.engine.model_state import ModelState


@dataclass(frozen=True)
class SortedEdges:
    """Edges in the order of the nodes at one of their ends, as compressed rows.

    Attributes:
        crow: pointers (N + 1,), int32 where that has room for E.
        col: nodes at the other ends (E,).
        order: integers (E,), the caller's number of each sorted edge; `None` if the caller's edges are sorted already.
    """

    crow: Tensor
    col: Tensor
    order: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.crow, self.col) if self.order is None else (self.crow, self.col, self.order)

    def values(self, x: Tensor) -> Tensor:
        """x (E, ...), given in the caller's order, in the sorted order."""
        return x if self.order is None else x.index_select(0, self.order)


def sort(by: Tensor, count: int, other: Tensor) -> SortedEdges:
    """Sort edges by the nodes at one end; `other` (E,) has those at the other end.

    Raises:
        IndexError: a node is not among the `count`.
    """
    crow, order = ops.sort_edges(by, count)
    if bool((by[1:] >= by[:-1]).all()):
        return SortedEdges(crow, other.to(order.dtype), None)
    return SortedEdges(crow, other.index_select(0, order).to(order.dtype), order)


@dataclass(frozen=True)
class Plan:
    """The edges of a graph, sorted in both directions.

    Attributes:
        by_target: for sums over the edges that come in; compressed rows (targets, sources).
        by_source: for their gradients, sums over the edges that go out; compressed rows (sources, targets).
    """

    by_target: SortedEdges
    by_source: SortedEdges

    @property
    def shape(self) -> torch.Size:
        """Targets and sources."""
        return torch.Size((self.by_target.crow.numel() - 1, self.by_source.crow.numel() - 1))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.by_target.tensors + self.by_source.tensors


def plan_of(source: Tensor, target: Tensor, sources: int, targets: int) -> Plan:
    """The plan of a graph whose edge e goes from source[e] to target[e], int64 (E,).

    Args:
        sources, targets: how many nodes there are on each side.

    Raises:
        IndexError: an edge has no node at one of its ends.
    """
    return Plan(sort(target, targets, source), sort(source, sources, target))


class Plans:
    """The plans that a pass uses; the others of its model go when it ends.

    Args:
        known: of the model, by the content of the edges; both ends of them, or their targets alone.
    """

    def __init__(self, known: dict[Any, Plan | SortedEdges]) -> None:
        self._known = known
        self._seen: dict[Any, Plan | SortedEdges] = {}  # by the identities of this pass
        self._prints: dict[Any, Any] = {}

    def find(self, forward: ForwardPass, source: Tensor, target: Tensor, sources: int, targets: int) -> Plan | None:
        """The plan of a graph; `None` where an edge has no node at one of its ends."""
        found = self._found(forward, ((source, sources), (target, targets)), _plan)
        return found if isinstance(found, Plan) else None

    def by_target(self, forward: ForwardPass, target: Tensor, targets: int) -> SortedEdges | None:
        """Edges sorted by target, with the caller's numbers of the edges as columns; `None` as in `find`."""
        found = self._found(forward, ((target, targets),), _numbered)
        return found if isinstance(found, SortedEdges) else None

    def _found(
        self, forward: ForwardPass, ends: tuple[tuple[Tensor, int], ...], make: Callable[..., Plan | SortedEdges]
    ) -> Plan | SortedEdges | None:
        """What `make` gives for ends of edges, each with its number of nodes: of this pass, of earlier ones, or new."""
        holdings = forward.holdings
        seen = tuple((holdings.key(index), count) for index, count in ends)
        if seen not in self._seen:
            first = ends[0][0]
            prints = tuple(
                (self._print(index, key), count) for (index, count), (key, _) in zip(ends, seen, strict=True)
            )
            content = prints, first.device, first.numel()
            found = self._known.get(content)
            if found is None:
                if not all(_within(index, count) for index, count in ends):
                    return None
                found = self._known[content] = make(*ends)
            for part in found.tensors:
                holdings.hold(part, "the plan of a graph")
            self._seen[seen] = found
        return self._seen[seen]

    def _print(self, index: Tensor, key: Any) -> Any:
        if key not in self._prints:
            self._prints[key] = int(fingerprint(index))
        return self._prints[key]

    def end(self) -> None:
        """The pass has ended."""
        used = {id(plan) for plan in self._seen.values()}
        for content, plan in list(self._known.items()) if used else ():
            if id(plan) not in used:
                self._known.pop(content, None)  # another thread may have done it
        self._seen.clear()
        self._prints.clear()


def _plan(source: tuple[Tensor, int], target: tuple[Tensor, int]) -> Plan:
    return plan_of(source[0], target[0], source[1], target[1])


def _numbered(target: tuple[Tensor, int]) -> SortedEdges:
    crow, order = ops.sort_edges(*target)
    return SortedEdges(crow, order, None)


def _within(index: Tensor, count: int) -> bool:
    low, high = index.aminmax()
    return bool((low >= 0) & (high < count))


_of: weakref.WeakKeyDictionary[ModelState, dict[Any, Plan | SortedEdges]] = weakref.WeakKeyDictionary()


def known_plans(state: ModelState) -> dict[Any, Plan | SortedEdges]:
    """The plans of a compressed model, by the content of the edges."""
    return _of.setdefault(state, {})
