"""Rows that the loss cannot reach: where only some rows of the output enter the loss, others get no gradient.

How far a residual lies from the output is read off autograd's graph at the end of each forward pass: the number of
aggregations on the way, as long as everything else there works row by row. The next pass keeps the rows alone that the
loss reaches in as many steps along the edges, and is checked against its own graph when it ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dibit._torch.private.autograd import operation_of, saved_dim
from dibit._torch.storage_identity import Alive, version
from dibit.residuals.constant_csr import pattern

# Operations without a rule whose gradient stays in its row, by `_word`; the rules enter those of their functions.
_ROW_BY_ROW = {"accumulategrad", "tocopy", "sub", "neg"}
_LAST_DIMENSION = {"LogSoftmax", "Softmax"}


def row_by_row(name: str) -> None:
    """Enter a function of torch whose gradient stays in its row, for passes in which it runs without its rule.

    Args:
        name: of the function, such as "leaky_relu", or of the operation in autograd's graph where that has another.
    """
    _ROW_BY_ROW.add(_word(name))


def _word(name: str) -> str:
    """The function `leaky_relu` and the operation `LeakyRelu` by the same word."""
    return name.replace("_", "").lower()


@dataclass
class LossReach:
    """What one model's passes have shown.

    Attributes:
        steps: by residual, aggregations between it and the output; only of residuals that see rows alone.
    """

    steps: dict[str, int] = field(default_factory=dict)
    _alive: Alive = field(default_factory=Alive, repr=False)
    _of: Any = field(default=None, repr=False)
    _loss_rows: Tensor | None = field(default=None, repr=False)
    _rows: list[tuple[Tensor, int]] = field(default_factory=list, repr=False)

    def rows_within(self, key: str, matrix: Tensor, loss_rows: Tensor, rows: int) -> tuple[Tensor, int] | None:
        """Which rows of a residual the loss reaches, bool (rows,), and their number; `None`: all, for all we know."""
        steps = self.steps.get(key)
        if steps is None or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] != rows:
            return None
        crow, col = matrix.crow_indices(), matrix.col_indices()
        of = pattern(crow, col), version(crow), version(col), version(loss_rows)
        if self._of != of or self._loss_rows is not loss_rows:
            self._alive.clear()
            self._alive.hold(crow)
            self._alive.hold(col)
            first = torch.zeros(rows, dtype=torch.bool, device=crow.device)
            first[loss_rows] = True
            self._of, self._loss_rows, self._rows = of, loss_rows, [(first, int(first.sum()))]
        while len(self._rows) <= steps:
            last = self._rows[-1][0]
            more = last.clone()
            more[col[last.repeat_interleave(crow.diff())]] = True
            self._rows.append((more, int(more.sum())))
        return self._rows[steps]

    def observe(self, outputs: Iterable[Tensor], matrix: Tensor | None, assumed: dict[str, int]) -> None:
        """Read the distances off a finished forward pass.

        Raises:
            RuntimeError: a residual has left out rows that the loss reaches in this pass: the model took another way.
        """
        found = distances(outputs, None if matrix is None else pattern(matrix.crow_indices(), matrix.col_indices()))
        for key, steps in assumed.items():
            if (true := found.get(key, -1)) is None or true > steps:
                raise RuntimeError(
                    f"the operations between {key.partition(':')[0]!r} and the output differ from those of the pass "
                    "before, but dibit.batch(model, loss_rows=...) needs them to be the same; leave loss_rows out for "
                    "such a model."
                )
        self.steps = {key: steps for key, steps in found.items() if steps is not None}

    def state_dict(self) -> dict[str, Tensor]:
        """The distances by residual, int64 ()."""
        return {key: torch.tensor(steps) for key, steps in self.steps.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the distances of `state_dict`."""
        self.steps = {key: int(steps) for key, steps in state.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {"steps": dict(self.steps), "_alive": Alive(), "_of": None, "_loss_rows": None, "_rows": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def distances(outputs: Iterable[Tensor], matrix: tuple[Any, ...] | None) -> dict[str, int | None]:
    """By residual: the most aggregations by this matrix to any output; `None` where other operations mix rows.

    Args:
        outputs: of the model.
        matrix: its pattern.
    """
    steps: dict[Any, int | None] = {x.grad_fn: 0 for x in outputs if x.grad_fn is not None}
    found: dict[str, int | None] = {}
    for node in _in_order(steps):
        here = steps[node]
        own = _aggregations(node, matrix)
        there = None if here is None or own is None else here + own
        for residual, _ in getattr(node, "layout", ()):
            if key := getattr(residual, "key", ""):
                # a fused aggregation has gone back over the edges before its residual is used: `ctx.residual_hops`
                used = there if getattr(node, "residual_hops", 0) else here
                found[key] = _further(found[key], used) if key in found else used
        for following, _ in node.next_functions:
            if following is not None:
                steps[following] = _further(steps[following], there) if following in steps else there
    return found


def _further(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else max(a, b)


def _in_order(starts: Iterable[Any]) -> Iterator[Any]:
    """All nodes of a graph, each after everything that leads to it."""
    order: list[Any] = []
    seen: set[Any] = set()
    for start in list(starts):
        stack = [(start, False)]
        while stack:
            node, left = stack.pop()
            if left:
                order.append(node)
            elif node not in seen:
                seen.add(node)
                stack.append((node, True))
                stack += [(n, False) for n, _ in node.next_functions if n is not None and n not in seen]
    return reversed(order)


def _aggregations(node: Any, matrix: tuple[Any, ...] | None) -> int | None:
    """Steps along the edges that a gradient takes in this node; `None` where it may reach any row.

    An `autograd.Function` says it itself, in its forward pass: `ctx.hops`, 0 or 1; of 1, also along whose edges, by
    `ctx.matrix`, a matrix's pattern.
    """
    hops: int | None = getattr(node, "hops", None)
    if hops is not None:
        return hops if hops == 0 or (matrix is not None and getattr(node, "matrix", None) == matrix) else None
    name = operation_of(node)
    if _word(name) in _ROW_BY_ROW:
        return 0
    if name in _LAST_DIMENSION:
        return 0 if saved_dim(node) in (1, 2**64 - 1, -1) else None
    return None
