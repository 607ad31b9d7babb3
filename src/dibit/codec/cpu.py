"""The codec on the CPU: Numba kernels, one pass a block, no fast-math (backends must agree and NaN must survive)."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from types import FunctionType
from typing import Any

import numba as nb
import numpy as np
import torch
from torch import Tensor

from dibit.buffers import empty, empty_like
from dibit.codec import reference
from dibit.codec.rng import C1, C2, C3, M1, M2, UNIT

_running = threading.Lock()  # Numba's simplest pool of threads ends the process when two threads use it at once


class _Kernel:
    """A kernel compiled twice, when first used: starting threads costs more than a small array brings.

    Its threads are as many as torch's. With one, as in the workers of a data loader, none are started, so a forked
    process is safe.
    """

    def __init__(self, function: Any) -> None:
        options: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}
        self.parallel = nb.njit(parallel=True, **options)(function)
        twin = FunctionType(function.__code__, function.__globals__, function.__name__)
        twin.__qualname__ = f"{function.__qualname__}_serial"  # Numba's file cache knows functions by this name
        self.serial = nb.njit(**options)(twin)

    def __call__(self, elements: int, *args: Any) -> Any:
        threads = min(torch.get_num_threads(), nb.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
        if elements < SMALL or threads == 1:
            _say_if_compiling(self.serial)
            return self.serial(*args)
        _say_if_compiling(self.parallel)
        with _running:
            if nb.get_num_threads() != threads:
                nb.set_num_threads(threads)
            return self.parallel(*args)


def _say_if_compiling(kernel: Any) -> None:
    """A sentence, once a process, before the first kernel that is not on the disk yet."""
    global _said
    if _said or kernel.signatures:
        return
    name = kernel.py_func.__qualname__.replace("<", "").replace(">", "")
    if not any(Path(kernel.stats.cache_path).glob(f"*{name}-*.nbi")):
        _said = True
        logging.getLogger("dibit").warning(
            "dibit: compiling kernels for this processor; the next run finds them ready."
        )


_said = False
_jit = _Kernel
_inline = nb.njit(inline="always", error_model="numpy")

u32, u64, i32, f32 = np.uint32, np.uint64, np.int32, np.float32
_C1, _C2, _C3, _UNIT = u32(C1), u32(C2), u32(C3), f32(UNIT)
_MASK64 = 2**64 - 1
_MAGNITUDE, _INF = i32(0x7FFFFFFF), i32(0x7F800000)
CHUNK = 1 << 14  # elements that one task takes at the least
SMALL = 1 << 16  # below this many elements one thread does it all


@_inline
def _uniform(low, high, key0, key1):  # type: ignore[no-untyped-def]
    """The generator of `dibit.codec.rng` in 32-bit arithmetic: `low` of the counter, `high` its upper half times C3."""
    x = u32(low + key0)
    x = u32(u32(x ^ u32(x >> u32(16))) * _C1)
    x = u32(u32(u32(x ^ u32(x >> u32(15))) ^ key1) + high)
    x = u32(x * _C2)
    x = u32(u32(x ^ u32(x >> u32(16))) * _C3)
    x = u32(x ^ u32(x >> u32(15)))
    return f32(i32(x >> u32(8))) * _UNIT  # signed: the conversion that processors have


@_inline
def _upper(counter):  # type: ignore[no-untyped-def]
    """What the upper half of a counter adds."""
    return u32(u32(u64(counter) >> u64(32)) * _C3)


@_inline
def _chosen(low, first, here, beyond):  # type: ignore[no-untyped-def]
    """`here` as long as the counter's lower half has not wrapped since `first`."""
    return beyond if low < first else here


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
            words = xbits[first : first + count]
            lowest, highest = _ordered(words[0]), _ordered(words[0])
            for k in range(count):
                key = _ordered(words[k])
                lowest = key if key < lowest else lowest
                highest = key if key > highest else highest
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
            bytes_ = out[b * stride : b * stride + size]
            for j in range(size):
                bytes_[j] = 0
            if not width > f32(0):
                continue
            # Plain loops over slices of 32-bit numbers: what LLVM can vectorise.
            for slot in range(slots):
                shift = u32(slot * bits)
                start = first + slot * size
                part = x[start : min(start + size, first + count)]
                c0, here, beyond = u32(start), _upper(start), _upper(start + part.size)
                if rounding == 0 and levels.size == 0:
                    for j in range(part.size):
                        h = (part[j] * scale - zero) / width * top
                        code = i32(h)
                        low32 = u32(c0 + u32(j))
                        u = _uniform(low32, _chosen(low32, c0, here, beyond), key0, key1)
                        code = min(i32(code + i32(u < h - f32(code))), topcode)
                        bytes_[j] |= np.uint8(u32(code) << shift)
                elif rounding == 0 and levels.size == 4:
                    l1, l2, l3 = levels[1], levels[2], levels[3]
                    for j in range(part.size):
                        h = (part[j] * scale - zero) / width * top
                        code = i32(h >= l1) + i32(h >= l2)
                        below = l2 if h >= l2 else (l1 if h >= l1 else f32(0))
                        above = l3 if h >= l2 else (l2 if h >= l1 else l1)
                        low32 = u32(c0 + u32(j))
                        u = _uniform(low32, _chosen(low32, c0, here, beyond), key0, key1)
                        code = min(i32(code + i32(u < (h - below) / (above - below))), topcode)
                        bytes_[j] |= np.uint8(u32(code) << shift)
                else:
                    for j in range(part.size):
                        h = (part[j] * scale - zero) / width * top
                        if levels.size == 0:
                            code = i32(h)
                            fraction = h - f32(code)
                        else:
                            code = i32(0)
                            for m in range(1, levels.size - 1):
                                code += i32(h >= levels[m])
                            fraction = (h - levels[code]) / (levels[code + 1] - levels[code])
                        low32 = u32(c0 + u32(j))
                        u = _uniform(low32, _chosen(low32, c0, here, beyond), key0, key1)
                        up = fraction >= f32(0.5) if rounding == 1 else u < fraction
                        code = min(i32(code + i32(up)), topcode)
                        bytes_[j] |= np.uint8(u32(code) << shift)


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
            bytes_ = codes[b * stride : b * stride + size]
            for slot in range(slots):
                shift = u32(slot * bits)
                start = first + slot * size
                part = out[start : min(start + size, first + count)]
                if dither != f32(0):
                    c0, here, beyond = u32(start), _upper(start), _upper(start + part.size)
                    for j in range(part.size):
                        low32 = u32(c0 + u32(j))
                        u = _uniform(low32, _chosen(low32, c0, here, beyond), key0, key1)
                        code = u32(u32(bytes_[j]) >> shift) & mask
                        h = (levels[code] if levels.size else f32(i32(code))) + (u - centre) * dither
                        part[j] = (h * step + zero) / scale
                elif levels.size == 0:
                    for j in range(part.size):
                        h = f32(i32(u32(u32(bytes_[j]) >> shift) & mask))
                        value = (h * step + zero) / scale
                        value = low if value < low else value
                        part[j] = high if value > high else value
                else:
                    for j in range(part.size):
                        h = levels[u32(u32(bytes_[j]) >> shift) & mask]
                        value = (h * step + zero) / scale
                        value = low if value < low else value
                        part[j] = high if value > high else value


@_inline
def _decoded(byte, shift, mask, u, dither, step, zero, scale):  # type: ignore[no-untyped-def]
    """An element of uniform levels, not clamped: within rounding of `_dequantize`."""
    h = f32(i32(u32(u32(byte) >> shift) & mask)) + u * dither
    return (h * step + zero) / scale


@_jit
def _column_sums(codes, ranges, g, sums, key0, key1, bits, block, dither):  # type: ignore[no-untyped-def]
    n, width, slots, top = g.size, sums.shape[1], 8 // bits, f32((1 << bits) - 1)
    blocks = ranges.shape[0]
    stride = (block + slots - 1) // slots
    group = (blocks + sums.shape[0] - 1) // sums.shape[0]
    mask, centre = u32((1 << bits) - 1), f32(0.5 - UNIT / 2)
    for task in nb.prange(sums.shape[0]):
        total = sums[task]
        for b in range(task * group, min(blocks, (task + 1) * group)):
            first = b * block
            count = min(block, n - first)
            size = (count + slots - 1) // slots
            low, high = ranges[b, 0], ranges[b, 1]
            scale = f32(0.5) if np.isinf(high - low) else f32(1.0)
            zero = low * scale
            step = (high * scale - zero) / top
            for slot in range(slots):
                shift = u32(slot * bits)
                start, stop = first + slot * size, min(first + (slot + 1) * size, first + count)
                at = start
                while at < stop:  # row by row: a column's sum is one element of a vector
                    column = at % width
                    m = min(width - column, stop - at)
                    bytes_ = codes[b * stride + at - start : b * stride + at - start + m]
                    part, own = g[at : at + m], total[column : column + m]
                    c0, here, beyond = u32(at), _upper(at), _upper(at + m)
                    if dither != f32(0):
                        for j in range(m):
                            low32 = u32(c0 + u32(j))
                            u = _uniform(low32, _chosen(low32, c0, here, beyond), key0, key1) - centre
                            own[j] += part[j] * _decoded(bytes_[j], shift, mask, u, dither, step, zero, scale)
                    else:
                        for j in range(m):
                            own[j] += part[j] * _decoded(bytes_[j], shift, mask, f32(0), dither, step, zero, scale)
                    at += m


@_jit
def _norm_gradient(codes, ranges, g, out, shift_by, factor, gain, bits, block):  # type: ignore[no-untyped-def]
    n, width, slots, top = g.size, shift_by.size, 8 // bits, f32((1 << bits) - 1)
    blocks = ranges.shape[0]
    stride = (block + slots - 1) // slots
    group = max(1, CHUNK // block)
    mask, none = u32((1 << bits) - 1), f32(0)
    for task in nb.prange((blocks + group - 1) // group):
        for b in range(task * group, min(blocks, (task + 1) * group)):
            first = b * block
            count = min(block, n - first)
            size = (count + slots - 1) // slots
            low, high = ranges[b, 0], ranges[b, 1]
            scale = f32(0.5) if np.isinf(high - low) else f32(1.0)
            zero = low * scale
            step = (high * scale - zero) / top
            for slot in range(slots):
                shift = u32(slot * bits)
                start, stop = first + slot * size, min(first + (slot + 1) * size, first + count)
                at = start
                while at < stop:
                    column = at % width
                    m = min(width - column, stop - at)
                    bytes_ = codes[b * stride + at - start : b * stride + at - start + m]
                    part, result = g[at : at + m], out[at : at + m]
                    a, f, s = shift_by[column : column + m], factor[column : column + m], gain[column : column + m]
                    for j in range(m):
                        x = _decoded(bytes_[j], shift, mask, none, none, step, zero, scale)
                        result[j] = (part[j] - a[j] - x * f[j]) * s[j]
                    at += m


@_jit
def _pack_mask(x, out):  # type: ignore[no-untyped-def]
    n, size = x.size, out.size
    for task in nb.prange((size + CHUNK // 8 - 1) // (CHUNK // 8)):
        start, stop = task * (CHUNK // 8), min(size, (task + 1) * (CHUNK // 8))
        bytes_ = out[start:stop]
        for j in range(stop - start):
            bytes_[j] = 0
        for slot in range(8):
            part = x[slot * size + start : min(n, slot * size + stop)]
            for j in range(part.size):
                bytes_[j] |= np.uint8(u32(not (part[j] <= 0)) << u32(slot))


@_jit
def _relu(x, y, out):  # type: ignore[no-untyped-def]
    n, size = x.size, out.size
    for task in nb.prange((size + CHUNK // 8 - 1) // (CHUNK // 8)):
        start, stop = task * (CHUNK // 8), min(size, (task + 1) * (CHUNK // 8))
        bytes_ = out[start:stop]
        for j in range(stop - start):
            bytes_[j] = 0
        for slot in range(8):
            part, result = x[slot * size + start : min(n, slot * size + stop)], y[slot * size + start :]
            for j in range(part.size):
                result[j] = f32(0) if part[j] < 0 else part[j]  # NaN stays, and so does -0, as in torch
                bytes_[j] |= np.uint8(u32(not (part[j] <= 0)) << u32(slot))


@_jit
def _apply_mask(grad, mask, out, slope):  # type: ignore[no-untyped-def]
    n, size = grad.size, mask.size
    for task in nb.prange((size + CHUNK // 8 - 1) // (CHUNK // 8)):
        start, stop = task * (CHUNK // 8), min(size, (task + 1) * (CHUNK // 8))
        bytes_ = mask[start:stop]
        for slot in range(8):
            bit = np.uint8(1 << slot)
            part, result = grad[slot * size + start : min(n, slot * size + stop)], out[slot * size + start :]
            if slope != 0:
                for j in range(part.size):
                    result[j] = part[j] if bytes_[j] & bit else part[j] * slope
            else:
                for j in range(part.size):
                    result[j] = part[j] if bytes_[j] & bit else f32(0)


@_jit
def _dropout(x, out, key0, key1, p, scale):  # type: ignore[no-untyped-def]
    for task in nb.prange((x.size + CHUNK - 1) // CHUNK):
        start = task * CHUNK
        part, result = x[start : start + CHUNK], out[start : start + CHUNK]
        c0, here, beyond = u32(start), _upper(start), _upper(start + part.size)
        for j in range(part.size):
            low32 = u32(c0 + u32(j))
            keep = _uniform(low32, _chosen(low32, c0, here, beyond), key0, key1) >= p
            result[j] = part[j] * (scale if keep else f32(0))


@_jit
def _finite(xbits):  # type: ignore[no-untyped-def]
    tasks = (xbits.size + CHUNK - 1) // CHUNK
    bad = np.zeros(tasks, np.int32)
    for task in nb.prange(tasks):
        worst = i32(0)
        part = xbits[task * CHUNK : (task + 1) * CHUNK]
        for k in range(part.size):
            size = i32(part[k] & _MAGNITUDE)
            worst = size if size > worst else worst
        bad[task] = worst
    return bad.max() < _INF if tasks else True


@_jit
def _signs(out, key0, key1):  # type: ignore[no-untyped-def]
    for task in nb.prange((out.size + CHUNK - 1) // CHUNK):
        start = task * CHUNK
        part = out[start : start + CHUNK]
        c0, here, beyond = u32(start), _upper(start), _upper(start + part.size)
        for j in range(part.size):
            low32 = u32(c0 + u32(j))
            # the number's 24 bits are the topmost: below one half the first of them is clear
            u = _uniform(low32, _chosen(low32, c0, here, beyond), key0, key1)
            part[j] = f32(1) if u < f32(0.5) else f32(-1)


@_jit
def _aggregate(crow, col, values, x, out):  # type: ignore[no-untyped-def]
    rows, width = out.shape
    for task in nb.prange((rows + 255) // 256):
        for row in range(task * 256, min(rows, (task + 1) * 256)):
            total = out[row]
            for k in range(width):
                total[k] = f32(0)
            e, end = crow[row], crow[row + 1]
            while e + 4 <= end:  # four rows of x at once: the caches are asked for all before the first arrives
                v0, v1, v2, v3 = values[e], values[e + 1], values[e + 2], values[e + 3]
                x0, x1, x2, x3 = x[col[e]], x[col[e + 1]], x[col[e + 2]], x[col[e + 3]]
                for k in range(width):
                    total[k] = (((total[k] + v0 * x0[k]) + v1 * x1[k]) + v2 * x2[k]) + v3 * x3[k]
                e += 4
            while e < end:
                v, part = values[e], x[col[e]]
                for k in range(width):
                    total[k] += v * part[k]
                e += 1


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
    out = empty((numel,), torch.float32)
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


def column_sums(codes: Tensor, ranges: Tensor, seed: Tensor, g: Tensor, bits: int, block: int, dither: float) -> Tensor:
    if g.dtype != torch.float32:
        return reference.column_sums(codes, ranges, seed, g, bits, block, dither)
    tasks = max(1, min(64, g.numel() // CHUNK))
    sums = torch.zeros(tasks, g.shape[1])
    if g.numel():
        _column_sums(
            g.numel(), codes.numpy(), _ranges32(ranges), g.numpy().reshape(-1), sums.numpy(), *_keys(seed), bits,
            block, f32(dither),
        )  # fmt: skip
    return sums.sum(0)


def norm_gradient(
    codes: Tensor, ranges: Tensor, seed: Tensor, g: Tensor, shift: Tensor, factor: Tensor, gain: Tensor, bits: int,
    block: int,
) -> Tensor:  # fmt: skip
    if g.dtype != torch.float32:
        return reference.norm_gradient(codes, ranges, seed, g, shift, factor, gain, bits, block)
    out = empty_like(g)
    if g.numel():
        rows = (part.contiguous().numpy() for part in (shift, factor, gain))
        _norm_gradient(
            g.numel(), codes.numpy(), _ranges32(ranges), g.numpy().reshape(-1), out.numpy().reshape(-1), *rows, bits,
            block,
        )  # fmt: skip
    return out


def pack_mask(x: Tensor) -> Tensor:
    if x.dtype not in (torch.float32, torch.float64):
        return reference.pack_mask(x)
    out = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8)
    if x.numel():
        _pack_mask(x.numel(), x.numpy().reshape(-1), out.numpy())
    return out


def relu(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.dtype != torch.float32:
        return reference.relu(x)
    y, out = empty_like(x), torch.empty((x.numel() + 7) // 8, dtype=torch.uint8)
    if x.numel():
        _relu(x.numel(), x.numpy().reshape(-1), y.numpy().reshape(-1), out.numpy())
    return y, out


def apply_mask(grad: Tensor, mask: Tensor, slope: float) -> Tensor:
    if grad.dtype != torch.float32:
        return reference.apply_mask(grad, mask, slope)
    out = empty_like(grad)
    if grad.numel():
        _apply_mask(grad.numel(), grad.numpy().reshape(-1), mask.numpy(), out.numpy().reshape(-1), f32(slope))
    return out


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    if x.dtype != torch.float32:
        return reference.dropout(x, seed, p)
    out = empty_like(x)
    if x.numel():
        scale = f32(reference.dropout_scale(p, x.dtype))
        _dropout(x.numel(), x.numpy().reshape(-1), out.numpy().reshape(-1), *_keys(seed), f32(p), scale)
    return out


def signs(seed: Tensor, count: int) -> Tensor:
    out = torch.empty(count)
    if count:
        _signs(count, out.numpy(), *_keys(seed))
    return out


def aggregate(crow: Tensor, col: Tensor, values: Tensor, x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or values.dtype != torch.float32:
        return reference.aggregate(crow, col, values, x)
    out = empty((crow.shape[0] - 1, x.shape[1]), x.dtype)
    if out.numel():
        _aggregate(
            max(out.numel(), col.numel()), crow.numpy(), col.numpy(), values.numpy(), x.numpy(), out.numpy()
        )  # fmt: skip
    return out


def finite(x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or not x.is_contiguous():
        return reference.finite(x)
    return torch.tensor(0.0 if _finite(x.numel(), x.numpy().view(np.int32).reshape(-1)) else float("nan"))
