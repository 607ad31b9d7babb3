"""Which neighbours attain the maximum or minimum of a node, on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from dibit.codec.backends.cpu.kernels import winners as kernels
from dibit.codec.backends.reference.winners import first_planes
from dibit.codec.dispatch import kernel
from dibit.codec.numpy_views import array


@kernel(out=torch.float32, x=torch.float32)
def edge_extremes(out: Tensor, crow: Tensor, col: Tensor, x: Tensor, least: bool) -> None:
    kernels.edge_extremes(max(out.numel(), col.numel()), array(crow), array(col), array(x), array(out), least)


@kernel(x=torch.float32, y=torch.float32)
def edge_winners(crow: Tensor, col: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    many = torch.zeros(y.shape[0], dtype=torch.bool)
    for known in (False, True):  # that a node has many is found on the way, and seldom
        first = first_planes(crow, many)
        planes = torch.empty(int(first[-1]), -(-y.shape[1] // 8), dtype=torch.uint8)
        graph = array(crow), array(col), array(first)
        work = max(y.numel(), col.numel())
        kernels.edge_winners(work, *graph, array(x), array(y), array(planes), array(many), known)
        if not bool(many.any()):
            break
    return planes, many


@kernel(out=torch.float32, grad=torch.float32)
def add_winners(
    out: Tensor, crow: Tensor, col: Tensor | None, planes: Tensor, many: Tensor, grad: Tensor, initial: Tensor | None
) -> None:
    col = torch.arange(out.shape[0], dtype=crow.dtype) if col is None else col
    graph = array(crow), array(col), array(first_planes(crow, many))
    has = initial is not None
    before = array(initial) if initial is not None else array(planes.new_empty(0, planes.shape[1]))
    work = max(out.numel(), grad.numel())
    kernels.add_winners(work, *graph, array(planes), array(many), array(grad), before, has, array(out))
