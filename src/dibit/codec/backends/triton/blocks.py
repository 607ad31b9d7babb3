"""Blocks of numbers to packed codes, and back, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dibit.codec.backends.reference import NEAREST
from dibit.codec.backends.triton.kernels import blocks as kernels
from dibit.codec.backends.triton.launch import SINGLE, as_bits, constant, launch, on_device, parts, power
from dibit.codec.dispatch import kernel
from dibit.codec.layout import Layout, packed_bytes

_MOST = 2048  # bytes of a block that one program takes whole
_TILE = 1024  # bytes that a program takes of blocks that several share
_ELEMENTS = 4096  # that a program takes of whole blocks


@kernel(x=SINGLE)
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
    return _quantize(x, None, None, None, x.numel(), 0, seed, bits, block, levels, stats, rounding, number)


@kernel(x=SINGLE, shift=torch.float32)
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
    if index is None and shift is None:
        return quantize(x.reshape(-1), seed, bits, block, levels, stats, rounding)
    n = x.numel() if index is None else index.shape[0] * x.shape[1]
    return _quantize(x, index, shift, scale, n, x.shape[1], seed, bits, block, levels, stats, rounding, 0)


def _quantize(
    x: Tensor,
    index: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    n: int,
    width: int,
    seed: Tensor,
    bits: int,
    block: int,
    levels: list[float],
    stats: torch.dtype,
    rounding: int,
    number: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Equal blocks in one launch, the short one at the end in another."""
    layout = Layout(n, block, bits)
    size = layout.block_bytes
    codes = x.new_empty(layout.code_bytes, dtype=torch.uint8)
    ranges = x.new_empty((layout.blocks, 2), dtype=stats)
    widths = x.new_empty(layout.blocks, dtype=torch.float32)
    table = on_device(levels, x.device, widths)
    meta = {
        "BITS": bits,
        "LEVELS": bool(levels),
        "NEAREST": rounding == NEAREST,
        "HALF": stats == torch.bfloat16,
        "WIDTH": width,
        "GATHER": index is not None,
        "AFFINE": shift is not None,
    }
    moved = tuple(x if part is None else part.contiguous() for part in (index, shift, scale))
    source = x.contiguous()
    for count, own, start, at, row in _launches(layout):
        t, b, chunks, fixed = _shape(layout, count, own)
        ends = widths
        if chunks > 1:
            ends = x.new_empty((count, 2), dtype=torch.int32)
            ends[:, 0], ends[:, 1] = 2**31 - 1, -(2**31)
            some = {name: meta[name] for name in ("WIDTH", "GATHER", "AFFINE")}
            pieces = parts(own, _TILE)
            launch(kernels.ends, (count * pieces,), x.device, source, *moved, ends, own, start, pieces, **some, T=_TILE)
        launch(
            kernels.quantize,
            (parts(count, b) * chunks,),
            x.device,
            source,
            *moved,
            seed,
            ends,
            table,
            codes[at:],
            as_bits(ranges[row:]),
            widths[row:],
            count,
            own,
            start,
            number + start,
            chunks,
            BLOCK=fixed,
            SHARED=chunks > 1,
            **meta,
            RUN=size if fixed and width and width % size == 0 else 0,
            B=b,
            T=t,
            warps=8,
        )
    return codes, ranges, widths


def _launches(layout: Layout) -> Iterator[tuple[int, int, int, int, int]]:
    """How many blocks of how many elements, first element, byte and block: the full ones, and the short one."""
    full = layout.full
    if full:
        yield full, layout.block, 0, 0, 0
    if layout.tail:
        yield 1, layout.tail, full * layout.block, full * layout.block_bytes, full


def _shape(layout: Layout, count: int, own: int) -> tuple[int, int, int, int]:
    """Bytes and blocks of a program's tile, programs a block, and the block that the code is compiled for (0: none).

    That one has a power of two of elements, so that a run of `size` elements begins at a multiple of it. The short
    block's tile is as wide as the others'.
    """
    t, bytes_ = power(layout.block_bytes, most=_MOST), packed_bytes(own, layout.bits)
    if bytes_ > t:
        return _TILE, 1, parts(bytes_, _TILE), 0
    fixed = constant(own) if own == layout.block else 0
    if count == 1:
        return max(64, t), 1, 1, fixed  # a smaller tile would be a scalar
    return t, max(1, _ELEMENTS * layout.bits // 8 // t), 1, fixed


@kernel(ranges=SINGLE, dtype=SINGLE)
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
    out = codes.new_empty(numel, dtype=dtype)
    layout = Layout(numel, block, bits)
    table = on_device(levels, codes.device, out)
    for count, own, start, at, row in _launches(layout):
        t, b, chunks, fixed = _shape(layout, count, own)
        launch(
            kernels.dequantize,
            (parts(count, b) * chunks,),
            codes.device,
            codes[at:],
            as_bits(ranges[row:]),
            seed,
            table,
            out[start:],
            count,
            own,
            number + start,
            float(dither),
            chunks,
            BLOCK=fixed,
            SHARED=chunks > 1,
            BITS=bits,
            LEVELS=bool(levels),
            DITHERED=dither != 0,
            HALF=ranges.dtype == torch.bfloat16,
            CLAMP=65504.0 if dtype == torch.float16 else 0.0,
            B=b,
            T=t,
        )
    return out
