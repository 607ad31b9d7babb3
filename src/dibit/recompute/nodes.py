"""How a tensor came about: the nodes that the tape is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from dibit._torch.private.tensors import TensorWeakRef
from dibit._torch.storage_identity import version

SMALL = 2048  # bytes below which a tensor is simply kept


class Node:
    """How one tensor came about; holds no tensor.

    Attributes:
        ref: the tensor, while somebody else keeps it.
        version: of its content.
        shape: of the tensor.
        nbytes: of the tensor itself, not of what it is a view of; expanded dimensions count once.
        call: function and arguments, tensors among them as nodes; `None` where the tape does not know.
        constant: it requires no gradient.
        role: who it is to the model, where somebody else owns the memory; empty for what this pass has made.
        content: of such a tensor, its fingerprint when it was read; `None` where nothing can rest on it.
        base: of a view of such a tensor, the tensor's node.
        parents: the nodes among the call's arguments.
    """

    __slots__ = ("base", "call", "constant", "content", "nbytes", "parents", "ref", "role", "shape", "version")

    def __init__(self, x: Tensor, call: tuple[Any, Any, Any] | None) -> None:
        self.ref, self.version, self.shape, self.nbytes = TensorWeakRef(x), version(x), x.shape, nbytes(x)
        self.call, self.constant = call, not x.requires_grad
        self.parents = () if call is None else tuple(nodes_in((call[1], call[2])))
        self.role = ""
        self.content: Any = None
        self.base: Node | None = None

    @property
    def root(self) -> Node | None:
        """The node whose content was remembered, where somebody else owns the memory."""
        return self if self.role else self.base

    def tensor(self) -> Tensor | None:
        """The tensor, if it still exists unchanged."""
        x = self.ref()
        return x if x is not None and version(x) == self.version else None


def nbytes(x: Tensor) -> int:
    """Bytes of the distinct elements of a strided tensor."""
    count = x.element_size()
    for size, stride in zip(x.shape, x.stride(), strict=True):
        if stride or not size:
            count *= size
    return count


def nodes_in(value: Any) -> Iterator[Node]:
    """All nodes in nested arguments."""
    if isinstance(value, Node):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from nodes_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from nodes_in(item)
