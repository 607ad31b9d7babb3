"""Sums over the edges of a graph, and their gradients, from node tensors alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dibit._torch.huge_pages import empty
from dibit.codec import ops
from dibit.edges.plan import Plan
from dibit.engine.forward_pass import ForwardPass
from dibit.residuals.base import load, save
from dibit.residuals.constant_csr import ConstantCSR
from dibit.rules.common import first_order
from dibit.rules.product import factor


@dataclass(frozen=True)
class EdgeGraph(ConstantCSR):
    """The constant matrix of a graph that is given by its edges, in compressed rows of A and of A^T.

    Attributes:
        parts: pointers and columns of A, pointers and columns of A^T; then, where the edges have weights, those of A
            and of A^T.
    """

    def product(self, x: Tensor) -> Tensor:
        crow, col = self.parts[:2]
        y = torch.zeros(self.shape[0], x.shape[1], dtype=x.dtype, device=x.device)
        ops.add_neighbours(y, crow, col, self.parts[4] if len(self.parts) > 4 else None, x.contiguous())
        return y.div_(crow.diff().clamp_(min=1)[:, None]) if self.mean else y

    def transposed_product(self, dy: Tensor) -> Tensor:
        crow, col = self.parts[2:4]
        weights = self.parts[5] if len(self.parts) > 4 else None
        if self.mean:  # the weights take the division, E of them instead of N x D
            share = self.parts[0].diff().clamp_(min=1).to(dy.dtype).reciprocal_().index_select(0, col)
            weights = share if weights is None else share.mul_(weights)
        dx = empty((self.shape[1], dy.shape[1]), dy.dtype, dy.device).zero_()
        ops.add_neighbours(dx, crow, col, weights, dy.contiguous())
        return dx


def edge_graph(forward: ForwardPass, plan: Plan, weights: Tensor | None = None) -> EdgeGraph:
    """The matrix of a graph; `weights` (E,) in the caller's order."""
    there, back = plan.by_target, plan.by_source
    parts: tuple[Tensor, ...] = (there.crow, there.col, back.crow, back.col)
    for part in parts:
        forward.holdings.hold(part, "the plan of a graph")
    if weights is not None:
        own = there.values(weights), back.values(weights)
        forward.kept(*(x for x in own if not forward.held(x)), how="weights of edges, twice")
        parts += own
    return EdgeGraph(parts, torch.Size((plan.targets, plan.sources)), False)


class EdgeSum(torch.autograd.Function):
    """out += A x in place, A a graph with constant weights: rows are added in the order of the edges, as torch does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor, graph: EdgeGraph) -> Tensor:
        ctx.hops, ctx.fresh_result = 1, True
        ctx.mark_dirty(out)
        save(ctx, *graph.parts)
        ctx.graph, ctx.matrix, ctx.shape = graph.with_tensors(()), graph.pattern, x.shape
        rows = x.detach().reshape(x.shape[0], -1)
        weights = graph.parts[4] if len(graph.parts) > 4 else None
        ops.add_neighbours(out.view(out.shape[0], -1), *graph.parts[:2], weights, rows.contiguous())
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        dx = None
        graph = ctx.graph.with_tensors(load(ctx))
        if ctx.needs_input_grad[0]:
            dx = graph.transposed_product(dy.reshape(dy.shape[0], -1)).reshape(ctx.shape)
        return dx, dy if ctx.needs_input_grad[1] else None, None


@dataclass(frozen=True)
class Ends:
    """The edges of a graph by their targets and by their sources, with their places in the caller's order.

    Attributes:
        there, back: pointers and columns of the compressed rows, and the order unless it is the caller's.
    """

    there: tuple[Tensor, ...]
    back: tuple[Tensor, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return *self.there, *self.back

    def with_tensors(self, tensors: Sequence[Tensor]) -> Ends:
        cut = len(self.there)
        return replace(self, there=tuple(tensors[:cut]), back=tuple(tensors[cut:]))


class ScaledSum(torch.autograd.Function):
    """out[n] += sum of scale[e] x[source of e] over the edges e to n, in place: attention.

    Kept: the scale exactly, x by a code as d scale = <dY, x> is linear in it; both gradients are sums over edges again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, out: Tensor, kept_x: Any, kept_scale: Any, ends: Ends
    ) -> Tensor:
        ctx.mark_dirty(out)
        save(ctx, kept_x, kept_scale, *ends.tensors)
        ctx.ends, ctx.shapes = Ends((None,) * len(ends.there), (None,) * len(ends.back)), (x.shape, scale.shape)
        rows, heads = _by_head(x.detach(), scale.detach())
        _add_scaled(out.view(out.shape[0], *rows.shape[1:]), ends.there, heads, rows)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        kept_x, kept_scale, *tensors = load(ctx)
        ends, (x_shape, scale_shape) = ctx.ends.with_tensors(tensors), ctx.shapes
        dx = dscale = None
        heads = scale_shape[1:].numel()
        dy_rows = dy.reshape(dy.shape[0], heads, -1).contiguous()
        if ctx.needs_input_grad[0]:
            scale = kept_scale.value().reshape(-1, heads).contiguous()
            dx = empty((x_shape[0], *dy_rows.shape[1:]), dy.dtype, dy.device).zero_()
            _add_scaled(dx, ends.back, scale, dy_rows)
            dx = dx.reshape(x_shape)
        if ctx.needs_input_grad[1]:
            x = kept_x.value().to(dy.dtype).reshape(x_shape[0], *dy_rows.shape[1:]).contiguous()
            crow, col, *order = ends.there
            dscale = ops.edge_products(crow, col, order[0] if order else None, dy_rows, x).reshape(scale_shape)
        return dx, dscale, dy if ctx.needs_input_grad[2] else None, None, None, None


def _by_head(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, ...) as (M, H, C) and scale (E, ..., 1) as (E, H)."""
    heads = scale.shape[1:].numel()
    return x.reshape(x.shape[0], heads, -1).contiguous(), scale.reshape(-1, heads).contiguous()


def _add_scaled(out: Tensor, rows: tuple[Tensor, ...], scale: Tensor, x: Tensor) -> None:
    crow, col, *order = rows
    ops.add_scaled(out, crow, col, order[0] if order else None, scale, x)


def edge_sum(forward: ForwardPass, x: Tensor, out: Tensor, plan: Plan, weights: Tensor | None) -> Tensor:
    """out += A x, for a rule: constant weights (E,) or none."""
    graph = edge_graph(forward, plan, weights)
    y: Tensor = EdgeSum.apply(x, out, graph)
    if x.dim() == 2 and x.requires_grad:
        forward.aggregated(y, graph, x)
    return y


def scaled_sum(forward: ForwardPass, x: Tensor, scale: Tensor, out: Tensor, plan: Plan) -> Tensor:
    """The same for a scale (E, ..., 1) that may need a gradient."""
    there, back = plan.by_target.tensors, plan.by_source.tensors
    for part in (*there, *back):
        forward.holdings.hold(part, "the plan of a graph")
    kept_x = factor(forward, x, scale, x.numel()) if scale.requires_grad else None
    kept_scale = forward.exact(scale) if x.requires_grad else None
    forward.plain(scale if x.requires_grad else None)
    if scale.requires_grad:
        forward.plain(scale.shape[0] * x.shape[1:].numel() * x.element_size())
    return ScaledSum.apply(x, scale, out, kept_x, kept_scale, Ends(there, back))
