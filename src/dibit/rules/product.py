"""Products and quotients of two activations: attention times messages, queries times keys, gates.

*Products*: da = dy b and db = dy a. What is kept of a enters only gradients that flow through b, and the other way
round. Each factor has its own independent draw, so both gradients are unbiased. A factor that was gathered from fewer
rows is kept as those rows, once a node and not once an edge. One that can be computed again for less than its codes is
kept exactly.

*Quotients*: da = dy (1 / b) and db = -dy (a / b^2). Of a code of b there is no unbiased 1 / b, so 1 / b and a / b^2 are
encoded themselves, each by its own draw.

Squares, dot products and factors that are scaled by a reciprocal end in norms: there dy is largest where a factor is
smallest, above all in a row of zeros. The error of such a factor is a part of the element, or of its row. So is that of
positive factors with a wide range (`dibit.rules.positive`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dibit._torch.autocast import at_least_single, copies, low_precision
from dibit._torch.huge_pages import empty_like, worth_huge_pages
from dibit.config import Config, Sample
from dibit.engine.forward_pass import ForwardPass
from dibit.recompute.mean_pattern import made_by_reciprocal
from dibit.recompute.nodes import nbytes
from dibit.residuals.base import load, save
from dibit.rules import positive
from dibit.rules.common import (
    MIN_ELEMENTS,
    as_rows,
    eight_bit,
    first_order,
    is_plain_float,
    running_config,
    without_reduction,
)
from dibit.rules.registry import rule
from dibit.rules.relative import keep_relative, keep_signed

_BROADCAST = 4  # a factor with at most one element for this many of the product stays exact
LEAST_ROW = 16  # rows of fewer elements do not get a range of their own


class Product(torch.autograd.Function):
    """y = a * b with broadcasting."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, kept_a: Any, kept_b: Any) -> Tensor:
        save(ctx, kept_a, kept_b)
        ctx.of = (a.shape, a.dtype), (b.shape, b.dtype)
        return torch.mul(a, b)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        kept_a, kept_b = load(ctx)
        da = _gradient(dy * _seen(kept_b, dy), *ctx.of[0]) if ctx.needs_input_grad[0] else None
        db = _gradient(dy * _seen(kept_a, dy), *ctx.of[1]) if ctx.needs_input_grad[1] else None
        return da, db, None, None


def _seen(kept: Any, dy: Tensor) -> Tensor:
    """The factor's value, after its residual has observed the gradient that it is multiplied by."""
    kept.observe(as_rows(dy))
    return kept.value()


def _gradient(g: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The gradient of a factor of this shape and dtype, from one of the product's shape."""
    return g.sum_to_size(shape).to(dtype)


@rule(runs_again=True, in_its_row=True)
def mul(forward: ForwardPass, input: Tensor, other: Any, *, out: Any = None) -> Any:
    if out is not None or not _operands(input, other):
        return NotImplemented
    kept = _factors(forward, input, other, torch.broadcast_shapes(input.shape, other.shape).numel())
    return NotImplemented if kept is None else Product.apply(input, other, *kept)


def _operands(a: Any, b: Any) -> bool:
    """Whether a and b are floating-point tensors, and a gradient is wanted."""
    return is_plain_float(a, b) and (a.requires_grad or b.requires_grad)


def _factors(forward: ForwardPass, a: Tensor, b: Tensor, count: int) -> tuple[Any, Any] | None:
    """What is kept of both factors of a product of `count` elements (0: no broadcasting); `None`: nothing is lossy."""
    config = running_config(forward)
    if config.lossless:
        return None
    pairs = (a, b), (b, a)
    needed = [x for x, by in pairs if by.requires_grad]
    if all(stays_exact(forward, x, count, without_reduction(config)) for x in needed):
        return None  # torch's own operation, kept by the hooks
    forward.plain(*needed)
    kept_a, kept_b = (factor(forward, x, by, count) if by.requires_grad else None for x, by in pairs)
    return kept_a, kept_b


def stays_exact(forward: ForwardPass, x: Tensor, count: int, config: Config, gathers: bool = True) -> bool:
    """Whether a factor is kept exactly: held by others, small, or computed again for less than its codes.

    Args:
        gathers: otherwise the codes may be those of what it was gathered from.
    """
    distinct = nbytes(x) // x.element_size()  # an expanded tensor is as small as what it was expanded from
    few = distinct < MIN_ELEMENTS or (count and distinct * _BROADCAST <= count)
    return (
        bool(few) or forward.held(x) or forward.cheaper_exact(x, config, at_least_4_bits(config) if gathers else None)
    )


def factor(forward: ForwardPass, x: Tensor, by: Tensor, count: int, copied: bool = False) -> Any:
    """The residual of a factor x, from which the gradient of the factor `by` is computed.

    Args:
        count: elements of the product; 0: it has no broadcasting.
        copied: see `ForwardPass.keep`.
    """
    config = running_config(forward)
    if config.lossless or stays_exact(forward, x, count, without_reduction(config)):
        return forward.exact(x, copied)
    if by.is_leaf:  # a parameter: x enters its gradient and no other, as a linear layer's input does
        many = isinstance(config.reduce, Sample) and x.dim() > 1 and by.numel() * _BROADCAST <= x.numel()
        return forward.keep(x, leaf=True, config=None if many else without_reduction(config), copied=copied)
    if (not count or x.numel() == count) and (wide := positive.codec(forward, x, by, both=not count)) is not None:
        return forward.gathered(x, wide, copied)
    config = at_least_4_bits(config)
    if count:
        gathered = forward.lossless.tape.gathered(forward.holdings.origin(x)) is not None
        if x is by and not gathered:
            return keep_signed(forward, x)
        if x.shape == by.shape or made_by_reciprocal(forward.lossless.tape, by):
            if x.shape[-1] < LEAST_ROW and not gathered:
                return keep_signed(forward, x)
            if config.block_size(x.shape[:-1].numel(), x.shape[-1]) > x.shape[-1]:
                config = replace(config, block="row")
    return forward.gathered(x, config, copied)


def end_of_dot(forward: ForwardPass, x: Tensor, by: Tensor) -> Any:
    """The residual of x (N, ..., C) in scalar products of its rows with those of `by`, whose gradient it is for."""
    config = running_config(forward)
    if config.lossless or forward.held(x) or forward.cheaper_exact(x, without_reduction(config)):
        return forward.exact(x, copied=True)
    wide = positive.codec(forward, x, by, both=True)
    return forward.keep(x, leaf=False, config=wide or replace(at_least_4_bits(config), block="row"), copied=True)


def at_least_4_bits(config: Config) -> Config:
    """For what enters everything before it: with 2 bits GAT's gradient error doubled, with 4 it hardly moved."""
    bits = config.bits if isinstance(config.levels, tuple) else max(config.bits, 4)
    return replace(without_reduction(config), bits=bits)


class Quotient(torch.autograd.Function):
    """y = a / b: da = dy (1 / b), db = -dy (a / b^2), each factor encoded on its own; b itself where it is small."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, divisor: Any, inverse: Any, slope: Any) -> Tensor:
        save(ctx, divisor, inverse, slope)
        ctx.of = (a.shape, a.dtype), (b.shape, b.dtype)
        return torch.div(a, b)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        divisor, inverse, slope = load(ctx)
        da = db = None
        if ctx.needs_input_grad[0]:
            da = _gradient(dy / divisor.value() if inverse is None else dy * inverse.value(), *ctx.of[0])
        if ctx.needs_input_grad[1]:
            db = _gradient(dy * slope.value(), *ctx.of[1]).neg_()
        return da, db, None, None, None


class MatrixProduct(torch.autograd.Function):
    """y = a b of two activations, batched or not: da = dy b^T, db = a^T dy."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, kept_a: Any, kept_b: Any, low: torch.dtype | None) -> Tensor:
        save(ctx, kept_a, kept_b)
        ctx.dtypes = a.dtype, b.dtype
        return torch.matmul(*copies(low, a, b))

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        kept_a, kept_b = load(ctx)
        da = (dy @ kept_b.value().to(dy.dtype).mT).to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
        db = (kept_a.value().to(dy.dtype).mT @ dy).to(ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
        return da, db, None, None, None


class QuotientByConstant(torch.autograd.Function):
    """y = a / b of a b without a gradient, into a buffer of Dibit's own: the mean over neighbours."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, divisor: Any) -> Tensor:
        ctx.hops, ctx.fresh_result = 0, True
        save(ctx, divisor)
        return torch.div(a, b, out=empty_like(a))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return dy / load(ctx)[0].value(), None, None


@rule(runs_again=True, in_its_row=True)
def div(forward: ForwardPass, input: Tensor, other: Any, *, rounding_mode: Any = None, out: Any = None) -> Any:
    if out is not None or rounding_mode is not None or not _operands(input, other):
        return NotImplemented
    count = torch.broadcast_shapes(input.shape, other.shape).numel()
    needed = [other, input] if other.requires_grad else [other]
    exact = [stays_exact(forward, x, count, eight_bit(running_config(forward)), gathers=False) for x in needed]
    own = input.is_contiguous() and input.dtype == other.dtype and input.numel() == count
    if all(exact) and not other.requires_grad and own and worth_huge_pages(input):
        forward.plain(other)
        return QuotientByConstant.apply(input, other, forward.exact(other))
    if all(exact):
        return NotImplemented
    a, b = at_least_single(input.detach()), at_least_single(other.detach())
    divisor = inverse = slope = None
    if input.requires_grad:
        divisor = forward.exact(other) if exact[0] else None
        inverse = None if exact[0] else keep_relative(forward, 1 / b)
    if other.requires_grad:
        slope = keep_relative(forward, a / b / b)
    if (input.requires_grad and divisor is inverse) or (other.requires_grad and slope is None):
        return NotImplemented  # not finite
    forward.plain(*needed)
    return Quotient.apply(input, other, divisor, inverse, slope)


@rule(autocast=low_precision)
def bmm(forward: ForwardPass, input: Tensor, mat2: Tensor, *, out: Any = None) -> Any:
    """Products of two activations; a product with a weight is a linear layer's."""
    if out is not None or not _operands(input, mat2) or (forward.low is None and input.dtype != mat2.dtype):
        return NotImplemented
    if min(input.dim(), mat2.dim()) < 2 or input.shape[:-2] != mat2.shape[:-2]:
        return NotImplemented
    kept = _factors(forward, input, mat2, 0)
    return NotImplemented if kept is None else MatrixProduct.apply(input, mat2, *kept, forward.low)
