"""Aggregation over neighbours: products with a sparse matrix of constant weights, and `scatter_reduce_` of max and min.

*Sum and mean* keep the graph alone, since dX = A^T dY: exact. *Max and min* keep which element won, in a byte or two or
as one bit a message: exact, too. The forward result has torch's own bits. Products with a dense matrix are handed on to
`dibit.rules.linear`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from dibit._torch.huge_pages import worth_huge_pages
from dibit._torch.private.operations import SAVES_WINNERS, winners
from dibit.codec import ops
from dibit.engine.forward_pass import ForwardPass
from dibit.residuals.base import load, save
from dibit.residuals.constant_csr import ConstantCSR
from dibit.residuals.derived import Aggregated
from dibit.residuals.exact import Reference
from dibit.rules.common import first_order, is_plain_float
from dibit.rules.linear import addmm as dense_addmm
from dibit.rules.linear import matmul as dense_matmul
from dibit.rules.registry import rule

_ARG = {"max": "amax", "min": "amin", "amax": "amax", "amin": "amin"}


def constant_graph(forward: ForwardPass, matrix: Tensor, reduce: str | None) -> ConstantCSR:
    """The parts of a sparse matrix, entered in the ledger where nobody else holds them."""
    csr = matrix if matrix.layout == torch.sparse_csr else matrix.to_sparse_csr()
    parts = csr.crow_indices(), csr.col_indices(), csr.values()
    if not forward.held(matrix):  # made in the forward pass: kept once for all layers, indices in int32
        parts = forward.share(parts[0]), forward.share(parts[1]), forward.share(parts[2])
        if parts[0].dtype != parts[1].dtype:
            parts = parts[0].long(), parts[1].long(), parts[2]
        forward.kept(*parts)
    return ConstantCSR(parts, matrix.shape, reduce == "mean")


def product(matrix: Tensor, x: Tensor, reduce: str | None) -> Tensor:
    """A x, torch's own bits: with ones for weights sums alone are rounded, and our kernel adds in torch's order."""
    if (
        reduce not in ("sum", "mean")
        or not worth_huge_pages(x)
        or matrix.layout != torch.sparse_csr
        or x.dtype != torch.float32
    ):
        return torch.sparse.mm(matrix, x) if reduce is None else torch.sparse.mm(matrix, x, reduce)
    crow, col, values = matrix.crow_indices(), matrix.col_indices(), matrix.values()
    if not (x.is_contiguous() and bool((values == 1).all()) and _adds_in_torchs_order()):
        return torch.sparse.mm(matrix, x, reduce)
    y = ops.aggregate(crow, col, values, x)
    return y.div_(crow.diff().clamp_(min=1)[:, None]) if reduce == "mean" else y


@functools.cache
def _adds_in_torchs_order() -> bool:
    """Whether this torch, on this processor, gives the bits that our kernel gives."""
    generator = torch.Generator().manual_seed(0)
    crow = torch.randint(0, 40, (200,), generator=generator).cumsum(0)
    crow = torch.cat((crow.new_zeros(1), crow))
    col = torch.randint(0, 200, (int(crow[-1]),), generator=generator)
    values, x = torch.ones(len(col)), torch.randn(200, 33, generator=generator)
    matrix = torch.sparse_csr_tensor(crow, col, values, (200, 200), check_invariants=False)
    y = ops.aggregate(crow, col, values, x)
    mean = y / crow.diff().clamp(min=1)[:, None]
    return all(torch.equal(torch.sparse.mm(matrix, x, how), own) for how, own in (("sum", y), ("mean", mean)))


class Aggregate(torch.autograd.Function):
    """y = A x, sum or mean over the stored elements of each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, reduce: str | None, graph: ConstantCSR) -> Tensor:
        ctx.hops, ctx.fresh_result = 1, True
        save(ctx, *graph.parts)
        ctx.graph, ctx.matrix = graph.with_tensors(()), graph.pattern
        return product(matrix, x, reduce)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return ctx.graph.with_tensors(load(ctx)).transposed_product(dy).to(dy.dtype), None, None, None


class AggregateExtreme(torch.autograd.Function):
    """y = max or min over the stored elements of each row; kept: the element that won, torch's own choice at ties."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, reduce: str, graph: ConstantCSR, forward: ForwardPass) -> Tensor:
        with torch.enable_grad():
            y = torch.sparse.mm(matrix, x.detach().requires_grad_(), reduce)
            winner = winners(y)
        crow, col, values = graph.parts
        forward.plain(winner.nbytes)
        # relative to the row's first element a byte or two usually hold it; nnz marks a row without elements
        offset = winner - crow[:-1, None]
        empty = (winner >= values.numel()) | (winner < 0)
        widest = int(crow.diff().max()) if crow.numel() > 1 else 0
        small = torch.uint8 if widest < 2**8 else torch.int16 if widest < 2**15 else torch.int32
        offset = offset.masked_fill_(empty, 0).to(small)
        forward.kept(offset, how=f"winner in {offset.element_size()} B")
        save(ctx, offset, crow, col, values)
        ctx.shape = x.shape
        return y.detach()

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        offset, crow, col, values = load(ctx)
        occupied = (crow.diff() > 0)[:, None]
        edge = (offset.long() + crow[:-1, None]).clamp_(max=max(values.numel() - 1, 0))
        dx = dy.new_zeros(ctx.shape)
        if values.numel():
            dx.scatter_add_(0, col[edge].long(), dy * values[edge] * occupied)
        return dx, None, None, None, None


class ScatterExtreme(torch.autograd.Function):
    """out.scatter_reduce_(amax or amin): one bit an element for who attains the result; ties share, as torch has it."""

    @staticmethod
    def forward(
        ctx: Any, src: Tensor, out: Tensor, dim: int, index: Tensor, reduce: str, forward: ForwardPass
    ) -> Tensor:
        start = out.clone()
        ctx.mark_dirty(out)
        out.scatter_reduce_(dim, index, src, reduce, include_self=False)
        attained = ops.pack_mask((src == out.gather(dim, index)).to(torch.float32))
        initial = ops.pack_mask((start == out).to(torch.float32))
        kept = forward.pack_index(index)
        forward.plain(start.nbytes, src, index)
        forward.kept(attained, initial, how="1-bit mask of the winners")
        save(ctx, attained, initial, kept.x)
        ctx.index, ctx.dim, ctx.shape = kept.with_tensor(torch.empty(0)), dim, src.shape
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        attained, initial, index = load(ctx)
        index = ctx.index.with_tensor(index).restore()
        ones = torch.ones(1, dtype=dy.dtype, device=dy.device)
        won = ops.apply_mask(ones.expand(ctx.shape).contiguous(), attained, 0.0)
        winners = ops.apply_mask(ones.expand(dy.shape).contiguous(), initial, 0.0)
        winners.scatter_add_(ctx.dim, index, won)
        return won * (dy / winners).gather(ctx.dim, index), None, None, None, None, None


@rule(kind="linear inputs", exact=True)  # for a mean plain torch keeps the input, which is the linear layer's, too
def sparse_mm(forward: ForwardPass, mat1: Tensor, mat2: Tensor, reduce: str | None = None) -> Any:
    if type(mat1) is not Tensor or mat1.layout == torch.strided or mat1.requires_grad:
        return NotImplemented
    if mat1.dim() != 2 or not is_plain_float(mat2) or mat2.dim() != 2 or mat1.dtype != mat2.dtype:
        return NotImplemented
    if reduce not in (None, "sum", "mean", "max", "min", "amax", "amin"):
        return NotImplemented
    if reduce in _ARG and not SAVES_WINNERS:
        return NotImplemented
    if not mat2.requires_grad:
        return aggregate_features(forward, mat1, mat2, reduce)
    forward.plain(mat1, mat2 if reduce is not None else None)
    forward.holdings.refer(mat1)
    graph = constant_graph(forward, mat1, reduce)
    if reduce in _ARG:
        return AggregateExtreme.apply(mat2, mat1, reduce, graph, forward)
    y = Aggregate.apply(mat2, mat1, reduce, graph)
    forward.sources.aggregated(y, graph, mat2)
    return y


def aggregate_features(forward: ForwardPass, matrix: Tensor, x: Tensor, reduce: str | None) -> Any:
    """A @ features, both held by the caller: it can be recomputed for free, so the next linear layer keeps nothing."""
    if reduce in _ARG or not (forward.held(matrix) and forward.held(x)):
        return NotImplemented
    steady = forward.lossless.steady(matrix) and forward.lossless.steady(x)
    y = product(matrix, x, reduce)
    if steady:
        forward.sources.derived(y, Aggregated(constant_graph(forward, matrix, reduce), Reference(x, x.shape)))
    return y


@rule(kind="linear inputs", exact=True)
def matmul(forward: ForwardPass, input: Tensor, other: Tensor, *, out: Any = None) -> Any:
    if out is None and isinstance(input, Tensor) and input.layout != torch.strided:
        return sparse_mm(forward, input, other)
    return dense_matmul(forward, input, other, out=out)


@rule(kind="linear inputs", exact=True)
def addmm(forward: ForwardPass, input: Tensor, mat1: Tensor, mat2: Tensor, **kwargs: Any) -> Any:
    if isinstance(mat1, Tensor) and mat1.layout != torch.strided:
        return NotImplemented
    return dense_addmm(forward, input, mat1, mat2, **kwargs)


@rule(exact=True)
def scatter_reduce_(
    forward: ForwardPass, input: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Any:
    if reduce not in ("amax", "amin") or include_self or not is_plain_float(input, src) or input.requires_grad:
        return NotImplemented
    if not src.requires_grad or src.shape != index.shape:
        return NotImplemented
    out = ScatterExtreme.apply(src, input, dim, index, reduce, forward)
    forward.plain(out)
    return out
