"""Where to cut: the tensors of fewest bytes from which another one can be computed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dibit.recompute.nodes import SMALL, Node

DEEPEST = 24  # operations between a tensor and what it is computed from


class CutSearch:
    """Chooses between keeping a tensor and computing it again from what came before.

    Args:
        free: whether a tensor costs nothing to keep (somebody else holds it, or it is kept already).
        selections: functions whose result is a selection of their first argument's elements.
    """

    def __init__(self, free: Callable[[Tensor], bool], selections: set[Any]) -> None:
        self.free, self._selections = free, selections

    def usable(self, node: Node, x: Tensor) -> bool:
        """Whether something that is kept may rest on x: it was made in this pass, or its content is remembered."""
        return node.root is None or node.root.content is not None or self.free(x)

    def cheapest(self, node: Node, depth: int, memo: dict[Node, Any], top: bool = False) -> dict[Node, None] | None:
        """The cheaper of keeping a node and computing it again; `None` where neither can be done."""
        if node in memo:
            return memo[node]
        x = None if top else node.tensor()
        if x is not None and not self.usable(node, x):
            x = None
        keep: dict[Node, None] | None = {node: None} if x is not None else None
        if x is not None and (node.nbytes < SMALL or self.free(x)):
            memo[node] = keep
            return keep
        again: dict[Node, None] | None = None
        if node.call is not None and depth < DEEPEST:
            again = {}
            for parent in node.parents:
                part = self.cheapest(parent, depth + 1, memo)
                if part is None:
                    again = None
                    break
                again |= part
        if again is not None and keep is not None and self.cost(again) >= node.nbytes:
            again = self.without_detours(again, memo)
        best = keep
        if again is not None and (keep is None or self.cost(again) < node.nbytes):
            best = again
        memo[node] = best
        return best

    def without_detours(self, leaves: dict[Node, None], memo: dict[Node, Any]) -> dict[Node, None]:
        """Drop leaves that the others give anyway: costs were added up as if no leaf served twice."""
        for leaf in list(leaves):
            if leaf.call is None:
                continue
            others: dict[Node, None] | None = {other: None for other in leaves if other is not leaf}
            for parent in leaf.parents:
                part = self.cheapest(parent, 1, memo)
                others = None if part is None or others is None else others | part
            if others is not None and self.cost(others) < self.cost(leaves):
                leaves = others
        return leaves

    def cost(self, leaves: dict[Node, None]) -> float:
        total = 0.0
        for leaf in leaves:
            x = leaf.tensor()
            if x is not None and not self.free(x):
                total += leaf.nbytes * (0.5 if x.dtype == torch.int64 else 1 / 8 if x.dtype == torch.bool else 1)
        return total

    def gathered(self, top: Node | None) -> tuple[Node, list[Node]] | None:
        """What a node's tensor is a selection of, and what the selection needs beside.

        Selections (`index_select`, views, expansions) are linear: of an unbiased estimate of what was selected from
        they give one of the result. The smallest is taken that has less than half the result's bytes.
        """
        node, best = top, None
        beside: dict[Node, None] = {}
        for _ in range(DEEPEST):
            if node is None or top is None or node.call is None or node.call[0] not in self._selections:
                break
            if not node.call[1] or not isinstance(node.call[1][0], Node):
                break  # by keyword: the order does not say which one is selected from
            node, *others = node.parents
            for other in others:
                part = self.cheapest(other, 0, {})
                if part is None:
                    return best
                beside |= part
            smallest = top.nbytes / 2 if best is None else best[0].nbytes
            if node.nbytes < smallest and (source := node.tensor()) is not None and self.usable(node, source):
                best = node, list(beside)
        return best
