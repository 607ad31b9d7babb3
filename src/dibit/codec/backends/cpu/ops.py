"""The codec's operators on the CPU: tensors in, tensors out, Numba kernels between."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from dibit._torch.autocast import HALF, at_least_single
from dibit._torch.huge_pages import empty, empty_like
from dibit.codec.backends import reference
from dibit.codec.backends.cpu import kernels
from dibit.codec.keep_probabilities import keep_probabilities, sampling_start
from dibit.codec.layout import Layout, mask_bytes, row_parts
from dibit.codec.numpy_views import array
from dibit.codec.rng import M1, M2

_MASK64 = 2**64 - 1
_NOTHING = np.empty(0, np.uint8)


def _keys(seed: Tensor) -> tuple[np.uint32, np.uint32]:
    """`rng.keys` in Python's integers."""
    z = int(seed) & _MASK64
    z = ((z ^ (z >> 30)) * M1) & _MASK64
    z = ((z ^ (z >> 27)) * M2) & _MASK64
    z ^= z >> 31
    return np.uint32(z & 0xFFFFFFFF), np.uint32(z >> 32)


def _ranges32(ranges: Tensor) -> np.ndarray:
    return array(ranges.to(torch.float32))


@functools.lru_cache(maxsize=64)
def _search(levels: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Levels as float32, and for the upper bits of each number up to the last one how many inner levels lie below."""
    table = np.array(levels, np.float32)
    if not levels:
        return table, np.empty(0, np.uint8)
    keys = np.arange((table[-1:].view(np.int32)[0] >> kernels.KEY) + 1, dtype=np.int32)
    smallest = (keys << kernels.KEY).view(np.float32)
    return table, np.searchsorted(table[1:-1], smallest, side="right").astype(np.uint8)


def quantize(
    x: Tensor, seed: Tensor, bits: int, block: int, levels: list[float], stats: torch.dtype, rounding: int,
    number: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if x.dtype != torch.float32:
        return reference.quantize(x, seed, bits, block, levels, stats, rounding, number)
    n = x.numel()
    layout = Layout(n, block, bits)
    codes = torch.empty(layout.code_bytes, dtype=torch.uint8)
    ranges = torch.empty((layout.blocks, 2), dtype=stats)
    widths = torch.empty(layout.blocks)
    if n:
        half = stats == torch.bfloat16
        plain = np.empty((0, 2), np.float32) if half else array(ranges)
        packed = array(ranges.view(torch.int16)) if half else np.empty((0, 2), np.int16)
        data = array(x.contiguous())
        kernels.quantize(
            n, data, data.view(np.int32), array(codes), plain, packed, array(widths), *_keys(seed), bits, block,
            *_search(tuple(levels)), half, rounding, number,
        )  # fmt: skip
    return codes, ranges, widths


def quantize_rows(
    x: Tensor, index: Tensor | None, shift: Tensor | None, scale: Tensor | None, seed: Tensor, bits: int, block: int,
    levels: list[float], stats: torch.dtype, rounding: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
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


def weight_gradient(
    codes: Tensor, ranges: Tensor, seed: Tensor, dy: Tensor, index: Tensor | None, weight: Tensor | None, rows: int,
    width: int, bits: int, block: int, levels: list[float], dither: float,
) -> Tensor:  # fmt: skip
    """In parts, so that no tensor of full size is made."""
    dtype = torch.float64 if dy.dtype == torch.float64 else torch.float32
    grad = dy.new_zeros((dy.shape[1], width), dtype=dtype)
    for start, stop in row_parts(rows, width, block):
        first, part = start * width, Layout((stop - start) * width, block, bits)
        begin, size = first // block, part.block_bytes
        end = begin + part.blocks
        x = dequantize(
            codes[begin * size : end * size], ranges[begin:end], seed, part.elements, bits, block, levels, dither,
            dtype, first,
        ).view(-1, width)  # fmt: skip
        if index is None or weight is None:
            own = dy[start:stop].to(dtype)
        else:
            own = dy.index_select(0, index[start:stop]).to(dtype).mul_(weight[start:stop, None])
        grad.addmm_(own.T, x)
    return grad


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
    if dtype == torch.float64:
        return reference.dequantize(codes, ranges, seed, numel, bits, block, levels, dither, dtype, number)
    out = empty((numel,), torch.float32)
    if numel:
        kernels.dequantize(
            numel,
            array(codes),
            _ranges32(ranges),
            array(out),
            *_keys(seed),
            bits,
            block,
            np.array(levels, np.float32),
            np.float32(dither),
            number,
        )
    return reference.cast_clamped(out, dtype)


def column_sums(codes: Tensor, ranges: Tensor, seed: Tensor, g: Tensor, bits: int, block: int, dither: float) -> Tensor:
    if g.dtype != torch.float32:
        return reference.column_sums(codes, ranges, seed, g, bits, block, dither)
    tasks = max(1, min(64, g.numel() // kernels.CHUNK))
    sums = torch.zeros(tasks, g.shape[1])
    if g.numel():
        kernels.column_sums(
            g.numel(), array(codes), _ranges32(ranges), array(g).reshape(-1), array(sums), *_keys(seed), bits,
            block, np.float32(dither),
        )  # fmt: skip
    return sums.sum(0)


def norm_gradient(
    codes: Tensor, ranges: Tensor, seed: Tensor, g: Tensor, shift: Tensor, factor: Tensor, gain: Tensor, bits: int,
    block: int, dither: float,
) -> Tensor:  # fmt: skip
    if g.dtype != torch.float32:
        return reference.norm_gradient(codes, ranges, seed, g, shift, factor, gain, bits, block, dither)
    out = empty_like(g)
    if g.numel():
        rows = (array(part.contiguous()) for part in (shift, factor, gain))
        kernels.norm_gradient(
            g.numel(), array(codes), _ranges32(ranges), array(g).reshape(-1), array(out).reshape(-1), *rows,
            *_keys(seed), bits, block, np.float32(dither),
        )  # fmt: skip
    return out


def pack_mask(x: Tensor) -> Tensor:
    if x.dtype in HALF:  # Numba has no such numbers; as integers their signs are the same
        x = ((x.view(torch.int16) > 0) | x.isnan()).view(torch.uint8)
    out = torch.empty(mask_bytes(x.numel()), dtype=torch.uint8)
    if x.numel():
        kernels.pack_mask(x.numel(), array(x).reshape(-1), array(out))
    return out


def relu(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.dtype != torch.float32:
        return torch.relu(x), pack_mask(x)
    y, out = empty_like(x), torch.empty(mask_bytes(x.numel()), dtype=torch.uint8)
    if x.numel():
        kernels.relu(x.numel(), array(x).reshape(-1), array(y).reshape(-1), array(out))
    return y, out


def apply_mask(grad: Tensor, mask: Tensor, slope: float) -> Tensor:
    if grad.dtype != torch.float32:
        return reference.apply_mask(grad, mask, slope)
    out = empty_like(grad)
    if grad.numel():
        kernels.apply_mask(
            grad.numel(), array(grad).reshape(-1), array(mask), array(out).reshape(-1), np.float32(slope)
        )
    return out


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    if x.dtype != torch.float32:
        return reference.dropout(x, seed, p)
    out = empty_like(x)
    if x.numel():
        scale = np.float32(reference.dropout_scale(p, x.dtype))
        kernels.dropout(x.numel(), array(x).reshape(-1), array(out).reshape(-1), *_keys(seed), np.float32(p), scale)
    return out


def norm_relu_dropout(
    x: Tensor, mean: Tensor, gain: Tensor, bias: Tensor, seed: Tensor, p: float
) -> tuple[Tensor, Tensor]:
    if x.dtype != torch.float32 or mean.dtype != torch.float32:
        return reference.norm_relu_dropout(x, mean, gain, bias, seed, p)
    y, mask = empty_like(x), torch.empty(mask_bytes(x.numel()), dtype=torch.uint8)
    if x.numel():
        vectors = (array(part.contiguous()) for part in (mean, gain, bias))
        scale = np.float32(reference.dropout_scale(p, x.dtype))
        kernels.norm_relu_dropout(
            x.numel(), array(x).reshape(-1), *vectors, array(y).reshape(-1), array(mask), *_keys(seed),
            np.float32(p), scale,
        )  # fmt: skip
    return y, mask


def relu_dropout_gradient(grad: Tensor, mask: Tensor, seed: Tensor, p: float) -> Tensor:
    if grad.dtype != torch.float32:
        return reference.relu_dropout_gradient(grad, mask, seed, p)
    out = empty_like(grad)
    if grad.numel():
        scale = np.float32(reference.dropout_scale(p, grad.dtype))
        kernels.relu_dropout_gradient(
            grad.numel(), array(grad).reshape(-1), array(mask), array(out).reshape(-1), *_keys(seed),
            np.float32(p), scale,
        )  # fmt: skip
    return out


def passed_rows(
    codes: Tensor, ranges: Tensor, seed: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None, slope: float,
    drop: Tensor | None, p: float, start: int, stop: int, rows: int, bits: int, block: int, dither: float,
) -> Tensor:  # fmt: skip
    if weight.dtype != torch.float32:
        return reference.passed_rows(
            codes, ranges, seed, weight, bias, mask, slope, drop, p, start, stop, rows, bits, block, dither
        )
    out = empty((stop - start, weight.shape[0]), torch.float32)
    if out.numel():
        kernels.passed_rows(
            out.numel(), array(codes), _ranges32(ranges), array(out).reshape(-1), array(weight.contiguous()),
            array(bias.contiguous()), _NOTHING if mask is None else array(mask), np.float32(slope), *_keys(seed),
            *((np.uint32(0), np.uint32(0)) if drop is None else _keys(drop)), drop is not None, np.float32(p),
            np.float32(reference.dropout_scale(p, weight.dtype) if drop is not None else 1),
            start * weight.shape[0], rows * weight.shape[0], bits, block, np.float32(dither),
        )  # fmt: skip
    return out


def signs(seed: Tensor, count: int) -> Tensor:
    out = torch.empty(count)
    if count:
        kernels.signs(count, array(out), *_keys(seed))
    return out


def aggregate(crow: Tensor, col: Tensor, values: Tensor, x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or values.dtype != torch.float32:
        return reference.aggregate(crow, col, values, x)
    out = empty((crow.shape[0] - 1, x.shape[1]), x.dtype)
    if out.numel():
        kernels.aggregate(
            max(out.numel(), col.numel()), array(crow), array(col), array(values), array(x), array(out)
        )  # fmt: skip
    return out


def row_scores(x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        return reference.row_scores(x)
    sums, out = torch.empty(x.shape[0]), torch.empty(x.shape[0], dtype=torch.uint8)
    if x.numel():
        kernels.row_scores(x.numel(), array(x), array(sums), array(sums).view(np.int32), array(out))
    else:
        out.zero_()
    return out


def pick_rows(scores: Tensor, seed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    index, weight = torch.empty(count, dtype=torch.int64), torch.empty(count)
    start = np.int64(int(sampling_start(seed)))
    # one running sum: never in parallel
    kernels.pick_rows(
        0, array(scores), array(keep_probabilities(scores, count)), start, array(index), array(weight)
    )  # fmt: skip
    return index, weight


def finite(x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or not x.is_contiguous():
        return reference.finite(x)
    return torch.tensor(0.0 if kernels.finite(x.numel(), array(x).view(np.int32).reshape(-1)) else float("nan"))
