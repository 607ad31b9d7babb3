"""Scores of edges: sums over features of what both ends give, one number a head, and their gradients.

*Scalar products* <a[i], b[j]> (Transformer): each gradient is a sum over the other ends, of which codes are kept.
*Additive scores* <w, leaky_relu(a[i] + b[j])> (GATv2): with one bit an element for the sign all gradients follow from
the sums over edges of the score's gradient times the slope; a and b themselves enter that of w alone.

Scores are computed by torch's own operations, some thousand edges at a time, which gives its bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dibit._torch.huge_pages import empty
from dibit.codec import ops
from dibit.edges import programs
from dibit.edges.deferred import Deferred, PendingCall
from dibit.edges.plan import Plan
from dibit.engine.forward_pass import ForwardPass
from dibit.residuals.base import load, released, save
from dibit.rules.common import first_order, running_config, without_reduction
from dibit.rules.product import end_of_dot

_CHUNK_ON_GPU = 1 << 18  # edges at a time, where `programs.CHUNK` would leave a GPU idle


def evaluate(call: PendingCall, start: int, stop: int) -> Tensor:
    """Rows start ... stop of the deferred tensor that a call makes: (stop - start, ...)."""
    if call.function is Tensor.index_select:
        x, _, index = call.args
        return x.detach().index_select(0, index[start:stop])  # type: ignore[no-any-return]
    args = [evaluate(x.pending, start, stop) if type(x) is Deferred else x for x in call.args]
    return call.function(*(x.detach() if isinstance(x, Tensor) else x for x in args))  # type: ignore[no-any-return]


def summed(call: PendingCall, edges: int, shape: tuple[int, ...]) -> Tensor:
    """The deferred tensor that a call makes, summed over its last dimension: (E, *shape)."""
    like = call.roots[0]
    out = torch.empty((edges, *shape), dtype=like.dtype, device=like.device)
    chunk = programs.CHUNK if out.device.type == "cpu" else _CHUNK_ON_GPU
    with torch.no_grad():
        for start in range(0, edges, chunk):
            out[start : start + chunk] = evaluate(call, start, start + chunk).sum(-1)
    return out


class ScalarProducts(torch.autograd.Function):
    """s[e, h] = <a[i, h], b[j, h]> for the edge e from j to i."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scores: Tensor, kept_a: Any, kept_b: Any, plan: Plan) -> Tensor:
        save(ctx, kept_a, kept_b)
        ctx.plan, ctx.shapes = plan, (a.shape, b.shape)
        return scores

    @staticmethod
    @first_order
    def backward(ctx: Any, ds: Tensor) -> tuple[Any, ...]:
        kept_a, kept_b = load(ctx)
        plan = released(ctx, "plan")
        ds = ds.contiguous()
        da = db = None
        if ctx.needs_input_grad[0]:
            da = _sums(plan.by_target, ds, kept_b.value().to(ds.dtype), ctx.shapes[0])
        if ctx.needs_input_grad[1]:
            db = _sums(plan.by_source, ds, kept_a.value().to(ds.dtype), ctx.shapes[1])
        return da, db, None, None, None, None


def _sums(edges: Any, scale: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
    out = empty(shape, scale.dtype, scale.device).zero_()
    ops.add_scaled(out, edges.crow, edges.col, edges.order, scale, x.contiguous())
    return out


class AdditiveScores(torch.autograd.Function):
    """s[e, h] = <w[h], leaky_relu(a[i, h] + b[j, h])> for the edge e from j to i."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        w: Tensor,
        scores: Tensor,
        signs: Tensor,
        slope: float,
        kept_a: Any,
        kept_b: Any,
        plan: Plan,
    ) -> Tensor:
        save(ctx, kept_a, kept_b, w, signs)
        ctx.plan, ctx.slope, ctx.shapes = plan, slope, (a.shape, b.shape)
        return scores

    @staticmethod
    @first_order
    def backward(ctx: Any, ds: Tensor) -> tuple[Any, ...]:
        kept_a, kept_b, w, signs = load(ctx)
        plan, slope = released(ctx, "plan"), ctx.slope
        ds, grads, dw = ds.contiguous(), [], None
        for kept, edges, shape in zip((kept_a, kept_b), (plan.by_target, plan.by_source), ctx.shapes, strict=True):
            sums = empty(shape, ds.dtype, ds.device).zero_()
            ops.add_signed(sums, edges.crow, edges.order, signs, ds, slope)
            if ctx.needs_input_grad[2]:
                own = (kept.value().to(ds.dtype) * sums).sum(0)
                dw = own if dw is None else dw + own
            grads.append(sums.mul_(w.reshape(shape[1:])))
        return (
            *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=False)),
            (None if dw is None else dw.reshape(w.shape)),
            *(None,) * 6,
        )


def scalar_products(forward: ForwardPass, a: Tensor, b: Tensor, scores: Tensor, plan: Plan) -> Tensor:
    """For a rule: scores (E, H) that were computed of a (N, H, C) and b (M, H, C)."""
    kept_a = end_of_dot(forward, a, b) if b.requires_grad else None
    kept_b = end_of_dot(forward, b, a) if a.requires_grad else None
    return ScalarProducts.apply(a, b, scores, kept_a, kept_b, plan)  # type: ignore[no-any-return,no-untyped-call]


def additive_scores(
    forward: ForwardPass, a: Tensor, b: Tensor, w: Tensor, slope: float, scores: Tensor, plan: Plan
) -> Tensor:
    """For a rule: scores (E, H) that were computed of a (N, H, C), b (M, H, C) and w (..., H, C)."""
    each = scores.shape[0] * a.shape[1:].numel() * a.element_size()
    forward.plain(each, each if w.requires_grad else None)
    edges = plan.by_target
    signs = ops.edge_signs(edges.crow, edges.col, edges.order, a.detach().contiguous(), b.detach().contiguous())
    forward.kept(signs, how="1-bit mask")
    kept_a = kept_b = None
    if w.requires_grad:
        config = without_reduction(running_config(forward))
        kept_a, kept_b = (forward.keep(x, leaf=w.is_leaf, config=config, copied=True) for x in (a, b))
    return AdditiveScores.apply(a, b, w, scores, signs, slope, kept_a, kept_b, plan)  # type: ignore[no-any-return,no-untyped-call]
