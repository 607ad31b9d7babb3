"""The codec on the CPU: Numba kernels, one pass a block, no fast-math (backends must agree and NaN must survive)."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import numba as nb
import numpy as np
import torch
from torch import Tensor

from dibit.codec import reference
from dibit.codec.rng import C1, C2, C3, M1, M2, UNIT


class _Kernel:
    """A kernel compiled twice, when first used: starting threads costs more than a small array brings."""

    def __init__(self, function: Any) -> None:
        options: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}
        self.parallel = nb.njit(parallel=True, **options)(function)
        twin = FunctionType(function.__code__, function.__globals__, function.__name__)
        twin.__qualname__ = f"{function.__qualname__}_serial"  # Numba's file cache knows functions by this name
        self.serial = nb.njit(**options)(twin)

    def __call__(self, elements: int, *args: Any) -> Any:
        return (self.serial if elements < SMALL else self.parallel)(*args)


_jit = _Kernel
_inline = nb.njit(inline="always", error_model="numpy")

u32, u64, i32, f32 = np.uint32, np.uint64, np.int32, np.float32
_C1, _C2, _C3, _UNIT = u32(C1), u32(C2), u32(C3), f32(UNIT)
_MASK64 = 2**64 - 1
_MAGNITUDE, _INF = i32(0x7FFFFFFF), i32(0x7F800000)
CHUNK = 1 << 14  # elements that one task takes at the least
SMALL = 1 << 16  # below this many elements one thread does it all


@_inline
def _uniform(counter, key0, key1):  # type: ignore[no-untyped-def]
    """The generator of `dibit.codec.rng` in 32-bit arithmetic; `counter` is uint64."""
    x = u32(u32(counter) + key0)
    x = u32(u32(x ^ u32(x >> u32(16))) * _C1)
    x = u32(u32(u32(x ^ u32(x >> u32(15))) ^ key1) + u32(u32(counter >> u64(32)) * _C3))
    x = u32(x * _C2)
    x = u32(u32(x ^ u32(x >> u32(16))) * _C3)
    x = u32(x ^ u32(x >> u32(15)))
    return f32(u32(x >> u32(8))) * _UNIT


@_inline
def _ordered(bits):  # type: ignore[no-untyped-def]
    """float32 bits as an int32 of the same order (NaN beyond infinity): its minimum and maximum vectorise."""
    return i32(bits ^ i32(i32(bits >> i32(31)) & _MAGNITUDE))


@_jit
def _quantize(x, xbits, out, ranges, rbits, widths, key0, key1, bits, block, levels, half, rounding):  # type: ignore[no-untyped-def]
    n, slots, top = x.size, 8 // bits, f32((1 << bits) - 1)
    topcode = i32((1 << bits) - 1)
    blocks = widths.size
    stride = (block + slots - 1) // slots
    group = max(1, CHUNK // block)
    for task in nb.prange((blocks + group - 1) // group):
        edge = np.empty(2, np.int32)
        ends = edge.view(np.float32)
        for b in range(task * group, min(blocks, (task + 1) * group)):
            first = b * block
            count = min(block, n - first)
            size = (count + slots - 1) // slots
            lowest, highest = _ordered(xbits[first]), _ordered(xbits[first])
            for k in range(count):
                key = _ordered(xbits[first + k])
                lowest, highest = min(lowest, key), max(highest, key)
            # _ordered is its own inverse
            edge[0], edge[1] = _ordered(lowest), _ordered(highest)
            low, high = ends[0], ends[1]
            if highest >= _INF or lowest <= _ordered(i32(_INF | i32(-2147483648))):
                low, high = f32(np.nan), f32(np.nan)
            widths[b] = high - low
            if half:
                # bfloat16 is a float32's upper half: cut towards zero, one further out where something was cut off
                if low == low:
                    cut, top_bits = edge[0], edge[1]
                    lower, upper = cut & i32(-65536), top_bits & i32(-65536)
                    if cut < 0 and lower != cut:
                        lower += i32(65536)
                    if top_bits >= 0 and upper != top_bits:
                        upper += i32(65536)
                    edge[0], edge[1] = lower, upper
                else:
                    edge[0], edge[1] = i32(0x7FC00000), i32(0x7FC00000)
                rbits[b, 0], rbits[b, 1] = edge[0] >> i32(16), edge[1] >> i32(16)
                low, high = ends[0], ends[1]
            else:
                ranges[b, 0], ranges[b, 1] = low, high
            scale = f32(0.5) if np.isinf(high - low) else f32(1.0)
            zero = low * scale
            width = high * scale - zero
            base = b * stride
            for j in range(size):
                out[base + j] = 0
            if not width > f32(0):
                continue
            for slot in range(slots):
                shift = u32(slot * bits)
                begin = slot * size
                for j in range(max(0, min(size, count - begin))):
                    k = first + begin + j
                    h = (x[k] * scale - zero) / width * top
                    if levels.size == 0:
                        code = i32(h)
                        fraction = h - f32(code)
                    elif levels.size == 4:
                        code = i32(h >= levels[1]) + i32(h >= levels[2])
                        fraction = (h - levels[code]) / (levels[code + 1] - levels[code])
                    else:
                        code = i32(0)
                        for m in range(1, levels.size - 1):
                            code += i32(h >= levels[m])
                        fraction = (h - levels[code]) / (levels[code + 1] - levels[code])
                    up = fraction >= f32(0.5) if rounding == 1 else _uniform(u64(k), key0, key1) < fraction
                    code = min(i32(code + i32(up)), topcode)
                    out[base + j] |= np.uint8(u32(code) << shift)


@_jit
def _dequantize(codes, ranges, out, key0, key1, bits, block, levels, dither):  # type: ignore[no-untyped-def]
    n, slots, top = out.size, 8 // bits, f32((1 << bits) - 1)
    blocks = ranges.shape[0]
    stride = (block + slots - 1) // slots
    group = max(1, CHUNK // block)
    mask = u32((1 << bits) - 1)
    centre = f32(0.5 - UNIT / 2)
    for task in nb.prange((blocks + group - 1) // group):
        for b in range(task * group, min(blocks, (task + 1) * group)):
            first = b * block
            count = min(block, n - first)
            size = (count + slots - 1) // slots
            low, high = ranges[b, 0], ranges[b, 1]
            scale = f32(0.5) if np.isinf(high - low) else f32(1.0)
            zero = low * scale
            step = (high * scale - zero) / top
            base = b * stride
            for slot in range(slots):
                shift = u32(slot * bits)
                begin = slot * size
                for j in range(max(0, min(size, count - begin))):
                    k = first + begin + j
                    code = u32(u32(codes[base + j]) >> shift) & mask
                    h = f32(code)
                    if levels.size != 0:
                        h = levels[code]
                    if dither != f32(0):
                        h = h + (_uniform(u64(k), key0, key1) - centre) * dither
                        out[k] = (h * step + zero) / scale
                    else:
                        value = (h * step + zero) / scale
                        value = low if value < low else value
                        out[k] = high if value > high else value


@_jit
def _pack_mask(x, out):  # type: ignore[no-untyped-def]
    n, size = x.size, out.size
    for task in nb.prange((size + CHUNK // 8 - 1) // (CHUNK // 8)):
        start, stop = task * (CHUNK // 8), min(size, (task + 1) * (CHUNK // 8))
        for j in range(start, stop):
            out[j] = 0
        for slot in range(8):
            begin = slot * size
            for j in range(start, min(stop, n - begin)):
                out[j] |= np.uint8(u32(not (x[begin + j] <= 0)) << u32(slot))


@_jit
def _apply_mask(grad, mask, out, slope):  # type: ignore[no-untyped-def]
    n, size = grad.size, mask.size
    for task in nb.prange((size + CHUNK // 8 - 1) // (CHUNK // 8)):
        start, stop = task * (CHUNK // 8), min(size, (task + 1) * (CHUNK // 8))
        for slot in range(8):
            begin = slot * size
            for j in range(start, min(stop, n - begin)):
                g = grad[begin + j]
                low = g * slope if slope != 0 else slope
                out[begin + j] = g if (mask[j] >> slot) & 1 else low


@_jit
def _dropout(x, out, key0, key1, p, scale):  # type: ignore[no-untyped-def]
    for task in nb.prange((x.size + CHUNK - 1) // CHUNK):
        for k in range(task * CHUNK, min(x.size, (task + 1) * CHUNK)):
            keep = _uniform(u64(k), key0, key1) >= p
            out[k] = x[k] * (scale if keep else f32(0))


@_jit
def _finite(xbits):  # type: ignore[no-untyped-def]
    tasks = (xbits.size + CHUNK - 1) // CHUNK
    bad = np.zeros(tasks, np.int32)
    for task in nb.prange(tasks):
        worst = i32(0)
        for k in range(task * CHUNK, min(xbits.size, (task + 1) * CHUNK)):
            worst = max(worst, i32(xbits[k] & _MAGNITUDE))
        bad[task] = worst
    return bad.max() < _INF if tasks else True


def _keys(seed: Tensor) -> tuple[np.uint32, np.uint32]:
    """`rng.keys` in Python's integers."""
    z = int(seed) & _MASK64
    z = ((z ^ (z >> 30)) * M1) & _MASK64
    z = ((z ^ (z >> 27)) * M2) & _MASK64
    z ^= z >> 31
    return u32(z & 0xFFFFFFFF), u32(z >> 32)


def _ranges32(ranges: Tensor) -> np.ndarray:
    return ranges.to(torch.float32).numpy()


def quantize(
    x: Tensor, seed: Tensor, bits: int, block: int, levels: list[float], stats: torch.dtype, rounding: int
) -> tuple[Tensor, Tensor, Tensor]:
    if x.dtype != torch.float32:
        return reference.quantize(x, seed, bits, block, levels, stats, rounding)
    n = x.numel()
    full, tail = divmod(n, block)
    blocks = full + bool(tail)
    size = full * reference.packed_bytes(block, bits) + reference.packed_bytes(tail, bits)
    codes = torch.empty(size, dtype=torch.uint8)
    ranges = torch.empty((blocks, 2), dtype=stats)
    widths = torch.empty(blocks)
    if n:
        half = stats == torch.bfloat16
        plain = np.empty((0, 2), f32) if half else ranges.numpy()
        packed = ranges.view(torch.int16).numpy() if half else np.empty((0, 2), np.int16)
        data = x.contiguous().numpy()
        _quantize(
            n, data, data.view(np.int32), codes.numpy(), plain, packed, widths.numpy(), *_keys(seed), bits, block,
            np.array(levels, f32), half, rounding,
        )  # fmt: skip
    return codes, ranges, widths


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
) -> Tensor:
    if dtype == torch.float64:
        return reference.dequantize(codes, ranges, seed, numel, bits, block, levels, dither, dtype)
    out = torch.empty(numel)
    if numel:
        _dequantize(
            numel,
            codes.numpy(),
            _ranges32(ranges),
            out.numpy(),
            *_keys(seed),
            bits,
            block,
            np.array(levels, f32),
            f32(dither),
        )
    return reference.narrowed(out, dtype)


def pack_mask(x: Tensor) -> Tensor:
    if x.dtype not in (torch.float32, torch.float64):
        return reference.pack_mask(x)
    out = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8)
    if x.numel():
        _pack_mask(x.numel(), x.numpy().reshape(-1), out.numpy())
    return out


def apply_mask(grad: Tensor, mask: Tensor, slope: float) -> Tensor:
    if grad.dtype != torch.float32:
        return reference.apply_mask(grad, mask, slope)
    out = torch.empty_like(grad, memory_format=torch.contiguous_format)
    if grad.numel():
        _apply_mask(grad.numel(), grad.numpy().reshape(-1), mask.numpy(), out.numpy().reshape(-1), f32(slope))
    return out


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    if x.dtype != torch.float32:
        return reference.dropout(x, seed, p)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        scale = f32(reference.dropout_scale(p, x.dtype))
        _dropout(x.numel(), x.numpy().reshape(-1), out.numpy().reshape(-1), *_keys(seed), f32(p), scale)
    return out


def finite(x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or not x.is_contiguous():
        return reference.finite(x)
    return torch.tensor(0.0 if _finite(x.numel(), x.numpy().view(np.int32).reshape(-1)) else float("nan"))
