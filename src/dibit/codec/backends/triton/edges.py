"""Sums over the edges of a graph on a GPU, which are never gathered."""

from __future__ import annotations

import torch
from torch import Tensor

from dibit.codec.backends.triton.kernels import edges as kernels
from dibit.codec.backends.triton.launch import launch, parts, power
from dibit.codec.dispatch import kernel

_TILE = 128  # features that a program has: one warp, four a thread
_WIDEST = 1024  # features of a head that a program holds for scalar products and signs


def tiles(out: Tensor) -> tuple[int, int, tuple[int, int]]:
    """Features of a row, those of a program, and the grid: a program for each row and tile."""
    width = out.shape[1:].numel()
    tile = power(width, 16, _TILE)
    return width, tile, (out.shape[0], parts(width, tile))


def _add(
    out: Tensor, crow: Tensor, col: Tensor, order: Tensor | None, scale: Tensor | None, x: Tensor, heads: int
) -> None:
    width, tile, programs = tiles(out)
    launch(
        kernels.add_scaled,
        programs,
        out.device,
        crow,
        col,
        col if order is None else order,
        x if scale is None else scale,
        x,
        out,
        width,
        HEADS=heads,
        SCALED=scale is not None,
        ORDERED=order is not None,
        D=tile,
        warps=1,
    )


@kernel(out=torch.float32, x=torch.float32, values=torch.float32)
def add_neighbours(out: Tensor, crow: Tensor, col: Tensor, values: Tensor | None, x: Tensor) -> None:
    _add(out, crow, col, None, None if values is None else values.contiguous(), x, 1)


@kernel(out=torch.float32, x=torch.float32, scale=torch.float32)
def add_scaled(out: Tensor, crow: Tensor, col: Tensor, order: Tensor | None, scale: Tensor, x: Tensor) -> None:
    _add(out, crow, col, order, scale, x, out.shape[1])


@kernel(a=torch.float32, x=torch.float32)
def edge_products(crow: Tensor, col: Tensor, order: Tensor | None, a: Tensor, x: Tensor) -> Tensor:
    rows, heads, width = a.shape
    if width > _WIDEST:
        return NotImplemented
    out = a.new_empty(col.numel(), heads)
    launch(
        kernels.edge_products,
        (rows, heads),
        a.device,
        crow,
        col,
        col if order is None else order,
        a,
        x,
        out,
        width,
        heads,
        ORDERED=order is not None,
        D=power(width, 16),
        warps=1,
    )
    return out


@kernel(a=torch.float32, b=torch.float32)
def edge_signs(crow: Tensor, col: Tensor, order: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    rows, heads, width = a.shape
    if width > _WIDEST:
        return NotImplemented
    signs = torch.empty(col.numel(), heads, parts(width, 8), dtype=torch.uint8, device=a.device)
    launch(
        kernels.edge_signs,
        (rows, heads),
        a.device,
        crow,
        col,
        col if order is None else order,
        a,
        b,
        signs,
        width,
        heads,
        ORDERED=order is not None,
        B=power(parts(width, 8)),
        warps=1,
    )
    return signs


@kernel(out=torch.float32, scale=torch.float32)
def add_signed(out: Tensor, crow: Tensor, order: Tensor | None, signs: Tensor, scale: Tensor, slope: float) -> None:
    width, tile, programs = tiles(out)
    launch(
        kernels.add_signed,
        programs,
        out.device,
        crow,
        crow if order is None else order,
        signs,
        scale,
        out,
        width,
        float(slope),
        HEADS=out.shape[1],
        ORDERED=order is not None,
        D=tile,
        warps=1,
    )
