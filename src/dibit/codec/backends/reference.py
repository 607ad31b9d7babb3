"""The codec's definition in plain torch, for any device. The other backends must agree with it code for code."""

from __future__ import annotations

import torch
from torch import Tensor

from dibit._torch.autocast import at_least_single
from dibit._torch.huge_pages import empty
from dibit.codec import rng
from dibit.codec.keep_probabilities import FIXED_POINT_ONE, keep_probabilities, sampling_start
from dibit.codec.layout import Layout, packed_bytes

STOCHASTIC, NEAREST = 0, 1  # rounding modes as the operators take them


def quantize(
    x: Tensor, seed: Tensor, bits: int, block: int, levels: list[float], stats: torch.dtype, rounding: int,
    number: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Codes, ranges as stored, and true widths of the blocks of a flat x; see `ops.quantize`."""
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
    x: Tensor, index: Tensor | None, shift: Tensor | None, scale: Tensor | None, seed: Tensor, bits: int, block: int,
    levels: list[float], stats: torch.dtype, rounding: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`quantize` of the rows `index` of a matrix, moved and scaled; see `ops.quantize_rows`."""
    if index is not None:
        x = x.index_select(0, index)
    if shift is not None and scale is not None:
        x = affine(x, shift, scale)
    return quantize(x.reshape(-1), seed, bits, block, levels, stats, rounding)


def affine(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(x - shift) * scale for x (N, D), rows of it (D,), in their dtype and in a tensor of its own."""
    x = x.to(shift.dtype)
    return torch.sub(x, shift, out=empty(x.shape, x.dtype, x.device)).mul_(scale)


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
    """The flat tensor of `numel` elements that `quantize` encoded, in `dtype`; see `ops.dequantize`."""
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


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (blocks, G) below 2^bits to bytes (blocks, Q)."""
    blocks, count = codes.shape
    slots, size = 8 // bits, packed_bytes(count, bits)
    padded = torch.nn.functional.pad(codes, (0, slots * size - count)).view(blocks, slots, size)
    shift = torch.arange(slots, device=codes.device, dtype=torch.int32) * bits
    return (
        (padded.int() << shift[:, None]).sum(1).to(torch.uint8)
    )  # int: torch sums only into int64, bytes never overlap


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


def _quantize_rows(
    x: Tensor, start: int, seed: Tensor, bits: int, levels: list[float], stats: torch.dtype, rounding: int
) -> tuple[Tensor, Tensor, Tensor]:
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


def column_sums(codes: Tensor, ranges: Tensor, seed: Tensor, g: Tensor, bits: int, block: int, dither: float) -> Tensor:
    """Sums over the rows of g times what was encoded."""
    x = dequantize(codes, ranges, seed, g.numel(), bits, block, [], dither, g.dtype)
    return (g * x.view(g.shape)).sum(0)


def norm_gradient(
    codes: Tensor, ranges: Tensor, seed: Tensor, g: Tensor, shift: Tensor, factor: Tensor, gain: Tensor, bits: int,
    block: int, dither: float,
) -> Tensor:  # fmt: skip
    """(g (1 + v / N) - shift - x * factor) * gain, x what was encoded and v its variance by dither 1."""
    x = dequantize(codes, ranges, seed, g.numel(), bits, block, [], dither, g.dtype).view(g.shape)
    if dither and g.numel():
        g = g * (1 + dither_variance(ranges, g.numel(), bits, block).to(g.dtype).view(g.shape) / g.shape[0])
    return (g - shift - x * factor) * gain


def dither_variance(ranges: Tensor, numel: int, bits: int, block: int) -> Tensor:
    """Of each element, as `dequantize` gives it with `dither` 1: a twelfth of a bin's square, whatever it is."""
    work = torch.float64 if ranges.dtype == torch.float64 else torch.float32
    step = (ranges[:, 1].to(work) - ranges[:, 0].to(work)) / (2**bits - 1)
    return (step.square() / 12).repeat_interleave(block)[:numel]


def weight_gradient(
    codes: Tensor, ranges: Tensor, seed: Tensor, dy: Tensor, index: Tensor | None, weight: Tensor | None, rows: int,
    width: int, bits: int, block: int, levels: list[float], dither: float,
) -> Tensor:  # fmt: skip
    """dY^T X for what was encoded; see `ops.weight_gradient`."""
    dtype = torch.float64 if dy.dtype == torch.float64 else torch.float32
    x = dequantize(codes, ranges, seed, rows * width, bits, block, levels, dither, dtype).view(rows, width)
    if index is None or weight is None:
        return dy.to(dtype).T @ x
    return dy.index_select(0, index).to(dtype).mul_(weight[:, None]).T @ x


def cast_clamped(value: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in `dtype`. A range rounded outwards may lie beyond float16's largest number: no infinity comes of it."""
    if dtype == torch.float16:
        value = value.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return value.to(dtype)


def _range_parameters(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zero point, width and scale of ranges; the scale is 1/2 where high - low would overflow."""
    scale = torch.where((high - low).isinf(), 0.5, 1.0).to(low.dtype)
    zero = low * scale
    return zero, high * scale - zero, scale


def pack_mask(x: Tensor) -> Tensor:
    """1 bit an element: not (x <= 0), torch's own rule for ReLU's gradient. Flat bytes, laid out as one block."""
    return pack((x <= 0).logical_not_().view(1, -1).to(torch.uint8), 1).view(-1)


def relu(x: Tensor) -> tuple[Tensor, Tensor]:
    """torch's ReLU and its mask."""
    return torch.relu(x), pack_mask(x)


def apply_mask(grad: Tensor, mask: Tensor, slope: float) -> Tensor:
    """`grad` where the bit is set, `grad * slope` elsewhere (0 for slope 0, whatever `grad` is)."""
    bits = unpack(mask.view(1, -1), grad.numel(), 1).view(grad.shape).bool()
    return torch.where(bits, grad, grad * slope if slope else torch.zeros_like(grad))


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x * m, m = 1 / (1 - p) with probability 1 - p (element i kept where uniform(seed, i) >= p), else 0."""
    keep = rng.uniform_range(0, x.numel(), seed).view(x.shape) >= p
    return x * torch.where(keep, dropout_scale(p, x.dtype), 0.0).to(x.dtype)


def norm_relu_dropout(
    x: Tensor, mean: Tensor, gain: Tensor, bias: Tensor, seed: Tensor, p: float
) -> tuple[Tensor, Tensor]:
    """Dropout of the ReLU of (x - mean) * gain + bias, and the ReLU's mask; see `ops.norm_relu_dropout`."""
    h = (x.to(mean.dtype) - mean) * gain + bias
    y = torch.where(h <= 0, 0, h)
    scale = dropout_scale(p, x.dtype)
    if p > 0:
        y = y * torch.where(rng.uniform_range(0, x.numel(), seed).view(x.shape) >= p, scale, 0.0)
    return y.to(x.dtype), pack_mask(h)


def relu_dropout_gradient(grad: Tensor, mask: Tensor, seed: Tensor, p: float) -> Tensor:
    """The gradient of dropout, then that of the ReLU before it."""
    return apply_mask(dropout(grad, seed, p) if p > 0 else grad, mask, 0.0)


def passed_rows(
    codes: Tensor, ranges: Tensor, seed: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None, slope: float,
    drop: Tensor | None, p: float, start: int, stop: int, rows: int, bits: int, block: int, dither: float,
) -> Tensor:  # fmt: skip
    """Rows of what a norm, a ReLU and dropout make of x_hat; see `ops.passed_rows`."""
    width = weight.shape[0]
    x = dequantize(codes, ranges, seed, rows * width, bits, block, [], dither, weight.dtype).view(rows, width)
    y = x * weight + bias
    if mask is not None:
        y = apply_mask(y, mask, slope)
    return (y if drop is None else dropout(y, drop, p))[start:stop].clone()


def dropout_scale(p: float, dtype: torch.dtype) -> float:
    """1 / (1 - p) rounded as torch's CPU dropout rounds it."""
    return float(torch.ones((), dtype=dtype).div_(1 - p))


def signs(seed: Tensor, count: int) -> Tensor:
    """The topmost of each element's 32 bits: 1 where it is clear, else -1."""
    top = rng.hash32(torch.arange(count, device=seed.device), seed) >> 31
    return (1 - 2 * top).to(torch.float32)


def row_scores(x: Tensor) -> Tensor:
    """The exponent bits of each row's squared norm in float32."""
    return (x.to(torch.float32).square().sum(1).view(torch.int32) >> 23).to(torch.uint8)


def pick_rows(scores: Tensor, seed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The rows in whose share of the summed probabilities `start + j` falls, j = 0 ... count - 1."""
    probability = keep_probabilities(scores, count)[scores.long()]
    at = sampling_start(seed) + torch.arange(count, device=scores.device) * FIXED_POINT_ONE
    index = torch.searchsorted(probability.cumsum(0), at, right=True)
    beyond = index >= scores.numel()
    index.clamp_(max=max(scores.numel() - 1, 0))
    weight = FIXED_POINT_ONE / probability[index].clamp(min=1).double()
    return index, torch.where(beyond, 0, weight).float()


def aggregate(crow: Tensor, col: Tensor, values: Tensor, x: Tensor) -> Tensor:
    """A x for a sparse A in compressed rows."""
    shape = crow.shape[0] - 1, x.shape[0]
    return torch.sparse.mm(torch.sparse_csr_tensor(crow, col, values, shape, check_invariants=False), x)


def finite(x: Tensor) -> Tensor:
    """float32 0-d: 0 where all of `x` is finite, else NaN; to be added to whatever stands for `x`."""
    return torch.where(x.isfinite().all(), 0.0, float("nan")).to(torch.float32)
