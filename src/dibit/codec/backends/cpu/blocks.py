"""Blocks of numbers to packed codes, and back, on a CPU."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from dibit._torch.autocast import HALF, at_least_single
from dibit._torch.huge_pages import empty
from dibit.codec.backends import reference
from dibit.codec.backends.cpu.arguments import float32_ranges, keys
from dibit.codec.backends.cpu.kernels import blocks as kernels
from dibit.codec.dispatch import kernel
from dibit.codec.layout import Layout, row_parts
from dibit.codec.numpy_views import array


@functools.lru_cache(maxsize=64)
def _search(levels: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Levels as float32, and for the upper bits of each number up to the last one how many inner levels lie below."""
    table = np.array(levels, np.float32)
    if not levels:
        return table, np.empty(0, np.uint8)
    upper = np.arange((table[-1:].view(np.int32)[0] >> kernels.SEARCH_SHIFT) + 1, dtype=np.int32)
    smallest = (upper << kernels.SEARCH_SHIFT).view(np.float32)
    return table, np.searchsorted(table[1:-1], smallest, side="right").astype(np.uint8)


@kernel(x=torch.float32)
def quantize(
    x: Tensor,
    seed: Tensor,
    bits: int,
    block: int,
    levels: list[float],
    stats: torch.dtype,
    rounding: int,
    number: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    n, half = x.numel(), stats == torch.bfloat16
    layout = Layout(n, block, bits)
    codes = torch.empty(layout.code_bytes, dtype=torch.uint8)
    ranges = torch.empty((layout.blocks, 2), dtype=stats)
    widths = torch.empty(layout.blocks)
    if n:
        plain = np.empty((0, 2), np.float32) if half else array(ranges)
        packed = array(ranges.view(torch.int16)) if half else np.empty((0, 2), np.int16)
        data = array(x.contiguous())
        kernels.quantize(
            n,
            data,
            data.view(np.int32),
            array(codes),
            plain,
            packed,
            array(widths),
            *keys(seed),
            bits,
            block,
            *_search(tuple(levels)),
            half,
            rounding,
            number,
        )
    return codes, ranges, widths


def quantize_rows(
    x: Tensor,
    index: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    seed: Tensor,
    bits: int,
    block: int,
    levels: list[float],
    stats: torch.dtype,
    rounding: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """In parts, so that no tensor of full size is made."""
    rows, width = x.shape[0] if index is None else index.shape[0], x.shape[1]
    if index is None and shift is None and x.dtype not in HALF:
        return quantize(x.reshape(-1), seed, bits, block, levels, stats, rounding)
    found = []
    for start, stop in row_parts(rows, width, block):
        part = x[start:stop] if index is None else x.index_select(0, index[start:stop])
        if shift is not None and scale is not None:
            part = reference.affine(part, shift, scale)
        flat = at_least_single(part).reshape(-1)
        found.append(quantize(flat, seed, bits, block, levels, stats, rounding, start * width))
    codes, ranges, widths = (torch.cat(same) for same in zip(*found, strict=True))
    return codes, ranges, widths


@kernel(dtype=(torch.float32, *HALF))
def dequantize(
    codes: Tensor,
    ranges: Tensor,
    seed: Tensor,
    numel: int,
    bits: int,
    block: int,
    levels: list[float],
    dither: float,
    dtype: torch.dtype,
    number: int = 0,
) -> Tensor:
    out = empty((numel,), torch.float32)
    if numel:
        kernels.dequantize(
            numel,
            array(codes),
            float32_ranges(ranges),
            array(out),
            *keys(seed),
            bits,
            block,
            np.array(levels, np.float32),
            np.float32(dither),
            number,
        )
    return reference.cast_clamped(out, dtype)
