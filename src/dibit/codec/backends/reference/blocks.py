"""Blocks of numbers to packed codes, and back. `dibit.codec.layout` says where the codes of a block lie."""

import torch
from torch import Tensor

from dibit._torch.autocast import at_least_single
from dibit._torch.huge_pages import empty
from dibit.codec import rng
from dibit.codec.layout import Layout, packed_bytes

# The operators' schemas are read off these signatures: annotations must be types, not strings.

STOCHASTIC, NEAREST = 0, 1  # rounding modes as the operators take them


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
    """Quantise a flat tensor block by block, and pack the codes (i-EXACT, section 3.1).

    Args:
        x: floating point (n,); half precision is taken to float32 on the way.
        seed: int64 0-d; element i is rounded by the random number of (seed, number + i).
        bits: 1, 2, 4 or 8.
        block: elements that share a range.
        levels: 2**bits levels in [0, 2**bits - 1]; empty for uniform ones.
        stats: dtype of the stored ranges, bfloat16 or the dtype of x.
        rounding: `STOCHASTIC` or `NEAREST`.
        number: the number of the first element, where x is a part of a longer tensor; it must begin a block.

    Returns:
        codes uint8 (bytes,); ranges (blocks, 2), low and high, rounded outwards, NaN where a block is not finite;
        widths (blocks,), high - low before that rounding, in the dtype of x.
    """
    x = at_least_single(x)
    layout = Layout(x.numel(), block, bits)
    full = layout.full * block
    parts = [
        _quantize_rows(part.view(rows, -1), number + start, seed, bits, levels, stats, rounding)
        for part, rows, start in ((x[:full], layout.full, 0), (x[full:], 1, full))
        if part.numel()
    ]
    if not parts:
        return x.new_empty(0, dtype=torch.uint8), x.new_empty((0, 2), dtype=stats), x.new_empty(0)
    codes, ranges, widths = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(ranges), torch.cat(widths)


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
    """`quantize` of rows of a matrix, which are gathered, shifted and scaled on the way.

    Args:
        x: floating point (N, D).
        index: int64 (m,), the rows; `None`: all.
        shift, scale: (D,); (x - shift) * scale is encoded. `None`: x.
        seed, bits, block, levels, stats, rounding: as in `quantize`.
    """
    if index is not None:
        x = x.index_select(0, index)
    if shift is not None and scale is not None:
        x = affine(x, shift, scale)
    return quantize(x.reshape(-1), seed, bits, block, levels, stats, rounding)


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
    """The inverse of `quantize`: an unbiased estimate of x, flat (numel,), of `dtype`.

    Args:
        codes, ranges: what `quantize` returned.
        seed, bits, block, levels, number: as they were given to it.
        numel: elements of x.
        dither: this weight times (u - 1/2) bins is added to each level, u being the random number that rounded the
            element (uniform levels only). All weights are unbiased. With 1 the error is uniform over one bin whatever
            x is: half the variance on average. With 2 the error is uncorrelated with that of weight 0, so that the
            product of the two has mean x^2.
        dtype: of the result.
    """
    layout = Layout(numel, block, bits)
    full, bytes_full = layout.full, layout.full * layout.block_bytes
    parts = [
        _dequantize_rows(part.view(rows, -1), rng_part, number + start, size, seed, bits, levels, dither, dtype)
        for part, rng_part, rows, size, start in (
            (codes[:bytes_full], ranges[:full], full, block, 0),
            (codes[bytes_full:], ranges[full:], 1, layout.tail, full * block),
        )
        if rows and size
    ]
    return torch.cat([part.reshape(-1) for part in parts]) if parts else ranges.new_empty(0, dtype=dtype)


def affine(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(x - shift) * scale for x (N, D) and shift, scale (D,): in their dtype, in a tensor of its own."""
    x = x.to(shift.dtype)
    return torch.sub(x, shift, out=empty(x.shape, x.dtype, x.device)).mul_(scale)


def dither_variance(ranges: Tensor, numel: int, bits: int, block: int) -> Tensor:
    """The variance (numel,) of what `dequantize` gives with `dither` 1: a twelfth of a bin's square, whatever x is."""
    work = torch.float64 if ranges.dtype == torch.float64 else torch.float32
    step = (ranges[:, 1].to(work) - ranges[:, 0].to(work)) / (2**bits - 1)
    return (step.square() / 12).repeat_interleave(block)[:numel]


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (blocks, G) below 2^bits to bytes (blocks, Q)."""
    blocks, count = codes.shape
    slots, size = 8 // bits, packed_bytes(count, bits)
    padded = torch.nn.functional.pad(codes, (0, slots * size - count)).view(blocks, slots, size)
    shift = torch.arange(slots, device=codes.device, dtype=torch.int32) * bits
    return (padded.int() << shift[:, None]).sum(1).to(torch.uint8)  # torch sums only into int64; bytes never overlap


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """Bytes (blocks, Q) to uint8 codes (blocks, count)."""
    slots, (blocks, size) = 8 // bits, packed.shape
    shift = torch.arange(slots, device=packed.device, dtype=torch.uint8) * bits
    codes = (packed[:, None, :] >> shift[:, None]) & (2**bits - 1)
    return codes.reshape(blocks, slots * size)[:, :count]


def unpack_all(packed: Tensor, numel: int, block: int, bits: int) -> Tensor:
    """All codes of a flat tensor of `numel` elements in blocks of `block`: uint8 (numel,)."""
    layout = Layout(numel, block, bits)
    full, size = layout.full, layout.block_bytes
    codes = unpack(packed[: full * size].view(full, size), block, bits).reshape(-1)
    return torch.cat((codes, unpack(packed[full * size :].view(1, -1), layout.tail, bits).view(-1)))


def round_outward(low: Tensor, high: Tensor, stats: torch.dtype) -> tuple[Tensor, Tensor]:
    """`low` rounded down and `high` rounded up to `stats`, so that every element lies inside the stored range."""
    if stats == low.dtype:
        return low, high
    down, up = low.to(stats), high.to(stats)
    infinity = torch.tensor(float("inf"), dtype=stats, device=low.device)
    down = torch.where(down.to(low.dtype) > low, torch.nextafter(down, -infinity), down)
    up = torch.where(up.to(high.dtype) < high, torch.nextafter(up, infinity), up)
    return down, up


def cast_clamped(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in `dtype`. A range rounded outwards may lie beyond float16's largest number: no infinity comes of it."""
    if dtype == torch.float16:
        value = value.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return value.to(dtype)


def _quantize_rows(
    x: Tensor, start: int, seed: Tensor, bits: int, levels: list[float], stats: torch.dtype, rounding: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize` of blocks of one size, the rows of x."""
    top = 2**bits - 1
    low, high = x.aminmax(dim=1, keepdim=True)
    finite = low.isfinite() & high.isfinite()
    nan = torch.full_like(low, float("nan"))  # a block with NaN or inf decodes to NaN: never a finite lie
    low, high = torch.where(finite, low, nan), torch.where(finite, high, nan)
    stored = round_outward(low, high, stats)
    zero, width, scale = _range_parameters(*(end.to(x.dtype) for end in stored))
    h = torch.where(width > 0, (x * scale - zero) / width * top, 0)
    if levels:
        grid = torch.tensor(levels, dtype=x.dtype, device=x.device)
        below = torch.bucketize(h, grid[1:-1], right=True)
        fraction = (h - grid[below]) / (grid[below + 1] - grid[below])
    else:
        below = h.to(torch.int32)
        fraction = h - below
    if rounding == NEAREST:
        up = fraction >= 0.5
    else:
        up = rng.uniform_range(start, start + x.numel(), seed).view(x.shape) < fraction
    codes = (below + up).clamp_(max=top).to(torch.uint8)
    return pack(codes, bits).reshape(-1), torch.cat(stored, dim=1), (high - low).reshape(-1)


def _dequantize_rows(
    packed: Tensor,
    ranges: Tensor,
    start: int,
    count: int,
    seed: Tensor,
    bits: int,
    levels: list[float],
    dither: float,
    dtype: torch.dtype,
) -> Tensor:
    """`dequantize` of blocks of one size, (blocks, count)."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    codes = unpack(packed, count, bits)
    h = torch.tensor(levels, dtype=work, device=packed.device)[codes.int()] if levels else codes.to(work)
    low, high = ranges[:, :1].to(work), ranges[:, 1:].to(work)
    zero, width, scale = _range_parameters(low, high)
    step = width / (2**bits - 1)
    if dither:
        u = rng.uniform_range(start, start + codes.numel(), seed).view(codes.shape).to(work)
        value = ((h + (u - (0.5 - rng.UNIT / 2)) * dither) * step + zero) / scale
        most = torch.finfo(work).max  # dither goes half a bin beyond the range
        return cast_clamped(value.clamp(-most, most), dtype)
    value = (h * step + zero) / scale
    return cast_clamped(torch.where(value > high, high, torch.where(value < low, low, value)), dtype)


def _range_parameters(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zero point, width and scale of ranges; the scale is 1/2 where high - low would overflow."""
    scale = torch.where((high - low).isinf(), 0.5, 1.0).to(low.dtype)
    zero = low * scale
    return zero, high * scale - zero, scale
