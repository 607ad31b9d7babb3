"""Rules for DGL's functions on the edges of a graph: `gspmm` (messages, reduced by target) and `gsddmm` (edges' rows).

DGL's own code computes both passes, on a context that `Context` stands for. What it saves there goes through Dibit's
residuals: the factors of a product, each by a draw of its own, as every gradient that DGL computes is linear in one of
them. A sum of node features with constant weights keeps nothing, and a linear layer behind it keeps the features.

Nothing here imports DGL: `dibit.hooks.dgl` brings its functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dibit.engine.forward_pass import ForwardPass
from dibit.engine.model_state import Rule
from dibit.residuals.base import load, save
from dibit.residuals.constant_csr import ConstantCSR
from dibit.rules.common import first_order, is_plain_float, running_config, without_reduction
from dibit.rules.product import LEAST_ROW, end_of_dot, factor, stays_exact


class Context:
    """Stands for autograd's context in a forward and a backward of DGL's."""

    def __init__(self, needs_input_grad: tuple[bool, ...] = (False,) * 6) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors


@dataclass(frozen=True)
class Graph(ConstantCSR):
    """The matrix of a DGL graph, a one for each edge: DGL's kernels multiply by it.

    Attributes:
        index: DGL's graph index, which nobody can change.
        gspmm: DGL's `GSpMM`.
    """

    index: Any = None
    gspmm: Any = None
    count = 0

    @property
    def pattern(self) -> tuple[Any, ...]:
        return (id(self.index),)

    def product(self, x: Tensor) -> Tensor:
        y = self._sum(self.index, x)
        return y.div_(self._degrees(x)) if self.mean else y

    def transposed_product(self, dy: Tensor) -> Tensor:
        return self._sum(self.index.reverse(), dy / self._degrees(dy) if self.mean else dy)

    def divides_by(self, divisor: Tensor) -> bool:
        degrees = self._degrees(divisor)
        return divisor.shape == degrees.shape and torch.equal(divisor, degrees)

    def _sum(self, index: Any, x: Tensor) -> Tensor:
        y: Tensor = self.gspmm.forward(Context(), index, "copy_lhs", "sum", x.detach(), None)
        return y

    def _degrees(self, like: Tensor) -> Tensor:
        return self._sum(self.index, like.new_ones(self.shape[1], 1)).clamp_(min=1)


class OnEdges(torch.autograd.Function):
    """A function of DGL's, each tensor that it saves replaced by a residual."""

    @staticmethod
    def forward(ctx: Any, keeper: Callable[[Sequence[Any]], list[Any]], function: Any, *args: Any) -> Tensor:
        context = Context(ctx.needs_input_grad[2:])
        y: Tensor = function.forward(context, *args)
        save(ctx, *keeper(context.saved_tensors))
        context.saved_tensors = ()
        ctx.function, ctx.context = function, context
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        context = copy(ctx.context)
        context.saved_tensors = tuple(None if part is None else part.value() for part in load(ctx))
        return None, None, *ctx.function.backward(context, dy)


class Extreme(torch.autograd.Function):
    """Maxima or minima by target of the rows of sources (X) or edges (Y): gspmm with copy_lhs or copy_rhs.

    DGL saves the number of the node or edge that it has taken each element from. Kept: its place among the edges of the
    target, in a byte or two.
    """

    @staticmethod
    def forward(ctx: Any, forward: ForwardPass, function: Any, gidx: Any, op: str, reduce_op: str, x: Tensor) -> Tensor:
        y, edge = extreme(function, gidx, op, reduce_op, x)
        places = places_of(gidx, edge.view(edge.shape[0], -1))
        forward.plain(edge.numel() * edge.element_size())
        forward.kept(places, how=f"winner in {places.element_size()} B")
        save(ctx, places)
        ctx.of = gidx, op, x.shape
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (places,) = load(ctx)
        gidx, op, shape = ctx.of
        return None, None, None, None, None, gradient_of_extreme(gidx, op, shape, places, dy)


def extreme(function: Any, gidx: Any, op: str, reduce_op: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """The extremes by target, and the number of the edge that each element is from, by DGL's `GSpMM`."""
    context = Context()
    if op == "copy_lhs":  # times one: the same bits, and DGL tells the edge, too
        ones = x.new_ones((gidx.num_edges(0),) + (1,) * (x.dim() - 1))
        y = function.forward(context, gidx, "mul", reduce_op, x, ones)
    else:
        y = function.forward(context, gidx, op, reduce_op, None, x)
    return y, context.saved_tensors[-1]


def gradient_of_extreme(gidx: Any, op: str, shape: torch.Size, places: Tensor, dy: Tensor) -> Tensor:
    """The gradient of what `extreme` took (`shape`), from `places_of` its edges: (N, D)."""
    pointers, sources, edges = _by_target(gidx)
    dx = dy.new_zeros(shape[0], shape[1:].numel())
    rows, ids = dy.reshape(places.shape), sources if op == "copy_lhs" else edges
    for start, stop in _chunks(places):
        at = places[start:stop].long().add_(pointers[start:stop, None]).clamp_(max=len(ids) - 1)
        index = ids[at].mul_((pointers[start + 1 : stop + 1] > pointers[start:stop])[:, None])
        dx.scatter_add_(0, index.long(), rows[start:stop])  # DGL gives what comes to a node without edges to row 0
    return dx.reshape(shape)


def places_of(gidx: Any, edge: Tensor) -> Tensor:
    """The places (N, D) of edges (N, D) among those of their targets; 0 where a target has none."""
    pointers, _, edges = _by_target(gidx)
    at = torch.empty_like(edges)
    at[edges] = torch.arange(len(edges), dtype=edges.dtype)
    degrees = pointers.diff()
    most = int(degrees.max())
    small = torch.uint8 if most <= 256 else torch.int16 if most < 2**15 else torch.int32
    places = torch.empty(edge.shape, dtype=small)
    for start, stop in _chunks(edge):
        own = at[edge[start:stop]].sub_(pointers[start:stop, None])
        places[start:stop] = own.mul_((degrees[start:stop] > 0)[:, None])
    return places


def _by_target(gidx: Any) -> tuple[Tensor, Tensor, Tensor]:
    """DGL's own arrays of edges sorted by target: pointers (N + 1,), sources (E,) and numbers of the edges (E,)."""
    pointers, sources, edges = gidx.adjacency_matrix_tensors(0, True, "csr")[2:]
    return pointers, sources, edges if len(edges) else torch.arange(len(sources), dtype=sources.dtype)


def _chunks(x: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of rows of x (N, D) of about a million elements."""
    step = max(1, (1 << 20) // max(x.shape[1], 1))
    return ((start, min(start + step, x.shape[0])) for start in range(0, x.shape[0], step))


@dataclass(frozen=True)
class Operand:
    """What is kept in the place of an operand, where DGL saves it; `None`: its backward does not read it."""

    x: Tensor | None
    kept: Any


def _keeper(forward: ForwardPass, *operands: Operand) -> Callable[[Sequence[Any]], list[Any]]:
    """Residuals for what DGL saves: those of its operands, each once; exact ones for everything else."""

    def keep(saved: Sequence[Any]) -> list[Any]:
        forward.plain(*saved)
        left = [operand for operand in operands if operand.x is not None]
        parts = []
        for x in saved:
            found = next((operand for operand in left if operand.x is x), None)
            if found is not None:
                left.remove(found)
            parts.append(found.kept if found is not None else None if x is None else forward.exact(x))
        return parts

    return keep


def _served(*operands: Tensor | None) -> bool:
    """Whether a rule takes these operands: plain floats on the CPU, where DGL's kernels give the same bits again."""
    there = [x for x in operands if x is not None]
    return bool(there) and is_plain_float(*there) and all(x.device.type == "cpu" and x.numel() for x in there)


def gspmm(function: Any, call: Callable[..., Tensor]) -> Rule:
    """The rule of messages that are reduced by target.

    Args:
        function: DGL's `GSpMM`.
        call: calls it as DGL does.
    """

    def rule(forward: ForwardPass, gidx: Any, op: str, reduce_op: str, X: Tensor | None, Y: Tensor | None) -> Any:
        if not _served(X, Y):
            return NotImplemented
        if op == "copy_lhs" and reduce_op == "sum":
            return _aggregate(forward, gidx, X, function, call)
        if reduce_op != "sum" and op in ("copy_lhs", "copy_rhs"):
            return _extreme(forward, function, gidx, op, reduce_op, X if op == "copy_lhs" else Y)
        needs = [x is not None and x.requires_grad for x in (X, Y)]
        if X is None or Y is None or not any(needs) or op not in ("mul", "add") or reduce_op != "sum":
            return NotImplemented
        kept_x = kept_y = None
        if op == "mul":
            config = running_config(forward)
            try:
                messages = Y.shape[0] * torch.broadcast_shapes(X.shape[1:], Y.shape[1:]).numel()
            except RuntimeError:
                return NotImplemented  # DGL raises its own error
            parts = [(x, by, n) for x, by, n in ((X, Y, X.numel()), (Y, X, messages)) if by.requires_grad]
            if config.lossless or all(stays_exact(forward, x, n, without_reduction(config)) for x, _, n in parts):
                return NotImplemented
            kept_x, kept_y = (
                factor(forward, x, by, n) if by.requires_grad else None
                for x, by, n in ((X, Y, X.numel()), (Y, X, messages))
            )
        keep = _keeper(forward, Operand(X, kept_x), Operand(Y, kept_y))
        with forward.writes.reading():
            return OnEdges.apply(keep, function, gidx, op, reduce_op, X, Y)

    return rule


def _aggregate(forward: ForwardPass, gidx: Any, x: Any, function: Any, call: Callable[..., Tensor]) -> Tensor:
    """A x: nothing is kept, in plain torch neither; a linear layer behind it may keep x."""
    y = call(gidx, "copy_lhs", "sum", x, None)
    graph = Graph((), torch.Size((y.shape[0], x.shape[0])), False, None, gidx, function)
    if x.requires_grad and x.dim() == 2:
        forward.sources.aggregated(y, graph, x)
    forward.keeps_nothing()
    return y


def _extreme(forward: ForwardPass, function: Any, gidx: Any, op: str, reduce_op: str, x: Tensor | None) -> Any:
    if x is None or not x.requires_grad or x.dim() < 2 or not gidx.num_edges(0) or reduce_op not in ("max", "min"):
        return NotImplemented
    formats = gidx.formats()
    if "csc" not in (*formats["created"], *formats["not created"]):
        return NotImplemented  # the edges are not to be had sorted by target
    with forward.writes.reading():
        return Extreme.apply(forward, function, gidx, op, reduce_op, x)


def gsddmm(function: Any) -> Rule:
    """The rule of rows of edges that are computed from those of nodes and edges; `function`: DGL's `GSDDMM`."""

    def rule(
        forward: ForwardPass, gidx: Any, op: str, X: Tensor | None, Y: Tensor | None, lhs_target: str, rhs_target: str
    ) -> Any:
        config = running_config(forward)
        if X is None or Y is None or not _served(X, Y) or op not in ("mul", "dot") or config.lossless:
            return NotImplemented
        pairs = [(x, by) for x, by in ((X, Y), (Y, X)) if by.requires_grad]
        if not pairs or all(stays_exact(forward, x, 0, without_reduction(config)) for x, _ in pairs):
            return NotImplemented
        kept_x, kept_y = (None if not by.requires_grad else _end(forward, x, by, op) for x, by in ((X, Y), (Y, X)))
        keep = _keeper(forward, Operand(X, kept_x), Operand(Y, kept_y))
        with forward.writes.reading():
            return OnEdges.apply(keep, function, gidx, op, X, Y, lhs_target, rhs_target)

    return rule


def _end(forward: ForwardPass, x: Tensor, by: Tensor, op: str) -> Any:
    """The residual of an operand, of which the gradient of the other one is computed."""
    wide = op == "dot" and not by.is_leaf and x.shape[-1] >= LEAST_ROW
    return end_of_dot(forward, x, by) if wide else factor(forward, x, by, x.numel())
