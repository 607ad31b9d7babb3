"""Sums over edges in compiled code, without a tensor of one row an edge.

Dynamo puts the operators below into a model's graph, in the place of a gather, of a product and of a sum. When the
graph is traced for a compiler, they compute what torch's own functions compute. They also note how a result came about,
on the tensor that stands for it. If a sum finds that its rows are a gather, perhaps times a weight, it is computed from
the node tensor. The compiler then removes the gather, which nobody uses.

A note holds only as long as nobody has written to the tensors that it is about. The trace shows that, since in it every
write makes a new value. A trace of another kind, and a graph that no compiler traces, have torch's own functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dibit._torch.private.tensors import gradient_asked
from dibit._torch.private.traces import traced_through, traced_value
from dibit.compile import edge_ops, ops
from dibit.edges.functions import WIDE


@dataclass
class Messages:
    """How rows for each edge came about: x[index], perhaps times a weight.

    Attributes:
        x: float32 (M, ...).
        index: int64 (E,).
        weight: float32 (E, ..., 1) or `None`.
        wraps: negative numbers in the index count from the end.
        values: of the rows themselves and of all of these, and which have a gradient, when the note was made.
    """

    x: Tensor
    index: Tensor
    weight: Tensor | None
    wraps: bool
    values: tuple[Any, ...] = ()

    def now(self, rows: Tensor) -> tuple[Any, ...]:
        """The values now."""
        about = [x for x in (rows, self.x, self.index, self.weight) if x is not None]
        return *map(traced_value, about), *(x.requires_grad for x in about)


def _note(rows: Tensor, messages: Messages) -> Tensor:
    messages.values = messages.now(rows)
    if all(value is not None for value in messages.values):
        rows.dibit_messages = messages  # type: ignore[attr-defined]
    return rows


def _messages(rows: Tensor) -> Messages | None:
    """How rows came about, if that is known and still true."""
    found: Messages | None = getattr(rows, "dibit_messages", None)
    if found is None or gradient_asked(rows):
        return None
    if any(before is not now for before, now in zip(found.values, found.now(rows), strict=True)):
        return None
    return found


def _zeros(like: Tensor, size: list[int]) -> Tensor:
    zeros = ops.zeros(torch.empty(0, dtype=like.dtype, device=like.device), size)  # `like` is not needed for it
    zeros.dibit_zeros = traced_value(zeros)  # type: ignore[attr-defined]
    return zeros


def _is_zero(x: Tensor) -> bool:
    value = getattr(x, "dibit_zeros", None)
    return value is not None and value is traced_value(x)


def _gather(x: Tensor, index: Tensor, how: str, least: int) -> Tensor:
    if how == "gather":
        y, column = torch.gather(x, 0, index), _column(index, index)
    elif how == "getitem":
        y, column = x[index], index
    else:
        y, column = x.index_select(0, index), index
    if traced_value(y) is None or column is None or not _worthwhile(x, index, column, least):
        return y
    return _note(y, Messages(x, column, None, how == "getitem"))


def _worthwhile(x: Tensor, index: Tensor, column: Tensor, least: int) -> bool:
    """Whether a gather is large. Sizes may be symbols: then this is a condition of the graph."""
    try:
        width = math.prod(x.shape[1:])
        same = column is index or x.shape[1:] == index.shape[1:]
        return same and width >= WIDE and column.shape[0] * width >= least and bool(column.shape[0] >= x.shape[0])
    except RuntimeError:  # known only when the graph runs
        return False


def _scale(a: Tensor, b: Tensor) -> Tensor:
    y = a * b
    for rows, weight in ((a, b), (b, a)):
        found = _messages(rows)
        if found is not None and found.weight is None and _is_weight(weight, rows):
            return _note(y, Messages(found.x, found.index, weight, found.wraps))
    return y


def _is_weight(weight: Tensor, rows: Tensor) -> bool:
    return weight.dtype == rows.dtype and weight.shape == (*rows.shape[:-1], 1)


def _column(index: Tensor, like: Tensor) -> Tensor | None:
    """The index (E,) that was expanded to the shape of other rows; `None` if it is another one."""
    if index.shape != like.shape:
        return None
    if any(stride and size != 1 for stride, size in zip(index.stride()[1:], index.shape[1:], strict=True)):
        return None
    first: tuple[Any, ...] = (slice(None), *(0,) * (index.dim() - 1))
    return index[first]


def _sum(out: Tensor, index: Tensor, src: Tensor, how: str) -> Tensor:
    y = _summed(out, index, src, how)
    if y is not None:
        return y
    return out.index_add(0, index, src) if how == "index_add" else out.scatter_add(0, index, src)


def _sum_(out: Tensor, index: Tensor, src: Tensor, how: str) -> Tensor:
    y = _summed(out, index, src, how)
    if y is not None:
        return out.copy_(y)
    return out.index_add_(0, index, src) if how == "index_add" else out.scatter_add_(0, index, src)


def _summed(out: Tensor, index: Tensor, src: Tensor, how: str) -> Tensor | None:
    """out plus the rows of src, by their targets; `None` where torch's own function has to do it."""
    found = _messages(src)
    if found is None or out.dtype != src.dtype or out.shape[1:] != src.shape[1:]:
        return None
    target = index if how == "index_add" else _column(index, src)
    if target is None or target.shape[0] != src.shape[0]:
        return None
    weight, heads = found.weight, 1
    if weight is not None:
        heads = math.prod(weight.shape[1:])
        weight = weight.reshape(-1, heads)
    base = None if _is_zero(out) else out.reshape(out.shape[0], heads, -1)
    x = found.x.reshape(found.x.shape[0], heads, -1)
    y = EdgeSum.apply(x, weight, base, found.index, target, out.shape[0], found.wraps)
    return y.view(out.shape)  # type: ignore[no-any-return]


class EdgeSum(torch.autograd.Function):
    """`edge_ops.edge_sum`. Kept: the edges, the weights if x has a gradient, and x if the weights have one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        base: Tensor | None,
        source: Tensor,
        target: Tensor,
        rows: int,
        wraps: bool,
    ) -> Tensor:
        needs = ctx.needs_input_grad
        ctx.save_for_backward(source, target, weight if needs[0] else None, x if needs[1] else None)
        ctx.wraps, ctx.rows = wraps, x.shape[0]
        return edge_ops.edge_sum(x, weight, base, source, target, rows, wraps, False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        source, target, weight, x = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = edge_ops.edge_sum(dy, weight, None, source, target, ctx.rows, ctx.wraps, True)
        if ctx.needs_input_grad[1]:
            dw = edge_ops.edge_weight_gradient(dy, x, source, target, ctx.wraps)
        return dx, dw, dy if ctx.needs_input_grad[2] else None, None, None, None, None


# A compiler stores compiled graphs on disk by the names and arguments of these: if one changes what it does, it needs
# another name.
zeros = traced_through("traced_zeros(Tensor like, SymInt[] size) -> Tensor", _zeros)
gather = traced_through("traced_gather(Tensor x, Tensor index, str how, int least) -> Tensor", _gather)
scale = traced_through("traced_scale(Tensor a, Tensor b) -> Tensor", _scale)
sum_ = traced_through("traced_sum_(Tensor(a!) out, Tensor index, Tensor src, str how) -> Tensor(a!)", _sum_)
sum_rows = traced_through("traced_sum(Tensor out, Tensor index, Tensor src, str how) -> Tensor", _sum)
