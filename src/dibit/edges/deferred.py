"""A gather that has not been made: a tensor with a shape, a dtype and a place in autograd's graph, and without memory.

Dibit's own functions read what it stands for (`Cell`). Everything else makes it: functions of torch that the mode sees
(`dibit.edges.functions`), those that it does not see by `Deferred.__torch_function__`, and code of C++ by
`Deferred.__torch_dispatch__`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dibit._torch.private.tensors import natively, without_memory
from dibit._torch.storage_identity import version

Run = Callable[[Any, Any, Any], Any]


class Way:
    """How a gradient that arrives at a deferred tensor itself goes on: held by its node in autograd's graph.

    Attributes:
        edge: of what was made of it, which leads to the roots.
        call: function and arguments, where it was made below autograd, which then has no graph of it.
    """

    def __init__(self) -> None:
        self.edge: GradientEdge | None = None
        self.call: tuple[Any, tuple[Any, ...], list[int]] | None = None


class Cell:
    """What a deferred tensor stands for.

    Attributes:
        function, args: the call of torch that makes it; deferred tensors may be among the arguments.
        roots: the tensors that it is made of, which are not deferred.
        run: runs a call as the pass does.
        value: what the call has given; `None` while nobody has needed it.
        used: a sum was computed without it, so that a gradient may go past it.
    """

    def __init__(self, function: Any, args: tuple[Any, ...], roots: tuple[Tensor, ...], run: Run) -> None:
        self.function, self.args, self.roots, self.run = function, args, roots, run
        self.value: Tensor | None = None
        self.way = Way()
        self.used = self.making = False
        self.dependents: list[weakref.ref[Cell]] = []
        for x in args:
            if type(x) is Deferred:
                x.cell.dependents.append(weakref.ref(self))

    def make(self) -> Tensor:
        """Run the call, once: with gradients, as where it was given."""
        if self.value is None:
            self.making = True
            with torch.enable_grad():
                self.value = self.run(self.function, real(self.args), {})
            if self.value.requires_grad:
                self.way.edge = get_gradient_edge(self.value)
            self._forget()
            for reference in self.dependents:  # whoever gets the value may write to it
                if (dependent := reference()) is not None and not dependent.making:
                    dependent.make()
        return self.value

    def make_below(self) -> Tensor:
        """The same below autograd."""
        if self.value is None:
            args = real(self.args, below=True)
            self.value = self.function(*args)
            self.way.call = self.function, args, [version(x) for x in args if isinstance(x, Tensor)]
            self._forget()
        return self.value

    def _forget(self) -> None:
        self.args, self.roots, self.run = (), (), _made_already


class Deferred(Tensor):
    """See above; `defer` makes it."""

    cell: Cell

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in DESCRIBES:
            return natively(func, args, kwargs or {})
        return func(*real(args), **real(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*real(args, below=True), **real(kwargs or {}, below=True))


class Defer(torch.autograd.Function):
    """The place of a deferred tensor in autograd's graph. Only what Dibit does not see sends a gradient here."""

    @staticmethod
    def forward(ctx: Any, cell: Cell, shape: torch.Size, like: Tensor, *roots: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.way, ctx.needed = cell.way, [root.requires_grad for root in roots]
        return _wrapper(cell, shape, like)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
        none = (None,) * 3
        if grad is None:
            return *none, *(None for _ in ctx.needed)
        way: Way = ctx.way
        nodes = [GradientEdge(*node) for node in ctx.next_functions if node[0] is not None]
        if way.edge is not None:
            found = iter(torch.autograd.grad([way.edge], nodes, [grad], retain_graph=True, allow_unused=True))
        elif way.call is not None:
            found = iter(_again(way, grad))
        else:
            raise RuntimeError(
                "a gradient arrived at node features that were gathered by edges and never looked at; use them by "
                "functions of torch, or leave that module uncompressed."
            )
        return *none, *(next(found) if needed else None for needed in ctx.needed)


def _again(way: Way, grad: Tensor) -> tuple[Tensor, ...]:
    """The gradient of what was made below autograd, by making it again."""
    assert way.call is not None
    function, args, versions = way.call
    if versions != [version(x) for x in args if isinstance(x, Tensor)]:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor "
            "that was gathered by edges."
        )
    with torch.enable_grad():
        given = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in args]
        value = function(*given)
        leaves = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
        return torch.autograd.grad(value, leaves, grad)


class Reveal(torch.autograd.Function):
    """The content of a deferred tensor, joined to its own node: whoever asked it for its gradient gets that."""

    @staticmethod
    def forward(ctx: Any, deferred: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad, None


def _wrapper(cell: Cell, shape: torch.Size, like: Tensor) -> Deferred:
    made: Deferred = without_memory(Deferred, shape, like.dtype, like.device)
    made.cell = cell
    return made


def defer(cell: Cell, shape: torch.Size, like: Tensor) -> Deferred:
    """A deferred tensor of this shape, with the dtype and device of another."""
    if torch.is_grad_enabled() and any(root.requires_grad for root in cell.roots):
        return Defer.apply(cell, shape, like.detach(), *cell.roots)
    return _wrapper(cell, shape, like)


def watch(deferred: Deferred) -> None:
    """Somebody asks for the gradient of a deferred tensor itself: from now on all goes through its node.

    Raises:
        RuntimeError: a sum has gone past it already.
    """
    cell = deferred.cell
    if cell.used:
        raise RuntimeError(
            "the gradient of node features that were gathered by edges was asked for after they had been summed up; "
            "ask right after the gather (register_hook or retain_grad), or leave that module uncompressed."
        )
    value = cell.make()
    if value.requires_grad:
        with torch.enable_grad():
            cell.value = Reveal.apply(deferred, value.detach())


def real(value: Any, below: bool = False) -> Any:
    """Arguments with deferred tensors made; `below` autograd, within a kernel."""
    if type(value) is Deferred:
        return value.cell.make_below().detach() if below else value.cell.make()
    if type(value) in (tuple, list):
        return type(value)(real(item, below) for item in value)
    if type(value) is dict:
        return {name: real(item, below) for name, item in value.items()}
    return value


def deferred_in(args: Any, kwargs: Any = None) -> Deferred | None:
    """The first deferred tensor among arguments, or in a list among them."""
    for x in args:
        if type(x) is Deferred:
            return x
        if type(x) in (tuple, list):
            for item in x:
                if type(item) is Deferred:
                    return item
    return None if not kwargs else deferred_in(tuple(kwargs.values()))


def _made_already(*call: Any) -> Any:
    raise AssertionError("a deferred tensor is made once")


_PROPERTIES = (
    "shape dtype device layout ndim requires_grad is_leaf grad grad_fn is_cpu is_cuda is_sparse is_quantized is_meta "
    "is_nested is_mkldnn itemsize nbytes"
)
_METHODS = "size dim ndimension numel nelement element_size is_floating_point is_complex is_contiguous stride __len__"
# What tells of a tensor without reading it.
DESCRIBES = frozenset(
    (
        *(getattr(Tensor, name).__get__ for name in _PROPERTIES.split()),
        *(getattr(Tensor, name) for name in _METHODS.split()),
        *(torch.numel, torch.is_floating_point, torch.is_complex),
    )
)
# Who asks for the gradient of a tensor.
ASKS = frozenset((Tensor.register_hook, Tensor.retain_grad, Tensor.register_post_accumulate_grad_hook))
