"""Writing the program that computes a node's tensor from the tensors that are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dibit.recompute.nodes import SMALL, Node
from dibit.recompute.program import Program, Shared, Slot


def write_program(node: Node, leaves: Sequence[Node], shared: Shared) -> Program:
    """The operations from these leaves to the node, in order."""
    writer = _Writer(leaves, shared)
    writer.visit(node)
    return Program(len(leaves), tuple(writer.calls))


class _Writer:
    """Puts the operations between the kept tensors and a node in order. (A nested function would be a cycle.)"""

    def __init__(self, leaves: Sequence[Node], shared: Shared) -> None:
        self.leaves, self.shared = len(leaves), shared
        self.slots: dict[Node, int] = {leaf: i for i, leaf in enumerate(leaves)}
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def visit(self, node: Node) -> Slot:
        if node not in self.slots:
            assert node.call is not None
            function, args, kwargs = node.call
            filled = _filled(args, self.visit), _filled(kwargs, self.visit)
            identity = node if node.constant and node.nbytes >= SMALL else None
            if identity is not None:
                self.shared.want(identity)
            self.calls.append((function, *filled, identity))
            self.slots[node] = self.leaves + len(self.calls) - 1
        return Slot(self.slots[node])


def _filled(value: Any, visit: Callable[[Node], Slot]) -> Any:
    if isinstance(value, Node):
        return visit(value)
    if isinstance(value, tuple):
        return tuple(_filled(item, visit) for item in value)
    if isinstance(value, dict):
        return {name: _filled(item, visit) for name, item in value.items()}
    return value
