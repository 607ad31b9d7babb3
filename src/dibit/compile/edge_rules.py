"""The rules of compiled code for gathers by edges, products with weights of edges, and sums by target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dibit.compile import edges
from dibit.edges import functions
from dibit.rules.registry import table


def _rows(x: Any) -> bool:
    """Whether x may be a tensor of rows of which sums over edges are computed. (`x.is_cpu` is not traced.)"""
    if not isinstance(x, Tensor) or type(x) not in (Tensor, torch.nn.Parameter) or x.layout != torch.strided:
        return False
    return x.dtype == torch.float32 and x.dim() >= 2 and x.device.type == "cpu"


def _index(index: Any, dim: int = 1) -> bool:
    return type(index) is Tensor and index.dtype == torch.int64 and index.dim() == dim and index.device.type == "cpu"


def index_select(mode: Any, input: Any, dim: Any, index: Any, *, out: Any = None) -> Any:
    if out is not None or not _rows(input) or dim not in (0, -input.dim()) or not _index(index):
        return NotImplemented
    return edges.gather(input, index, "index_select", functions.MIN_DEFERRED_ELEMENTS)


def getitem(mode: Any, input: Any, index: Any) -> Any:
    if not _rows(input) or not _index(index):
        return NotImplemented
    return edges.gather(input, index, "getitem", functions.MIN_DEFERRED_ELEMENTS)


def gather(mode: Any, input: Any, dim: Any, index: Any, *, sparse_grad: bool = False, out: Any = None) -> Any:
    if out is not None or sparse_grad or not _rows(input) or dim not in (0, -input.dim()):
        return NotImplemented
    if not _index(index, input.dim()):
        return NotImplemented
    return edges.gather(input, index, "gather", functions.MIN_DEFERRED_ELEMENTS)


def mul(mode: Any, input: Any, other: Any, *, out: Any = None) -> Any:
    if out is not None or not _rows(input) or not _rows(other) or input.dim() != other.dim():
        return NotImplemented
    return edges.scale(input, other)


def new_zeros(mode: Any, input: Any, *size: Any, **options: Any) -> Any:
    """What a scatter begins with: torch's partitioner would keep it for the backward pass, which needs zeros too."""
    return NotImplemented if options or not size or not _float(input) else edges.zeros(input, _sizes(size))


def new_ones(mode: Any, input: Any, *size: Any, **options: Any) -> Any:
    """What a mean counts: made of the messages' dtype alone, so that a compiler need not have the messages."""
    if options or not size or not _float(input):
        return NotImplemented
    return torch.ones(_sizes(size), dtype=input.dtype, device=input.device)


def _float(x: Any) -> bool:
    plain = isinstance(x, Tensor) and type(x) in (Tensor, torch.nn.Parameter) and x.layout == torch.strided
    return plain and x.is_floating_point() and x.dim() > 0


def _sizes(size: tuple[Any, ...]) -> list[Any]:
    return list(size[0] if isinstance(size[0], (tuple, list)) else size)


def _sums(operator: Any, how: str) -> Any:
    """The rule of a sum by target."""
    own = how == "index_add"

    def apply(mode: Any, input: Any, dim: Any, index: Any, src: Any = None, **more: Any) -> Any:
        src = more.pop("source", src)
        if more or not _rows(input) or not _rows(src) or dim not in (0, -input.dim()) or input.dim() != src.dim():
            return NotImplemented
        return operator(input, index, src, how) if _index(index, 1 if own else src.dim()) else NotImplemented

    return apply


# By name; see `dibit.rules.registry.table`.
RULES: dict[Any, Any] = table(
    {
        "index_select": index_select,
        "__getitem__": getitem,
        "gather": gather,
        "mul": mul,
        "new_zeros": new_zeros,
        "new_ones": new_ones,
        "scatter_add": _sums(edges.sum_rows, "scatter_add"),
        "scatter_add_": _sums(edges.sum_, "scatter_add"),
        "index_add": _sums(edges.sum_rows, "index_add"),
        "index_add_": _sums(edges.sum_, "index_add"),
    }
)
