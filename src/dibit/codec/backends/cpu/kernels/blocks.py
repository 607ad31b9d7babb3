"""Kernels that make codes of numbers, block by block, and numbers of codes."""

from __future__ import annotations

import numba as nb
import numpy as np

from dibit.codec.backends.cpu.jit import Kernel
from dibit.codec.backends.cpu.kernels.numbers import (
    CHUNK,
    INFINITE,
    f32,
    i32,
    ordered,
    range_parameters,
    u32,
    uniform,
    upper_term,
    upper_word,
)
from dibit.codec.rng import UNIT

MOST = f32(np.finfo(np.float32).max)
SEARCH_SHIFT = 16  # lower bits of a float32 without which a search for its level begins


@Kernel
def quantize(x, xbits, out, ranges, rbits, widths, key0, key1, bits, block, levels, begin, half, rounding, number):
    n, slots, top = x.size, 8 // bits, f32((1 << bits) - 1)
    topcode = i32((1 << bits) - 1)
    blocks = widths.size
    stride = (block + slots - 1) // slots
    group = max(1, CHUNK // block)
    for task in nb.prange((blocks + group - 1) // group):
        edge = np.empty(2, np.int32)
        ends = edge.view(np.float32)
        places, draws = np.empty(1024, np.float32), np.empty(1024, np.float32)
        place_bits = places.view(np.int32)
        for b in range(task * group, min(blocks, (task + 1) * group)):
            first = b * block
            count = min(block, n - first)
            size = (count + slots - 1) // slots
            words = xbits[first : first + count]
            lowest, highest = ordered(words[0]), ordered(words[0])
            for k in range(count):
                key = ordered(words[k])
                lowest = key if key < lowest else lowest
                highest = key if key > highest else highest
            # ordered is its own inverse
            edge[0], edge[1] = ordered(lowest), ordered(highest)
            low, high = ends[0], ends[1]
            if highest >= INFINITE or lowest <= ordered(i32(INFINITE | i32(-2147483648))):
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
            zero, width, scale = range_parameters(low, high)
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
                c0 = u32(number + start)
                here, beyond = upper_term(number + start), upper_term(number + start + part.size)
                if rounding == 0 and levels.size == 0:
                    for j in range(part.size):
                        h = (part[j] * scale - zero) / width * top
                        code = i32(h)
                        low32 = u32(c0 + u32(j))
                        u = uniform(low32, upper_word(low32, c0, here, beyond), key0, key1)
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
                        u = uniform(low32, upper_word(low32, c0, here, beyond), key0, key1)
                        code = min(i32(code + i32(u < (h - below) / (above - below))), topcode)
                        bytes_[j] |= np.uint8(u32(code) << shift)
                elif levels.size == 0:
                    for j in range(part.size):
                        h = (part[j] * scale - zero) / width * top
                        code = i32(h)
                        code = min(i32(code + i32(h - f32(code) >= f32(0.5))), topcode)
                        bytes_[j] |= np.uint8(u32(code) << shift)
                else:
                    for cut in range(0, part.size, places.size):
                        some, bytes_there = part[cut : cut + places.size], bytes_[cut : cut + places.size]
                        c1 = u32(c0 + u32(cut))
                        for j in range(some.size):
                            places[j] = (some[j] * scale - zero) / width * top
                            low32 = u32(c1 + u32(j))
                            draws[j] = uniform(low32, upper_word(low32, c0, here, beyond), key0, key1)
                        for j in range(some.size):
                            h = places[j]
                            code = i32(begin[min(place_bits[j] >> i32(SEARCH_SHIFT), i32(begin.size - 1))])
                            code = min(i32(code + i32(h >= levels[code + 1])), i32(topcode - 1))
                            while code < topcode - 1 and h >= levels[code + 1]:
                                code += i32(1)
                            fraction = (h - levels[code]) / (levels[code + 1] - levels[code])
                            up = fraction >= f32(0.5) if rounding == 1 else draws[j] < fraction
                            code = min(i32(code + i32(up)), topcode)
                            bytes_there[j] |= np.uint8(u32(code) << shift)


@Kernel
def dequantize(codes, ranges, out, key0, key1, bits, block, levels, dither, number):
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
            zero, span, scale = range_parameters(low, high)
            step = span / top
            bytes_ = codes[b * stride : b * stride + size]
            for slot in range(slots):
                shift = u32(slot * bits)
                start = first + slot * size
                part = out[start : min(start + size, first + count)]
                if dither != f32(0):
                    c0 = u32(number + start)
                    here, beyond = upper_term(number + start), upper_term(number + start + part.size)
                    for j in range(part.size):
                        low32 = u32(c0 + u32(j))
                        u = uniform(low32, upper_word(low32, c0, here, beyond), key0, key1)
                        code = u32(u32(bytes_[j]) >> shift) & mask
                        h = (levels[code] if levels.size else f32(i32(code))) + (u - centre) * dither
                        value = (h * step + zero) / scale
                        value = -MOST if value < -MOST else value  # half a bin beyond the range; NaN stays
                        part[j] = MOST if value > MOST else value
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
