"""Products with what was encoded, on a GPU; the encoded tensor is never formed."""

from __future__ import annotations

import torch
from torch import Tensor

from dibit.codec.backends.triton.kernels import products as kernels
from dibit.codec.backends.triton.launch import SINGLE, as_bits, constant, launch, on_device, parts, power
from dibit.codec.dispatch import kernel
from dibit.codec.layout import Layout

_LARGEST = 8192  # elements of a block; larger ones are unpacked before they are multiplied
_TILE = 1024  # elements that a program holds at once
_PRECISION = "ieee" if torch.version.hip else "tf32x3"  # on tensor cores, to float32's own precision
_PROGRAMS = 264  # twice the multiprocessors of an H100: into so many parts a sum is cut


def _packing(
    ranges: Tensor, rows: int, width: int, bits: int, block: int
) -> tuple[tuple[int, ...], dict[str, int | bool]] | None:
    """Numbers and constants that kernels over an encoded matrix take; `None` where they do not serve."""
    if block > _LARGEST or not rows * width:
        return None
    layout = Layout(rows * width, block, bits)
    numbers = rows, block, layout.full, max(1, layout.tail_bytes)
    return numbers, {
        "WIDTH": width,
        "BLOCK": constant(block),
        "BITS": bits,
        "HALF": ranges.dtype == torch.bfloat16,
        "TAIL": layout.tail != 0,
    }


@kernel(ranges=SINGLE, dy=SINGLE)
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
    packing = _packing(ranges, rows, width, bits, block)
    if packing is None or not dy.numel():
        return NotImplemented
    numbers, meta = packing
    columns = dy.shape[1]
    r, c, d = 16, power(columns, 16, 64), power(width, 16, 64)
    tiles = parts(columns, c) * parts(width, d)
    share = parts(parts(rows, max(1, _PROGRAMS // tiles)), r) * r
    slabs = dy.new_empty((parts(rows, share), columns, width), dtype=torch.float32)
    launch(
        kernels.weight_gradient,
        (tiles, slabs.shape[0]),
        dy.device,
        codes,
        as_bits(ranges),
        on_device(levels, dy.device, slabs),
        seed,
        dy.contiguous(),
        *((dy, dy) if index is None else (index, weight)),
        slabs,
        *numbers,
        share,
        columns,
        float(dither),
        **meta,
        LEVELS=bool(levels),
        DITHERED=dither != 0,
        SAMPLED=index is not None,
        PRECISION=_PRECISION,
        R=r,
        C=c,
        D=d,
        warps=8,
    )
    return slabs.sum(0)


@kernel(ranges=SINGLE, g=torch.float32)
def column_sums(codes: Tensor, ranges: Tensor, seed: Tensor, g: Tensor, bits: int, block: int, dither: float) -> Tensor:
    packing = _packing(ranges, g.shape[0], g.shape[1], bits, block)
    if packing is None:
        return NotImplemented
    numbers, meta = packing
    rows, width = g.shape
    d = power(width, 16, 128)
    r, tiles = _TILE // d, parts(width, d)
    share = parts(parts(rows, max(1, 4 * _PROGRAMS // tiles)), r) * r
    sums = g.new_empty((parts(rows, share), width))
    launch(
        kernels.column_sums,
        (tiles, sums.shape[0]),
        g.device,
        codes,
        as_bits(ranges),
        sums,
        seed,
        g.contiguous(),
        sums,
        *numbers,
        share,
        float(dither),
        **meta,
        LEVELS=False,
        DITHERED=dither != 0,
        R=r,
        D=d,
    )
    return sums.sum(0)


@kernel(ranges=SINGLE, g=torch.float32)
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
    packing = _packing(ranges, g.shape[0], g.shape[1], bits, block)
    if packing is None:
        return NotImplemented
    out = torch.empty_like(g, memory_format=torch.contiguous_format)
    numbers, meta = packing
    rows, width = g.shape
    d = power(width, 16, 128)
    vectors = (part.contiguous() for part in (shift, factor, gain))
    launch(
        kernels.norm_gradient,
        (parts(rows, _TILE // d), parts(width, d)),
        g.device,
        codes,
        as_bits(ranges),
        out,
        seed,
        g.contiguous(),
        *vectors,
        out,
        *numbers,
        float(dither),
        **meta,
        DITHERED=dither != 0,
        R=_TILE // d,
        D=d,
    )
    return out
