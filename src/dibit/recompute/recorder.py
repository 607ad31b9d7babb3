"""The tape: how each tensor of a forward pass came about, so that some need not be kept.

A message-passing layer makes E x H and E x C tensors from N x H ones: gathers, sums, a softmax over neighbours. The
tape notes cheap, deterministic operations and holds no tensor. Where a tensor must be kept, it looks for a cut: earlier
tensors of fewer bytes from which the same operations give the same bits again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dibit._torch.private import modes
from dibit._torch.private.tensors import TensorWeakRef
from dibit._torch.storage_identity import storage_key, strided
from dibit._torch.user_objects import is_a
from dibit.recompute.cut import CutSearch
from dibit.recompute.nodes import SMALL, Node
from dibit.recompute.program import Program, Shared
from dibit.recompute.program_writer import write_program
from dibit.recompute.repeatable import (
    AUTOCAST,
    CREATED,
    IN_PLACE,
    LIKE,
    PURE,
    SAVES_RESULT,
    SELECTIONS,
    SIZES_ONLY,
    UNIFORM,
    without_option,
)


class Tape:
    """What the operations of one forward pass made, as far as it can be made again.

    Args:
        key: identity of a tensor's content, its storage first.
        free: whether a tensor costs nothing to keep (somebody else holds it, or it is kept already).
        owned: enters role and content of a tensor that is about to be read in its node, if somebody else owns its
            memory.
    """

    def __init__(
        self,
        key: Callable[[Tensor], Any],
        free: Callable[[Tensor], bool],
        owned: Callable[[Node, Tensor], None] = lambda node, x: None,
    ) -> None:
        self.key, self.owned = key, owned
        self.search = CutSearch(free, SELECTIONS)
        self.nodes: dict[Any, Node] = {}
        self.shared = Shared()
        self.cuts: dict[Node, dict[Node, None] | None] = {}  # the best of each node, until something more is kept
        self.running: tuple[Any, Any, Any] | None = None  # the call whose result does not exist yet
        self._held: list[Tensor] = []  # arguments that nobody else may hold

    def clear(self) -> None:
        """End of the pass: nothing more is noted, and no cycle with whoever made the tape is left."""
        self.nodes.clear()
        self.cuts.clear()
        self._held.clear()
        del self.key, self.owned, self.search.free

    def node(self, x: Tensor) -> Node:
        """The node of a tensor that is about to be read; a source if nothing is known of it."""
        key = self.key(x)
        found = self.nodes.get(key)
        if found is not None and found.call is not None and found.call[0] in CREATED and not _as_created(found, x):
            found = None  # a kernel out of torch's sight has filled it
        if found is None:
            found = self.nodes[key] = Node(x, None)
            self.owned(found, x)
        elif found.ref() is None:
            found.ref = TensorWeakRef(x)  # another object on the same content
        return found

    def before(self, function: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any] | None:
        """The call as the tape will note it, tensors as nodes; `None` for what cannot be repeated."""
        if function not in PURE or "out" in kwargs:
            return None
        function, args, kwargs = without_option(function, args, kwargs)
        if function in AUTOCAST and not _on_cpu(args) and modes.autocasts("cuda"):
            return None  # the dtype would differ when it is done again, outside of autocast; on the CPU it does not
        if function in SIZES_ONLY:
            return _made(function, args, kwargs)
        if function in LIKE and len(args) == 2:
            function, args = LIKE[function], (args[0], *args[1].shape)
        try:
            return function, _noded(args, self.node), _noded(kwargs, self.node)
        except TypeError:
            return None

    def after(self, call: tuple[Any, Any, Any] | None, result: Any) -> None:
        """Note what the call gave."""
        if call is not None and type(result) is Tensor and strided(result):
            if call[0] in CREATED:  # defaults may be others when it is done again
                call = call[0], call[1], {**call[2], "dtype": result.dtype, "device": result.device}
            key = self.key(result)
            found = self.nodes.get(key)
            # A result that is one of the arguments' own content (contiguous, to, a full view) keeps its older node.
            if found is None:
                node = self.nodes[key] = Node(result, call)
                root = self._viewed(key[0], node)
                if root is not None and call[0] in IN_PLACE:
                    node.call = None
                    self.owned(node, result)  # no longer the content that was read
                else:
                    node.base = root
            elif found.ref() is None:
                found.ref = TensorWeakRef(result)

    @staticmethod
    def _viewed(storage: int, node: Node) -> Node | None:
        """The root whose memory a result shares, if it is a view of a tensor that somebody else owns."""
        for parent in node.parents:
            if parent.root is not None and (x := parent.ref()) is not None and storage_key(x) == storage:
                return parent.root
        return None

    def made(self, function: Callable[..., Tensor], args: tuple[Any, ...], result: Tensor) -> None:
        """Note what a rule computed by a function of its own that gives the same bits again."""
        for x in args[1:]:
            if isinstance(x, Tensor) and self.key(x) not in self.nodes:
                self._held.append(x)
                self.nodes[self.key(x)] = Node(x, None)  # a seed of our own
        try:
            self.after((function, _noded(args, self.node), {}), result)
        except TypeError:
            return  # a subclass or a layout that the tape does not know

    def saved(self, x: Tensor) -> None:
        """Autograd saves x while a call runs: some operations save their own result before they return it."""
        call = self.running
        if call is not None and call[0] in SAVES_RESULT and self.key(x) not in self.nodes:
            self.nodes[self.key(x)] = Node(x, call)

    def cut(self, x: Tensor, limit: float) -> list[Node] | None:
        """Tensors of fewer bytes than `limit` from which x can be computed; `None` if there are none."""
        node = self.nodes.get(self.key(x))
        if node is None or node.call is None or node.nbytes < SMALL:
            return None
        known = self.cuts.get(node)
        if node not in self.cuts or (known and any(leaf.tensor() is None for leaf in known)):
            memo: dict[Node, Any] = {}
            found = self.search.cheapest(node, 0, memo, top=True)
            self.cuts[node] = None if found is None else self.search.without_detours(found, memo)
        best = self.cuts[node]
        return None if best is None or self.search.cost(best) >= limit else list(best)

    def gathered(self, x: Tensor) -> tuple[Node, list[Node]] | None:
        """What x is a selection of, if that is much smaller, and what the selection needs beside."""
        return self.search.gathered(self.nodes.get(self.key(x)))

    def program(self, x: Tensor, leaves: Sequence[Node]) -> Program:
        """The operations from the kept tensors to x."""
        return write_program(self.nodes[self.key(x)], leaves, self.shared)

    def lose(self, node: Node) -> None:
        """The content that a root had when it was read is not to be had any more."""
        if node.root is not None:
            node.root.content = None
        self.cuts.clear()


def _as_created(node: Node, x: Tensor) -> bool:
    """Whether what `zeros`, `ones`, `full` or `arange` gave still has that content (asked on the CPU alone)."""
    assert node.call is not None
    function, args, kwargs = node.call
    if x.numel() == 0 or x.device.type != "cpu":
        return True
    with torch.no_grad():
        if function in UNIFORM and not x.is_complex():
            low, high = x.aminmax()
            return bool((low == high) & (low == UNIFORM[function]))
        return torch.equal(x, function(*args, **kwargs))


def _on_cpu(args: Any) -> bool:
    found = next((x for x in args if isinstance(x, Tensor)), None)
    return found is None or found.device.type == "cpu"


def _noded(value: Any, node: Callable[[Tensor], Node]) -> Any:
    """Arguments with tensors as nodes; lists become tuples, so that nobody can change them."""
    if is_a(value, Tensor):
        if type(value) not in (Tensor, torch.nn.Parameter) or not strided(value):
            raise TypeError
        return node(value)
    if isinstance(value, tuple | list):
        return tuple(_noded(item, node) for item in value)
    if isinstance(value, dict):
        return {name: _noded(item, node) for name, item in value.items()}
    return value


def _made(function: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any] | None:
    """A call that reads its tensor's dtype and device alone, without the tensor."""
    x, rest = (args[0], args[1:]) if args else (kwargs.get("input"), ())
    if type(x) not in (Tensor, torch.nn.Parameter):
        return None
    name = function.__name__
    options = {"dtype": kwargs.get("dtype") or x.dtype, "device": kwargs.get("device") or x.device}
    size: Any = tuple(x.shape)
    if name.startswith("new_"):
        given = kwargs.get("size", rest[:1] if name == "new_full" else rest)
        size = given[0] if isinstance(given, tuple) and len(given) == 1 and not isinstance(given[0], int) else given
        if name == "new_full":
            size, rest = given[0] if isinstance(given, tuple) else given, rest[1:]
    if isinstance(size, int):
        size = (size,)
    if name.endswith("zeros") or name == "zeros_like":
        return torch.zeros, (tuple(size),), options
    if name.endswith("ones") or name == "ones_like":
        return torch.ones, (tuple(size),), options
    fill = kwargs.get("fill_value", rest[0] if rest else None)
    return None if fill is None or isinstance(fill, Tensor) else (torch.full, (tuple(size), fill), options)
