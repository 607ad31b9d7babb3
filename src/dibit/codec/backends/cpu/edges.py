"""Sums over the edges of a graph on a CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dibit._torch.huge_pages import empty
from dibit.codec.backends.cpu.kernels import edges as kernels
from dibit.codec.dispatch import kernel
from dibit.codec.numpy_views import array

_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(np.float32)


@kernel(index=torch.int64)
def sort_edges(index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    dtype = torch.int32 if index.numel() < 2**31 else torch.int64
    pointers, order = torch.zeros(count + 1, dtype=dtype), torch.empty(index.numel(), dtype=dtype)
    if not kernels.sort_edges(0, array(index), array(pointers), array(order)):
        raise IndexError(f"an edge has no node at one of its ends; expected numbers from 0 to {count - 1}.")
    return pointers, order


@kernel(values=torch.float32, x=torch.float32)
def aggregate(crow: Tensor, col: Tensor, values: Tensor, x: Tensor) -> Tensor:
    out = empty((crow.shape[0] - 1, x.shape[1]), x.dtype)
    if out.numel():
        work = max(out.numel(), col.numel())
        kernels.add_weighted(work, array(crow), array(col), array(values), array(x), array(out), True)
    return out


@kernel(out=torch.float32, x=torch.float32, values=torch.float32)
def add_neighbours(out: Tensor, crow: Tensor, col: Tensor, values: Tensor | None, x: Tensor) -> None:
    work, graph = max(out.numel(), col.numel()), (array(crow), array(col))
    if values is None:
        kernels.add_neighbours(work, *graph, array(x), array(out))
    else:
        kernels.add_weighted(work, *graph, array(values), array(x), array(out), False)


@kernel(out=torch.float32, x=torch.float32)
def add_rows(out: Tensor, index: Tensor, x: Tensor) -> None:
    kernels.add_rows(x.numel(), array(index), array(x), array(out))


@kernel(out=torch.float32, x=torch.float32, scale=torch.float32)
def add_scaled(out: Tensor, crow: Tensor, col: Tensor, order: Tensor | None, scale: Tensor, x: Tensor) -> None:
    work = max(out.numel(), scale.numel())
    kernels.add_scaled(work, array(crow), array(col), array(_own(order, col)), array(scale), array(x), array(out))


@kernel(a=torch.float32, x=torch.float32)
def edge_products(crow: Tensor, col: Tensor, order: Tensor | None, a: Tensor, x: Tensor) -> Tensor:
    out = a.new_empty(col.numel(), a.shape[1])
    work = max(a.numel(), out.numel())
    kernels.edge_products(work, array(crow), array(col), array(_own(order, col)), array(a), array(x), array(out))
    return out


@kernel(a=torch.float32, b=torch.float32)
def edge_signs(crow: Tensor, col: Tensor, order: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    signs = torch.empty(col.numel(), a.shape[1], -(-a.shape[2] // 8), dtype=torch.uint8)
    work = max(a.numel(), col.numel() * a.shape[1])
    kernels.edge_signs(work, array(crow), array(col), array(_own(order, col)), array(a), array(b), array(signs))
    return signs


@kernel(out=torch.float32, scale=torch.float32)
def add_signed(out: Tensor, crow: Tensor, order: Tensor | None, signs: Tensor, scale: Tensor, slope: float) -> None:
    order = torch.arange(signs.shape[0], dtype=crow.dtype) if order is None else order
    work = max(out.numel(), scale.numel())
    kernels.add_signed(
        work, array(crow), array(order), array(signs), array(scale), np.float32(slope), _BITS, array(out)
    )


def _own(order: Tensor | None, col: Tensor) -> Tensor:
    """The order of edges that are sorted already, where none is given."""
    return torch.arange(col.numel(), dtype=col.dtype) if order is None else order
