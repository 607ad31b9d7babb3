"""Which neighbours attain the maximum or minimum of a node, on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dibit.codec.backends.reference.winners import first_planes
from dibit.codec.backends.triton.edges import tiles
from dibit.codec.backends.triton.kernels import winners as kernels
from dibit.codec.backends.triton.launch import launch, parts
from dibit.codec.dispatch import kernel


@kernel(out=torch.float32, x=torch.float32)
def edge_extremes(out: Tensor, crow: Tensor, col: Tensor, x: Tensor, least: bool) -> None:
    width, tile, programs = tiles(out)
    launch(kernels.edge_extremes, programs, out.device, crow, col, x, out, width, LEAST=bool(least), D=tile, warps=1)


@kernel(x=torch.float32, y=torch.float32)
def edge_winners(crow: Tensor, col: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    width, tile, programs = tiles(y)
    code, tied = torch.empty_like(y, dtype=torch.int32), y.new_empty(programs, dtype=torch.uint8)
    launch(kernels.find_winners, programs, y.device, crow, col, x, y, code, tied, width, programs[1], D=tile, warps=1)
    many = tied.bool().any(1)
    first = first_planes(crow, many)
    planes = y.new_empty(int(first[-1]), parts(width, 8), dtype=torch.uint8)  # the device is waited for
    graph = crow, col, first, many.view(torch.uint8)
    launch(kernels.pack_winners, programs, y.device, *graph, x, y, code, planes, width, B=tile // 8, warps=1)
    return planes, many


@kernel(out=torch.float32, grad=torch.float32)
def add_winners(
    out: Tensor, crow: Tensor, col: Tensor | None, planes: Tensor, many: Tensor, grad: Tensor, initial: Tensor | None
) -> None:
    first, rows = first_planes(crow, many), torch.repeat_interleave(crow.diff(), output_size=_edges(out, col))
    share, graph = torch.empty_like(grad), (crow, first, many.view(torch.uint8), planes)
    width, tile, programs = tiles(grad)
    launch(
        kernels.share_gradient,
        programs,
        out.device,
        *graph,
        grad,
        planes if initial is None else initial,
        share,
        width,
        INITIAL=initial is not None,
        D=tile,
        warps=1,
    )
    pointers = order = rows
    if col is not None:
        col, order = col.sort(stable=True)
        pointers = torch.searchsorted(col, torch.arange(out.shape[0] + 1, dtype=col.dtype, device=col.device))
    launch(
        kernels.add_winners,
        tiles(out)[2],
        out.device,
        pointers,
        order,
        rows,
        *graph,
        share,
        out,
        width,
        GATHERED=col is not None,
        D=tile,
        warps=1,
    )


def _edges(out: Tensor, col: Tensor | None) -> int:
    return out.shape[0] if col is None else col.numel()
