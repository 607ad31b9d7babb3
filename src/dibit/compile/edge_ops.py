"""The operators of sums over edges in compiled code: from node tensors and the edges as the caller has them.

The order of the edges is looked up when the operator runs, by their content. It is no tensor of the graph: a compiler
may write over the result of an operator, and what is kept for later steps must not change.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from dibit._torch.huge_pages import empty
from dibit._torch.signatures import with_typing
from dibit.codec import ops
from dibit.codec.fingerprint import fingerprint
from dibit.edges.plan import SortedEdges, sort

MOST_KEPT = 8  # sorted lists of edges: both directions of four graphs

_kept: OrderedDict[Any, SortedEdges] = OrderedDict()  # by the content of the edges, the last used at the end


def sorted_edges(by: Tensor, count: int, other: Tensor, others: int, wraps: tuple[bool, bool]) -> SortedEdges:
    """Edges in the order of the nodes at one end, as they were sorted when their content was first seen.

    Args:
        by, other: int64 (E,), the nodes at this end and at the other one.
        count, others: how many nodes there are at each.
        wraps: for `by` and `other`, whether negative numbers count from the end.

    Raises:
        IndexError: an edge has no node at one of its ends.
    """
    key = int(fingerprint(by)), int(fingerprint(other)), by.numel(), count, others, wraps
    found = _kept.pop(key, None)
    if found is None:
        found = sort(_within(by, count, wraps[0]), count, _within(other, others, wraps[1]))
    _kept[key] = found  # each step is atomic, so no lock is needed, which a forked child might wait for
    while len(_kept) > MOST_KEPT:
        _kept.popitem(last=False)
    return found


def _within(index: Tensor, count: int, wraps: bool) -> Tensor:
    """The index with numbers from 0 to count - 1."""
    if not index.numel():
        return index
    low, high = (int(end) for end in index.aminmax())
    if low < (-count if wraps else 0) or high >= count:
        raise IndexError(
            f"the edges have the node {high if high >= count else low}, but there are {count} nodes at this end; "
            f"expected numbers from 0 to {count - 1}."
        )
    return torch.where(index < 0, index + count, index) if low < 0 else index


@custom_op("dibit::edge_sum", mutates_args=())
@with_typing
def edge_sum(
    x: Tensor,
    weight: Tensor | None,
    base: Tensor | None,
    source: Tensor,
    target: Tensor,
    rows: int,
    wraps: bool,
    back: bool,
) -> Tensor:
    """base[n] + the sum of weight[e] x[source[e]] over the edges e to node n, added one by one in their order.

    Args:
        x: float32 (M, H, C).
        weight: float32 (E, H); `None` for ones.
        base: float32 (N, H, C); `None` for zeros.
        source, target: int64 (E,).
        rows: N.
        wraps: negative sources count from the end.
        back: the gradient: x[target[e]] is added to the row of the edge's source.

    Returns:
        Float32 (N, H, C).

    Raises:
        IndexError: an edge has no node at one of its ends.
    """
    ends = (source, target) if back else (target, source)
    edges = sorted_edges(ends[0], rows, ends[1], x.shape[0], (wraps and back, wraps and not back))
    out = empty((rows, *x.shape[1:]), x.dtype, x.device).zero_() if base is None else base.contiguous().clone()
    x = x.contiguous()
    if weight is None:
        ops.add_neighbours(out.view(rows, -1), edges.crow, edges.col, None, x.view(x.shape[0], -1))
    else:
        ops.add_scaled(out, edges.crow, edges.col, edges.order, weight.contiguous(), x)
    return out


@edge_sum.register_fake
def _(x, weight, base, source, target, rows, wraps, back):  # type: ignore[no-untyped-def]
    return x.new_empty((rows, *x.shape[1:]))


@custom_op("dibit::edge_weight_gradient", mutates_args=())
@with_typing
def edge_weight_gradient(dy: Tensor, x: Tensor, source: Tensor, target: Tensor, wraps: bool) -> Tensor:
    """The gradient of the weights of `edge_sum`: <dy[target[e], h], x[source[e], h]>.

    Args:
        dy, x: float32 (N, H, C) and (M, H, C).
        source, target: int64 (E,).
        wraps: negative sources count from the end.

    Returns:
        Float32 (E, H).
    """
    edges = sorted_edges(target, dy.shape[0], source, x.shape[0], (False, wraps))
    return ops.edge_products(edges.crow, edges.col, edges.order, dy.contiguous(), x.contiguous())


@edge_weight_gradient.register_fake
def _(dy, x, source, target, wraps):  # type: ignore[no-untyped-def]
    return dy.new_empty((source.shape[0], dy.shape[1]))
