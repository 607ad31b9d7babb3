"""The plan of a graph: its edges in the order of their targets, and in that of their sources."""

from __future__ import annotations

import weakref
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

    def __init__(self, known: dict[Any, Any]) -> None:
        self._known = known
        self._seen: dict[Any, Any] = {}  # by the identities of this pass
        self._prints: dict[Any, Any] = {}

    def find(self, forward: ForwardPass, source: Tensor, target: Tensor, sources: int, targets: int) -> Plan | None:
        """The plan of a graph; `None` where an edge has no node at one of its ends."""
        holdings = forward.holdings
        seen = holdings.key(source), holdings.key(target), sources, targets
        if seen not in self._seen:
            prints = self._print(source, seen[0]), self._print(target, seen[1])
            content = *prints, source.device, source.numel(), sources, targets
            plan = self._known.get(content)
            if plan is None:
                if not (_within(source, sources) and _within(target, targets)):
                    return None
                plan = self._known[content] = plan_of(source, target, sources, targets)
            for part in plan.tensors:
                holdings.hold(part, "the plan of a graph")
            self._seen[seen] = plan
        return self._seen[seen]  # type: ignore[no-any-return]

    def by_target(self, forward: ForwardPass, target: Tensor, targets: int) -> SortedEdges | None:
        """Edges sorted by target, with the caller's numbers of the edges as columns; `None` as in `find`."""
        holdings = forward.holdings
        seen = holdings.key(target), targets
        if seen not in self._seen:
            content = self._print(target, seen[0]), target.device, target.numel(), targets
            edges = self._known.get(content)
            if edges is None:
                if not _within(target, targets):
                    return None
                crow, order = ops.sort_edges(target, targets)
                edges = self._known[content] = SortedEdges(crow, order, None)
            for part in edges.tensors:
                holdings.hold(part, "the plan of a graph")
            self._seen[seen] = edges
        return self._seen[seen]  # type: ignore[no-any-return]

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


def _within(index: Tensor, count: int) -> bool:
    low, high = index.aminmax()
    return bool((low >= 0) & (high < count))


_of: weakref.WeakKeyDictionary[ModelState, dict[Any, Any]] = weakref.WeakKeyDictionary()


def known_plans(state: ModelState) -> dict[Any, Any]:
    """The plans of a compressed model, by the content of the edges."""
    return _of.setdefault(state, {})
