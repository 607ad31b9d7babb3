"""Recognising on the tape what a product or a quotient is for.

A mean over neighbours may be made of a sum and a quotient_of, as PyTorch Geometric does on a GPU.

There `torch.sparse.mm` has no mean: what it gives is divided by `ptr[1:] - ptr[:-1]`, at least 1. The tape knows how
that divisor came about, so no element of it has to be looked at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dibit._torch.spellings import torch_functions
from dibit.recompute.nodes import Node
from dibit.recompute.recorder import Tape

_DIVISIONS = torch_functions("div", in_place=True)
_AT_LEAST = torch_functions("clamp clamp_min", in_place=True)
_DIFFERENCES = torch_functions("sub", in_place=True)
_SCATTERS = torch_functions("scatter_add", in_place=True)
_EXPANSIONS = torch_functions("expand")
_SHAPES = torch_functions("view reshape unsqueeze")
_RECIPROCALS = torch_functions("rsqrt reciprocal", in_place=True)
_POWERS = torch_functions("pow", in_place=True)
_DIVIDED = torch_functions("rdiv")
_DEEPEST = 4  # changes of shape between a reciprocal and the product that it enters
_UPPER, _LOWER = slice(1, None), slice(None, -1)


def quotient_of(tape: Tape, y: Tensor) -> tuple[Node, Node] | None:
    """Dividend and divisor of y, if it is the quotient of two tensors."""
    call = _call(tape.nodes.get(tape.key(y)), _DIVISIONS)
    if call is None or len(call) != 2 or not all(isinstance(part, Node) for part in call):
        return None
    return call  # type: ignore[return-value]


def is_degree_of(divisor: Node, crow: Node | None) -> bool:
    """Whether a divisor is the number of elements of each row that `crow` (N + 1,) points to, at least 1."""
    clamped = _at_least_one(divisor)
    if crow is None or clamped is None or not _is_column(divisor):
        return False
    shaped = _call(clamped, _SHAPES)
    difference = None if shaped is None else _call(shaped[0], _DIFFERENCES)
    if difference is None or len(difference) != 2:
        return False
    ends = [_call(part, {Tensor.__getitem__}) for part in difference]
    return ends == [(crow, _UPPER), (crow, _LOWER)]


def is_count_of(divisor: Node, rows: Node | None) -> bool:
    """Whether a divisor is how often each number comes in `rows` (E,), at least 1: ones that were added up by it."""
    column: Any = divisor
    while (expanded := _call(column, _EXPANSIONS)) is not None:
        column = expanded[0]
    shaped = _call(column, _SHAPES)
    clamped = None if shaped is None else _at_least_one(shaped[0])
    if rows is None or clamped is None or not _is_column(column):
        return False
    added = _call(clamped, _SCATTERS)
    if added is None or len(added) != 4 or added[1] not in (0, -1) or added[2] is not rows:
        return False
    return _call(added[0], {torch.zeros}) is not None and _call(added[3], {torch.ones}) is not None


def _at_least_one(node: Any) -> Any:
    """What was clamped to at least 1, and to nothing else, to give this; `None` if it came about otherwise."""
    call = _call(node, _AT_LEAST)
    return call[0] if call is not None and call[1:] == (1,) and "max" not in node.call[2] else None


def _is_column(node: Node) -> bool:
    """Whether a tensor has one number a row: a row (1, N) would divide columns."""
    return len(node.shape) == 2 and node.shape[1] == 1


def made_by_reciprocal(tape: Tape, x: Tensor) -> bool:
    """Whether x is a reciprocal or an inverse root, but for its shape."""
    node = tape.nodes.get(tape.key(x))
    for _ in range(_DEEPEST):
        if node is None or node.call is None:
            return False
        function, args = node.call[0], (*node.call[1], *node.call[2].values())
        if function in _RECIPROCALS:
            return True
        if function in _POWERS:
            return len(args) > 1 and isinstance(args[1], int | float) and args[1] < 0
        if function in _DIVIDED:
            return True
        if function in _DIVISIONS:
            return bool(args) and not isinstance(args[0], Node)
        if function not in _SHAPES or not args or not isinstance(args[0], Node):
            return False
        node = args[0]
    return False


def _call(node: Any, expected: Any) -> tuple[Any, ...] | None:
    """Arguments of the call that made a node, if it was one of these."""
    if not isinstance(node, Node) or node.call is None or node.call[0] not in expected:
        return None
    return (*node.call[1], *node.call[2].values())
