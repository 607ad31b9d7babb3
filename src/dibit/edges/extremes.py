"""Maxima and minima over the edges of a graph, from node tensors alone, and their gradient.

A few bits tell which neighbours attain each element (`dibit.codec.backends.reference.winners`). Neighbours that tie
share the gradient, also with an equal value that was there before the call: torch's rule.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from dibit._torch.huge_pages import empty
from dibit.codec import ops
from dibit.codec.dispatch import has_kernel
from dibit.edges.plan import SortedEdges
from dibit.engine.forward_pass import ForwardPass
from dibit.residuals.base import load, released, save
from dibit.rules.common import first_order

HOW = "winners of each target"
LEAST_WIDTH = 16  # features from which torch takes a row at once; of equal zeros it then picks the last, else the first


class EdgeExtreme(torch.autograd.Function):
    """`out` (N, ...), in place: maxima or minima of x[column of e] over the edges e to each node, if it has any."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, out: Tensor, edges: SortedEdges, least: bool, zeros: bool, forward: ForwardPass
    ) -> Tensor:
        ctx.mark_dirty(out)
        shape = x.shape
        kept = extremes(_rows(out), edges.crow, edges.col, _rows(x.detach()).contiguous(), least, zeros)
        forward.kept(*kept, how=HOW)
        save(ctx, *kept, *(None,) * (3 - len(kept)))
        ctx.edges, ctx.shape = edges, shape
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        planes, many, initial = load(ctx)
        edges = released(ctx, "edges")
        dx = empty((ctx.shape[0], ctx.shape[1:].numel()), dy.dtype, dy.device).zero_()
        ops.add_winners(dx, edges.crow, edges.col, planes, many, _rows(dy).contiguous(), initial)
        return dx.reshape(ctx.shape), None, None, None, None, None


def extremes(y: Tensor, crow: Tensor, col: Tensor, x: Tensor, least: bool, zeros: bool) -> tuple[Tensor, ...]:
    """y (N, D) becomes the extremes of x (M, D) over compressed rows; returns what its gradient needs.

    Returns:
        The two results of `dibit::edge_winners`. A third tensor, uint8 (N, ceil(D / 8)), marks where the value that y
        had before is an extreme as well; it is there only if any is.
    """
    start = None if zeros else y.clone()
    ops.edge_extremes(y, crow, col, x, least)
    planes, many = ops.edge_winners(crow, col, x, y)
    attained = y == 0 if start is None else y == start
    attained &= crow.diff()[:, None] > 0
    return (planes, many, _bits(attained)) if bool(attained.any()) else (planes, many)


def edge_extreme(forward: ForwardPass, x: Tensor, out: Tensor, edges: SortedEdges, least: bool, zeros: bool) -> Tensor:
    """For a rule: `out` becomes the extremes over the edges.

    Args:
        x: (M, ...), of at least `LEAST_WIDTH` features.
        edges: by target; their columns are rows of x.
        out: contiguous (N, ...); rows of nodes without an edge stay as they are.
        zeros: `out` is zero.
    """
    if not x.requires_grad:
        ops.edge_extremes(_rows(out), edges.crow, edges.col, _rows(x).contiguous(), least)
        return out
    forward.plain(out.nbytes)
    y: Tensor = EdgeExtreme.apply(x, out, edges, least, zeros, forward)
    forward.plain(y)
    return y


def has_torchs_bits(device: torch.device, width: int) -> bool:
    """Whether there is a kernel for extremes of rows of so many elements that gives what torch gives on this device.

    On a GPU torch compares by atomic operations, in no particular order, so that equal zeros have either sign.
    """
    if device.type == "cpu":
        return width >= LEAST_WIDTH and picks_torchs_zeros()
    return has_kernel(device.type, "edge_winners")


@functools.cache
def picks_torchs_zeros() -> bool:
    """Whether this torch, on this processor, gives the sign of zero that our kernel gives."""
    x = torch.tensor([0.0, -0.0, 0.0, -0.0, -0.0, 0.0])[:, None].repeat(1, LEAST_WIDTH)
    crow, col = torch.tensor([0, 2, 6, 6], dtype=torch.int32), torch.tensor([0, 1, 2, 3, 4, 5], dtype=torch.int32)
    index = torch.tensor([0, 0, 1, 1, 1, 1])[:, None].expand_as(x)
    for least, name in enumerate(("amax", "amin")):
        own = x.new_zeros(3, LEAST_WIDTH)
        torchs = own.clone().scatter_reduce_(0, index, x, name, include_self=False)
        ops.edge_extremes(own, crow, col, x, bool(least))
        if not torch.equal(own.signbit(), torchs.signbit()):
            return False
    return True


def _rows(x: Tensor) -> Tensor:
    """x (N, ...) as (N, D)."""
    return x.reshape(x.shape[0], -1)


def _bits(mask: Tensor) -> Tensor:
    """bool (N, D) as uint8 (N, ceil(D / 8)), the lowest bit first."""
    mask = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8)).view(mask.shape[0], -1, 8)
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (mask * places).sum(-1, dtype=torch.uint8)
