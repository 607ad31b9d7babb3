"""Linear layers and products with a weight: `F.linear`, `x @ W`, `addmm`.

dX = dY W needs the weight alone and is exact. dW = dY^T X needs the input, which is kept through the codec. That code
enters dW and no other gradient, linearly, so dW is unbiased, and layers with the same input may share one code. A layer
that is fed by an aggregate A x keeps x: dW = (A^T dY)^T x.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from dibit._torch.autocast import copies, low_precision
from dibit._torch.private.tensors import gradient_asked
from dibit.engine.forward_pass import ForwardPass
from dibit.engine.noise.meter import Meter
from dibit.residuals.base import load, save
from dibit.residuals.constant_csr import ConstantCSR
from dibit.residuals.exact import Reference
from dibit.rules import large_outputs
from dibit.rules.common import as_rows, first_order, is_plain_float, own
from dibit.rules.product import bmm
from dibit.rules.registry import rule


class Linear(torch.autograd.Function):
    """y = x W^T + b, W (O, D)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Any,
        low: torch.dtype | None,
        meter: Meter | None,
    ) -> Tensor:
        ctx.hops, ctx.fresh_result = 0, True
        save(ctx, residual, weight if ctx.needs_input_grad[0] else None)
        _measure(ctx, meter)
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        return own(large_outputs.linear(*copies(low, x, weight, bias)))

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        residual, weight = load(ctx)
        x_dtype, w_dtype, b_dtype = ctx.dtypes
        rows = as_rows(dy)
        dx = (
            input_gradient(ctx, large_outputs.mm(dy, weight.to(dy.dtype))).to(x_dtype)
            if ctx.needs_input_grad[0]
            else None
        )
        dw = weight_gradient(ctx, residual, rows).to(w_dtype) if ctx.needs_input_grad[1] else None
        db = bias_gradient(ctx, rows).to(b_dtype) if ctx.needs_input_grad[2] else None
        return dx, dw, db, None, None, None


class AggregatedLinear(torch.autograd.Function):
    """y = (A x) W^T + b, joined to x: one product A^T dY serves dW = (A^T dY)^T x and dX = (A^T dY) W.

    The aggregate is not kept, and its own gradient is never formed; whoever asked for that one gets an error.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        aggregate: Tensor,
        watched: Any,
        residual: Any,
        graph: ConstantCSR,
        low: torch.dtype | None,
        meter: Meter | None,
    ) -> Tensor:
        ctx.hops = ctx.residual_hops = 1
        ctx.fresh_result = True
        _measure(ctx, meter)
        save(ctx, residual, weight, *graph.parts)
        ctx.graph, ctx.aggregate, ctx.matrix = graph.with_tensors(()), watched, graph.pattern
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        return own(large_outputs.linear(*copies(low, aggregate, weight, bias)))

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        aggregate = ctx.aggregate()
        if aggregate is not None and gradient_asked(aggregate):
            raise RuntimeError(
                "the gradient of an aggregate was asked for after a linear layer had used it; ask before (hook or "
                "retain_grad right after the aggregation), or leave that module uncompressed."
            )
        residual, weight, *parts = load(ctx)
        x_dtype, w_dtype, b_dtype = ctx.dtypes
        z = ctx.graph.with_tensors(parts).transposed_product(dy)
        dw = (
            weight_gradient(ctx, residual, z).to(w_dtype) if ctx.needs_input_grad[1] else None
        )  # before dX is written over z
        dx = (
            input_gradient(ctx, large_outputs.mm_over(z, weight.to(z.dtype))).to(x_dtype)
            if ctx.needs_input_grad[0]
            else None
        )
        db = bias_gradient(ctx, dy).to(b_dtype) if ctx.needs_input_grad[2] else None
        return dx, dw, db, None, None, None, None, None, None


class MatMul(torch.autograd.Function):
    """y = alpha x W (+ beta c), W (D, O)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        c: Tensor | None,
        beta: float,
        alpha: float,
        residual: Any,
        low: torch.dtype | None,
        meter: Meter | None,
    ) -> Tensor:
        ctx.fresh_result = True
        save(ctx, residual, weight if ctx.needs_input_grad[0] else None)
        _measure(ctx, meter)
        ctx.scale = beta, alpha
        ctx.types = x.dtype, weight.dtype, None if c is None else (c.dtype, c.shape)
        x, weight, c = copies(low, x, weight, c)
        return own(large_outputs.mm(x, weight) if c is None else torch.addmm(c, x, weight, beta=beta, alpha=alpha))

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        residual, weight = load(ctx)
        beta, alpha = ctx.scale
        x_dtype, w_dtype, c_type = ctx.types
        scaled = dy if alpha == 1 else dy * alpha
        dx = None
        if ctx.needs_input_grad[0]:
            dx = input_gradient(ctx, large_outputs.mm(scaled, weight.T.to(dy.dtype))).to(x_dtype)
        dw = weight_gradient(ctx, residual, as_rows(scaled)).T.to(w_dtype) if ctx.needs_input_grad[1] else None
        dc = None
        if ctx.needs_input_grad[2]:
            dc = (dy if beta == 1 else dy * beta).sum_to_size(c_type[1]).to(c_type[0])
        return dx, dw, dc, None, None, None, None, None


def weight_gradient(ctx: Any, residual: Any, dy: Tensor) -> Tensor:
    """dY^T X (O, D) for dY (N, O); if this pass is measured, its noise is recorded."""
    dw: Tensor = residual.outer(dy) if ctx.meter is None else ctx.meter.weight_gradient(residual, dy)
    return dw


def bias_gradient(ctx: Any, dy: Tensor) -> Tensor:
    """The sum of dY (N, O) over its rows: (O,); if this pass is measured, it is recorded as signal."""
    db = dy.sum(0)
    if ctx.meter is not None:
        ctx.meter.bias_gradient(db)
    return db


def input_gradient(ctx: Any, dx: Tensor) -> Tensor:
    """dX; if this pass is measured, its square is recorded."""
    if ctx.meter is not None:
        ctx.meter.input_gradient(dx)
    return dx


def _measure(ctx: Any, meter: Meter | None) -> None:
    ctx.meter = meter
    ctx.measured = meter.key if meter is not None else ""


def keep_input(forward: ForwardPass, x: Tensor, weight: Tensor) -> Any:
    """The residual of a product's input, and what the plain product would keep."""
    forward.plain(x if weight.requires_grad else None, weight if x.requires_grad else None)
    if x.requires_grad and not forward.held(weight):
        forward.note(Reference(weight, weight.shape))  # a weight that was itself computed: exact, as in the plain model
    # One draw may serve several weights, but not one that depends on x itself: then it would be used twice on a path.
    return forward.keep(x, leaf=weight.is_leaf) if weight.requires_grad else None


def _meter(forward: ForwardPass, kept: Any) -> Meter | None:
    if kept is None or not forward.measuring.active:
        return None
    return forward.measuring.meter(getattr(kept, "key", "") or forward.measuring.operation("input"))


def _source(forward: ForwardPass, y: Tensor) -> tuple[ConstantCSR, Tensor] | None:
    """If y was computed as A @ x, no hook or retain_grad needs y's gradient, and the recipe allows it: (A, x)."""
    if forward.config is None or forward.config.inputs != "reference":
        return None
    return forward.sources.source(y)


@rule(kind="linear inputs", autocast=low_precision, exact=True)
def linear(forward: ForwardPass, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not (is_plain_float(input, weight) and weight.dim() == 2 and weight.requires_grad):
        return NotImplemented  # a frozen weight keeps no input, in plain torch too
    if weight.is_leaf and (found := _source(forward, aggregate := forward.holdings.origin(input))) is not None:
        graph, x = found
        forward.plain(input)
        residual = forward.keep(x, leaf=True, copied=True)
        # detached: otherwise autograd would walk through the aggregation as well, with zeros
        watched = weakref.ref(aggregate)
        return AggregatedLinear.apply(
            x, weight, bias, input.detach(), watched, residual, graph, forward.low, _meter(forward, residual)
        )
    kept = keep_input(forward, input, weight)
    return Linear.apply(input, weight, bias, kept, forward.low, _meter(forward, kept))


@low_precision
def matmul(forward: ForwardPass, input: Tensor, other: Tensor, *, out: Any = None) -> Any:
    if isinstance(other, Tensor) and not other.is_leaf and (other.dim() != 2 or other.numel() >= input.numel()):
        return bmm(forward, input, other, out=out)  # two activations
    if out is not None or not is_plain_float(input, other) or not other.requires_grad:
        return NotImplemented
    if input.dim() < 2 or other.dim() != 2:
        return NotImplemented
    kept = keep_input(forward, input, other)
    return MatMul.apply(input, other, None, 1, 1, kept, forward.low, _meter(forward, kept))


@low_precision
def addmm(
    forward: ForwardPass,
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: Any = None,
) -> Any:
    if out is not None or not (is_plain_float(input, mat1, mat2) and mat2.requires_grad):
        return NotImplemented
    kept = keep_input(forward, mat1, mat2)
    return MatMul.apply(mat1, mat2, input, beta, alpha, kept, forward.low, _meter(forward, kept))
