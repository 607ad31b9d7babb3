"""Sums over the edges of a graph, which are never gathered: their definition in plain torch gathers them."""

import torch
from torch import Tensor


def sort_edges(index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sort edges by the node at one of their ends; edges of one node stay in their order.

    Args:
        index: int64 (E,), each at least 0 and below `count`.
        count: how many nodes there are.

    Returns:
        Pointers, (count + 1,): where the edges of each node begin. Order, (E,): the edges, sorted. Both are int32 where
        that has room for E, else int64.
    """
    dtype = torch.int32 if index.numel() < 2**31 else torch.int64
    pointers = torch.zeros(count + 1, dtype=dtype, device=index.device)
    pointers[1:] = torch.bincount(index, minlength=count).cumsum(0)
    return pointers, index.argsort(stable=True).to(dtype)


def aggregate(crow: Tensor, col: Tensor, values: Tensor, x: Tensor) -> Tensor:
    """A x for A in compressed rows (N, M) and a contiguous x (M, D): (N, D), in the dtype of x."""
    shape = crow.shape[0] - 1, x.shape[0]
    return torch.sparse.mm(torch.sparse_csr_tensor(crow, col, values, shape, check_invariants=False), x)


def add_neighbours(out: Tensor, crow: Tensor, col: Tensor, values: Tensor | None, x: Tensor) -> None:
    """out[n] += sum of values[e] x[col[e]] over the edges e of node n, added one by one in their order.

    Args:
        out: contiguous (N, D).
        crow, col: (N + 1,) and (E,): in compressed rows.
        values: (E,); `None` for ones.
        x: contiguous (M, D), of the dtype of `out`.
    """
    rows = torch.repeat_interleave(crow.diff(), output_size=col.numel())
    messages = x.index_select(0, col)
    out.index_add_(0, rows, messages if values is None else messages.mul_(values[:, None]))


def add_rows(out: Tensor, index: Tensor, x: Tensor) -> None:
    """out[index[e]] += x[e], one by one: contiguous (N, D), int32 or int64 (E,), and contiguous (E, D)."""
    out.index_add_(0, index, x)


def add_scaled(out: Tensor, crow: Tensor, col: Tensor, order: Tensor | None, scale: Tensor, x: Tensor) -> None:
    """out[n, h] += sum of scale[order[e], h] x[col[e], h] over the edges e of node n, added one by one in their order.

    Args:
        out: contiguous (N, H, C).
        crow, col: (N + 1,) and (E,): in compressed rows.
        order: (E,), the edge that each of them is to `scale`; `None` if their order is the same.
        scale: contiguous (E, H).
        x: contiguous (M, H, C), of the dtype of `out` and `scale`.
    """
    rows = torch.repeat_interleave(crow.diff(), output_size=col.numel())
    own = scale if order is None else scale.index_select(0, order)
    out.index_add_(0, rows, x.index_select(0, col).mul_(own[:, :, None]))


def edge_products(crow: Tensor, col: Tensor, order: Tensor | None, a: Tensor, x: Tensor) -> Tensor:
    """The scalar products <a[n, h], x[col[e], h]> of the ends of each edge e of each node n.

    Args:
        crow, col: (N + 1,) and (E,): in compressed rows.
        order: (E,), the place of each product in the result; `None` if it is their own order.
        a: contiguous (N, H, C).
        x: contiguous (M, H, C), of the dtype of `a`.

    Returns:
        (E, H), in the dtype of `a`.
    """
    rows = torch.repeat_interleave(crow.diff(), output_size=col.numel())
    products = (a.index_select(0, rows) * x.index_select(0, col)).sum(-1)
    return products if order is None else torch.empty_like(products).index_copy_(0, order.long(), products)


def edge_signs(crow: Tensor, col: Tensor, order: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Whether a[n, h, c] + b[col[e], h, c] is above zero, for the ends of each edge e of each node n.

    Args:
        crow, col: (N + 1,) and (E,): in compressed rows.
        order: (E,), the place of each edge in the result; `None` if it is their own order.
        a: contiguous (N, H, C).
        b: contiguous (M, H, C), of the dtype of `a`.

    Returns:
        uint8 (E, H, ceil(C / 8)): element c is bit c % 8 of byte c // 8.
    """
    rows = torch.repeat_interleave(crow.diff(), output_size=col.numel())
    above = a.index_select(0, rows) + b.index_select(0, col) > 0
    above = torch.nn.functional.pad(above, (0, -above.shape[-1] % 8)).unflatten(-1, (-1, 8))
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=a.device)
    signs = (above * places).sum(-1, dtype=torch.uint8)
    return signs if order is None else torch.empty_like(signs).index_copy_(0, order.long(), signs)


def add_signed(out: Tensor, crow: Tensor, order: Tensor | None, signs: Tensor, scale: Tensor, slope: float) -> None:
    """out[n, h, c] += sum of scale[e, h] over the edges e of node n, times `slope` where the sign of (e, h, c) is 0.

    Args:
        out: contiguous (N, H, C).
        crow: (N + 1,), pointers of the compressed rows.
        order: (E,), the edge that each of them is to `signs` and `scale`; `None` if their order is the same.
        signs: as `edge_signs` gives them.
        scale: contiguous (E, H), of the dtype of `out`.
    """
    rows = torch.repeat_interleave(crow.diff(), output_size=signs.shape[0])
    if order is not None:
        signs, scale = signs.index_select(0, order), scale.index_select(0, order)
    places = torch.arange(8, dtype=torch.uint8, device=out.device)
    above = (signs[..., None] >> places & 1).flatten(-2)[..., : out.shape[-1]]
    out.index_add_(0, rows, torch.where(above > 0, scale[..., None], scale[..., None] * slope))
