"""The rules for reductions over edges: what plain torch would keep for each, and the function that computes it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dibit.edges.chunks import Reduction, Sink
from dibit.edges.deferred import PendingCall
from dibit.edges.extremes import HOW, edge_extreme
from dibit.edges.plan import Plan, SortedEdges
from dibit.edges.recomputed import EdgeProgram, compute_again
from dibit.edges.scores import additive_scores, scalar_products
from dibit.edges.sums import edge_sum, scaled_sum
from dibit.engine.forward_pass import ForwardPass


def sum_rule(
    forward: ForwardPass,
    gathered: PendingCall,
    x: Tensor,
    out: Tensor,
    scale: Tensor | None,
    plan: Plan,
    source: Tensor,
    target: Tensor,
    zeros: bool,
) -> Tensor:
    """out += the sum of x[source] * scale by target.

    Args:
        gathered: the call x[source].
        x, out: float32 (M, ...) and (N, ...); `out` is written to.
        scale: float32 (E, ..., 1), or `None`.
        source, target: int64 (E,).
        zeros: `out` is zero.
    """
    needs = x.requires_grad, scale is not None and scale.requires_grad
    forward.plain(source if needs[0] else None, target if any(needs) else None)
    if needs[1]:
        _count(forward, gathered)
    if scale is None or not (needs[1] or scale.shape[1:].numel() > 1):
        return edge_sum(forward, x, out, plan, scale, target if zeros else None)
    return scaled_sum(forward, x, scale, out, plan)


def extreme_rule(
    least: bool,
    forward: ForwardPass,
    gathered: PendingCall,
    x: Tensor,
    out: Tensor,
    scale: None,
    plan: Plan,
    source: Tensor,
    target: Tensor,
    zeros: bool,
) -> Tensor:
    """`out` becomes the maxima (`least`: the minima) of x[source] by target; arguments as in `sum_rule`."""
    if x.requires_grad:
        forward.plain(source, target)
        _count(forward, gathered)
    return edge_extreme(forward, x, out, plan.by_target, least, zeros)


def row_extreme_rule(
    forward: ForwardPass, rows: Tensor, out: Tensor, edges: SortedEdges, target: Tensor, least: bool, zeros: bool
) -> Tensor:
    """`out` becomes the maxima (`least`: the minima) of messages that exist as a tensor.

    Args:
        rows: float32 (E, ...).
        edges: by target; their columns are the messages.
        target: int64 (E,).
    """
    forward.plain(rows, target)
    return edge_extreme(forward, rows, out, edges, least, zeros)


def recomputed_rule(
    forward: ForwardPass,
    program: EdgeProgram,
    tensors: Sequence[Tensor],
    plan: Plan,
    sink: Reduction,
    wholes: Sequence[Sink],
    indices: Sequence[Tensor],
    target: Tensor,
) -> tuple[Tensor, ...]:
    """Reduce a program so that the backward pass computes it again; other arguments as in `chunked_rule`.

    Args:
        program: its results are the messages, and what `wholes` store for each edge.
        tensors: what it reads.

    Returns:
        The result of each sink.
    """
    results = compute_again(forward, program, tensors, plan, [sink, *wholes])
    chunked_rule(forward, results[0], sink, indices, target)
    return results


def chunked_rule(forward: ForwardPass, y: Tensor, sink: Reduction, indices: Sequence[Tensor], target: Tensor) -> bool:
    """Enter in the ledger what the reduction of a program keeps, and would keep without Dibit.

    Args:
        y: float32 (N, D), the result.
        sink: how it was reduced.
        indices, target: int64 (E,) each.
    """
    forward.plain(*indices, target)
    if sink.how != "sum":
        forward.plain(y.nbytes, y)
        forward.kept(*sink.kept, how=HOW)
    if sink.how != "sum" or forward.function.__name__.startswith("index_add"):
        forward.plain(target.numel() * y.shape[1] * y.element_size())
    sink.kept = ()
    return True


def score_rule(
    forward: ForwardPass,
    ends: Sequence[PendingCall],
    a: Tensor,
    b: Tensor,
    weight: Tensor | None,
    slope: float,
    scores: Tensor,
    plan: Plan,
    source: Tensor,
    target: Tensor,
) -> Tensor:
    """Connect attention scores (E, H), which were computed already, to the features at both ends.

    Args:
        ends: the calls a[target] and b[source].
        a, b: float32 (N, H, C) and (M, H, C).
        weight: float32 (..., H, C) for the scores <weight, leaky_relu(a[i] + b[j])>; `None`: they are <a[i], b[j]>.
        slope: of the leaky ReLU.
        scores: float32 (E, H).
        source, target: int64 (E,).
    """
    forward.plain(target if a.requires_grad else None, source if b.requires_grad else None)
    if weight is None:
        _count(forward, *(end for end, other in zip(ends, (b, a), strict=True) if other.requires_grad))
        return scalar_products(forward, a, b, scores, plan)
    return additive_scores(forward, a, b, weight, slope, scores, plan)


def _count(forward: ForwardPass, *gathers: PendingCall) -> None:
    """Count gathers that plain torch would keep, each once, however many operations save it."""
    for gather in gathers:
        if not gather.counted:
            x, _, index = gather.args
            forward.plain(index.numel() * x.shape[1:].numel() * x.element_size())
            gather.counted = True
