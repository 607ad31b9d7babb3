"""A walk through the graph behind a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def nodes(y: Tensor) -> Iterator[Any]:
    """All nodes of autograd's graph of y, each once."""
    stack, seen = [y.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [following for following, _ in node.next_functions]
            yield node
