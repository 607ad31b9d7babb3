"""Which neighbours attain the maximum or minimum of a node, in a few bits an element: the definition in plain torch.

A node with d neighbours stores planes of one bit a feature, each in ceil(D / 8) bytes; feature f is bit f % 8 of byte
f // 8. Usually the planes are the binary digits, lowest first, of the number of the one neighbour that attains the
result, or of d where all of them do; there are as many as d has digits, and none for d = 1. Where for some feature
several neighbours attain it but not all, or none does (NaN), the node has *many*: plane k says whether neighbour k
attains it.
"""

import torch
from torch import Tensor


def edge_extremes(out: Tensor, crow: Tensor, col: Tensor, x: Tensor, least: bool) -> None:
    """out[n] = max of x[col[e]] over the edges e of node n; as it is for a node without edges.

    Args:
        out: contiguous (N, D).
        crow, col: (N + 1,) and (E,): in compressed rows.
        x: contiguous (M, D), of the dtype of `out`.
        least: the minimum.
    """
    messages, rows = x.index_select(0, col), _rows(crow)
    out.scatter_reduce_(0, _wide(rows, messages), messages, "amin" if least else "amax", include_self=False)


def edge_winners(crow: Tensor, col: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The neighbours that attain each element of what `edge_extremes` gave.

    Args:
        crow, col, x: its arguments.
        y: contiguous (N, D), its result.

    Returns:
        Planes, uint8 (P, ceil(D / 8)); whether each node has many, bool (N,).
    """
    rows, degree = _rows(crow), crow.diff().long()
    won = x.index_select(0, col) == y.index_select(0, rows)
    count = torch.zeros(y.shape, dtype=torch.int64, device=y.device).index_add_(0, rows, won.long())
    all_ = count == degree[:, None]
    many = ~(all_ | (count == 1)).all(1)
    place = torch.arange(col.numel(), device=col.device) - crow[:-1].long()[rows]
    code = torch.zeros_like(count).index_add_(0, rows, won * place[:, None])
    code = torch.where(all_ & (degree > 1)[:, None], degree[:, None], code)
    node, plane = _planes(crow, many)
    edge = (crow[:-1].long()[node] + plane).clamp_(max=max(col.numel() - 1, 0))
    digit = code[node] >> plane[:, None] & 1
    return _packed(torch.where(many[node][:, None], won[edge].long(), digit)), many


def add_winners(
    out: Tensor, crow: Tensor, col: Tensor | None, planes: Tensor, many: Tensor, grad: Tensor, initial: Tensor | None
) -> None:
    """The gradient of `edge_extremes`: each element of `grad` goes to those that attain the result, in equal shares.

    out[col[e]] += grad[n] / count[n] over the edges e of each node n, where e attains the result.

    Args:
        out: contiguous (M, D).
        crow, planes, many: see `edge_winners`.
        col: see there; `None`: each edge has a row of its own, which has the edge's number.
        grad: contiguous (N, D), of the dtype of `out`.
        initial: uint8 (N, ceil(D / 8)): whether what was there before has a share, too; `None`: nowhere.
    """
    width, rows, degree = grad.shape[1], _rows(crow), crow.diff().long()
    col = torch.arange(len(rows), device=crow.device) if col is None else col
    node, plane = _planes(crow, many)
    bits, own = _unpacked(planes, width).long(), many[node]
    digits = torch.zeros(grad.shape, dtype=torch.int64, device=grad.device)
    digits.index_add_(0, node[~own], bits[~own] << plane[~own][:, None])
    place = torch.arange(len(rows), device=crow.device) - crow[:-1].long()[rows]
    won = (digits[rows] == place[:, None]) | (digits[rows] == degree[rows][:, None])
    won = won.to(grad.dtype)
    won[crow[:-1].long()[node[own]] + plane[own]] = bits[own].to(grad.dtype)
    count = torch.zeros_like(grad) if initial is None else _unpacked(initial, width).to(grad.dtype)
    share = grad / count.index_add_(0, rows, won)
    out.index_add_(0, col, won * share.index_select(0, rows))


def first_planes(crow: Tensor, many: Tensor) -> Tensor:
    """Where the planes of each node begin, and where the last end: int64 (N + 1,)."""
    degree = crow.diff().long()
    digits = torch.frexp(degree.double()).exponent.long().masked_fill_(degree <= 1, 0)
    return torch.cat((digits.new_zeros(1), torch.where(many, degree, digits).cumsum(0)))


def _planes(crow: Tensor, many: Tensor) -> tuple[Tensor, Tensor]:
    """The node that each plane belongs to, and the number of the plane there."""
    first = first_planes(crow, many)
    node = torch.repeat_interleave(first.diff())
    return node, torch.arange(node.numel(), device=crow.device) - first[node]


def _rows(crow: Tensor) -> Tensor:
    return torch.repeat_interleave(crow.diff().long())


def _wide(index: Tensor, like: Tensor) -> Tensor:
    return index[:, None].expand_as(like)


def _packed(bits: Tensor) -> Tensor:
    """0 and 1 (P, D) as uint8 (P, ceil(D / 8))."""
    places = 1 << torch.arange(8, device=bits.device)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8)).unflatten(1, (-1, 8))
    return (bits * places).sum(-1).to(torch.uint8)


def _unpacked(planes: Tensor, width: int) -> Tensor:
    """uint8 (P, ceil(D / 8)) as 0 and 1 (P, D)."""
    places = torch.arange(8, dtype=torch.uint8, device=planes.device)
    return (planes[:, :, None] >> places & 1).flatten(1)[:, :width]
