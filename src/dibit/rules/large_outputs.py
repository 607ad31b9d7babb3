"""Linear layers, products and BatchNorm of plain torch, whose large result goes into a buffer of Dibit's own.

The bits are the same, with fewer page faults. Nothing is kept here; `dibit.rules.linear` and `dibit.rules.norm` call
these functions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dibit._torch.huge_pages import MIN_BYTES, empty, empty_like, worth_huge_pages
from dibit._torch.private import modes, operations

_ROWS = 1 << 13  # of a product in parts: enough for its full speed, little enough for the caches


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b for x (N, D), W (O, D)."""
    if not _plain(x, weight) or (bias is not None and bias.dtype != x.dtype) or not _pays(x, weight.shape[0]):
        return F.linear(x, weight, bias)
    out = empty((x.shape[0], weight.shape[0]), x.dtype)
    return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)


def mm(x: Tensor, weight: Tensor) -> Tensor:
    """x W for x (..., D), W (D, O)."""
    if not _plain(x, weight) or not _pays(x, weight.shape[1]):
        return x @ weight
    return torch.mm(x, weight, out=empty((x.shape[0], weight.shape[1]), x.dtype))


def mm_over(x: Tensor, weight: Tensor) -> Tensor:
    """x W, over x where W is square and x large: a buffer less at the worst moment of the backward pass. x is spent."""
    if not _plain(x, weight) or weight.shape[0] != weight.shape[1] or not _pays(x, weight.shape[1]):
        return mm(x, weight)
    part = x.new_empty(min(_ROWS, x.shape[0]), x.shape[1])
    for rows in x.split(_ROWS):
        rows.copy_(torch.mm(rows, weight, out=part[: rows.shape[0]]))
    return x


def batch_norm(
    x: Tensor, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm of x, and the mean and inverse standard deviation (D,) that it used."""
    settings = weight, bias, running_mean, running_var, training, momentum, eps
    plain = x.dim() == 2 and x.is_contiguous() and x.dtype == torch.float32
    if operations.WRITES_BATCH_NORM and training and plain and worth_huge_pages(x):
        return operations.batch_norm_into(empty_like(x), x, *settings)
    y, mean, inverse = operations.batch_norm(x, *settings)
    if not training:
        mean, inverse = running_mean, torch.rsqrt(running_var + eps)
    return y, mean, inverse


def _plain(x: Tensor, weight: Tensor) -> bool:
    """Two matrices on the CPU in one dtype, without autocast in the way."""
    same = x.dim() == 2 and x.device.type == "cpu" and x.dtype == weight.dtype
    return same and not modes.autocasts("cpu")


def _pays(x: Tensor, width: int) -> bool:
    return x.shape[0] * width * x.element_size() >= MIN_BYTES
