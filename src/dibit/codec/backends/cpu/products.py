"""Products with what was encoded, and with sparse matrices, on a CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dibit._torch.huge_pages import empty_like
from dibit.codec.backends.cpu.arguments import float32_ranges, keys
from dibit.codec.backends.cpu.blocks import dequantize
from dibit.codec.backends.cpu.kernels import products as kernels
from dibit.codec.backends.cpu.kernels.numbers import CHUNK
from dibit.codec.dispatch import kernel
from dibit.codec.layout import Layout, row_parts
from dibit.codec.numpy_views import array


def weight_gradient(
    codes: Tensor,
    ranges: Tensor,
    seed: Tensor,
    dy: Tensor,
    index: Tensor | None,
    weight: Tensor | None,
    rows: int,
    width: int,
    bits: int,
    block: int,
    levels: list[float],
    dither: float,
) -> Tensor:
    """In parts, so that no tensor of full size is made."""
    dtype = torch.float64 if dy.dtype == torch.float64 else torch.float32
    grad = dy.new_zeros((dy.shape[1], width), dtype=dtype)
    for start, stop in row_parts(rows, width, block):
        first, part = start * width, Layout((stop - start) * width, block, bits)
        begin, size = first // block, part.block_bytes
        end = begin + part.blocks
        x = dequantize(
            codes[begin * size : end * size],
            ranges[begin:end],
            seed,
            part.elements,
            bits,
            block,
            levels,
            dither,
            dtype,
            first,
        ).view(-1, width)
        if index is None or weight is None:
            own = dy[start:stop].to(dtype)
        else:
            own = dy.index_select(0, index[start:stop]).to(dtype).mul_(weight[start:stop, None])
        grad.addmm_(own.T, x)
    return grad


@kernel(g=torch.float32)
def column_sums(codes: Tensor, ranges: Tensor, seed: Tensor, g: Tensor, bits: int, block: int, dither: float) -> Tensor:
    tasks = max(1, min(64, g.numel() // CHUNK))
    sums = torch.zeros(tasks, g.shape[1])
    if g.numel():
        kernels.column_sums(
            g.numel(),
            array(codes),
            float32_ranges(ranges),
            array(g).reshape(-1),
            array(sums),
            *keys(seed),
            bits,
            block,
            np.float32(dither),
        )
    return sums.sum(0)


@kernel(g=torch.float32)
def norm_gradient(
    codes: Tensor,
    ranges: Tensor,
    seed: Tensor,
    g: Tensor,
    shift: Tensor,
    factor: Tensor,
    gain: Tensor,
    bits: int,
    block: int,
    dither: float,
) -> Tensor:
    out = empty_like(g)
    if g.numel():
        rows = (array(part.contiguous()) for part in (shift, factor, gain))
        kernels.norm_gradient(
            g.numel(),
            array(codes),
            float32_ranges(ranges),
            array(g).reshape(-1),
            array(out).reshape(-1),
            *rows,
            *keys(seed),
            bits,
            block,
            np.float32(dither),
        )
    return out
