"""Sums over the edges of a graph, and their gradients, from node tensors alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dibit._torch.huge_pages import empty
from dibit.codec import ops
from dibit.edges.plan import Plan, SortedEdges
from dibit.engine.forward_pass import ForwardPass
from dibit.residuals.base import load, released, save
from dibit.residuals.constant_csr import ConstantCSR
from dibit.residuals.derived import Aggregated
from dibit.residuals.exact import Reference
from dibit.rules.common import first_order
from dibit.rules.product import factor


@dataclass(frozen=True)
class EdgeGraph(ConstantCSR):
    """The matrix of a graph that is given by its edges: a one for each of them.

    Attributes:
        parts: pointers and columns of A, pointers and columns of A^T.
    """

    count = 4

    def product(self, x: Tensor) -> Tensor:
        y = empty((self.shape[0], x.shape[1]), x.dtype, x.device).zero_()
        self.add_to(y, x)
        return y.div_(self.parts[0].diff().clamp_(min=1)[:, None]) if self.mean else y

    def add_to(self, out: Tensor, x: Tensor, weights: Tensor | None = None) -> None:
        """out += A x, edge by edge in the caller's order; `weights` (E,) in the order of A's rows."""
        crow, col = self.parts[:2]
        ops.add_neighbours(_rows(out), crow, col, weights, _rows(x).contiguous())

    def transposed_product(self, dy: Tensor, weights: Tensor | None = None) -> Tensor:
        """A^T dY; `weights` (E,) in the order of A^T's rows."""
        crow, col = self.parts[2:4]
        if self.mean:  # the edges take the division, E of them instead of N x D
            share = self.parts[0].diff().clamp_(min=1).to(dy.dtype).reciprocal_().index_select(0, col)
            weights = share if weights is None else share.mul_(weights)
        dx = empty((self.shape[1], dy.shape[1]), dy.dtype, dy.device).zero_()
        ops.add_neighbours(dx, crow, col, weights, dy.contiguous())
        return dx


def edge_graph(plan: Plan, counted: Any) -> EdgeGraph:
    """The matrix of a graph; `counted`: see `ConstantCSR`."""
    there, back = plan.by_target, plan.by_source
    return EdgeGraph((there.crow, there.col, back.crow, back.col), plan.shape, False, counted)


def _rows(x: Tensor) -> Tensor:
    """x (N, ...) as (N, D)."""
    return x.reshape(x.shape[0], -1)


class EdgeSum(torch.autograd.Function):
    """out += A x in place, with constant weights: rows are added in the order of the edges, as torch does."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, out: Tensor, graph: EdgeGraph, weights: Tensor | None, kept: Any, back: Any
    ) -> Tensor:
        ctx.hops, ctx.fresh_result = 1, True
        ctx.mark_dirty(out)
        save(ctx, kept, back, *graph.parts)
        ctx.graph, ctx.matrix, ctx.shape = graph.with_tensors(()), graph.pattern, x.shape
        graph.add_to(out, x.detach(), weights)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        dx = None
        kept, back, *parts = load(ctx)
        if ctx.needs_input_grad[0]:
            weights = None if kept is None else kept.value().reshape(-1)
            weights = weights if weights is None or back is None else weights.index_select(0, back)
            dx = ctx.graph.with_tensors(parts).transposed_product(_rows(dy), weights).reshape(ctx.shape)
        return dx, dy if ctx.needs_input_grad[1] else None, None, None, None, None


class ScaledSum(torch.autograd.Function):
    """out[n] += sum of scale[e] x[source of e] over the edges e to n, in place: attention.

    Kept: the scale exactly, x by a code as d scale = <dY, x> is linear in it; both gradients are sums over edges again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, out: Tensor, kept_x: Any, kept_scale: Any, plan: Plan) -> Tensor:
        ctx.mark_dirty(out)
        save(ctx, kept_x, kept_scale)
        ctx.plan, ctx.shapes = plan, (x.shape, scale.shape)
        x, scale = _by_head(x.detach(), scale.detach())
        _add_scaled(out.view(out.shape[0], *x.shape[1:]), plan.by_target, scale, x)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        kept_x, kept_scale = load(ctx)
        plan, (x_shape, scale_shape) = released(ctx, "plan"), ctx.shapes
        dx = dscale = None
        heads = scale_shape[1:].numel()
        rows = dy.reshape(dy.shape[0], heads, -1).contiguous()
        if ctx.needs_input_grad[0]:
            scale = kept_scale.value().reshape(-1, heads).contiguous()
            dx = empty((x_shape[0], *rows.shape[1:]), dy.dtype, dy.device).zero_()
            _add_scaled(dx, plan.by_source, scale, rows)
            dx = dx.reshape(x_shape)
        if ctx.needs_input_grad[1]:
            x = kept_x.value().to(dy.dtype).reshape(x_shape[0], *rows.shape[1:]).contiguous()
            by = plan.by_target
            dscale = ops.edge_products(by.crow, by.col, by.order, rows, x).reshape(scale_shape)
        return dx, dscale, dy if ctx.needs_input_grad[2] else None, None, None, None


class RowSum(torch.autograd.Function):
    """out[index[e]] += rows[e] in place; kept: the index."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, out: Tensor, index: Tensor, kept: Any) -> Tensor:
        ctx.mark_dirty(out)
        save(ctx, kept.x)
        ctx.index = kept.with_tensor(torch.empty(0))
        return out.index_add_(0, index, rows)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (index,) = load(ctx)
        index = ctx.index.with_tensor(index).restore()
        return dy.index_select(0, index), dy if ctx.needs_input_grad[1] else None, None, None


def _by_head(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, ...) as (M, H, C) and scale (E, ..., 1) as (E, H)."""
    heads = scale.shape[1:].numel()
    return x.reshape(x.shape[0], heads, -1).contiguous(), scale.reshape(-1, heads).contiguous()


def _add_scaled(out: Tensor, edges: SortedEdges, scale: Tensor, x: Tensor) -> None:
    ops.add_scaled(out, edges.crow, edges.col, edges.order, scale, x)


def edge_sum(
    forward: ForwardPass, x: Tensor, out: Tensor, plan: Plan, scale: Tensor | None, target: Tensor | None
) -> Tensor:
    """out += A x, for a rule: with constant weights (E, 1), or with ones.

    Args:
        target: the caller's int64 (E,), whose counts divide the sum in a mean; `None` if `out` may not be zero, so that
            the result is not A x.
    """
    graph = edge_graph(plan, None if target is None else forward.holdings.key(target))
    known = target is not None and scale is None and x.dim() == 2
    weights = kept = None
    if scale is not None and x.requires_grad:
        forward.plain(scale)
        kept = forward.exact(scale)
    if scale is not None:
        weights = plan.by_target.values(scale.reshape(-1))
    if not x.requires_grad and not out.requires_grad:
        steady = known and forward.held(x) and forward.lossless.steady(x)
        graph.add_to(out, x, weights)
        if steady:
            forward.sources.derived(out, Aggregated(graph, Reference(x, x.shape)))
        return out
    y: Tensor = EdgeSum.apply(x, out, graph, weights, kept, None if kept is None else plan.by_source.order)
    if known:
        forward.sources.aggregated(y, graph, x)
    return y


def scaled_sum(forward: ForwardPass, x: Tensor, scale: Tensor, out: Tensor, plan: Plan) -> Tensor:
    """The same for a scale (E, ..., 1) that may need a gradient."""
    kept_x = factor(forward, x, scale, x.numel(), copied=True) if scale.requires_grad else None
    kept_scale = forward.exact(scale) if x.requires_grad else None
    forward.plain(scale if x.requires_grad else None)
    return ScaledSum.apply(x, scale, out, kept_x, kept_scale, plan)


def row_sum(forward: ForwardPass, rows: Tensor, out: Tensor, index: Tensor) -> Tensor:
    """out[index[e]] += rows[e], for a rule: plain torch keeps the rows, of which it needs the shape alone."""
    forward.plain(rows, index)
    return RowSum.apply(rows, out, index, forward.pack_index(index))  # type: ignore[no-any-return,no-untyped-call]
