"""The CPU's kernels: one pass a block, no fast-math (backends must agree and NaN must survive).

Their inner loops run over slices of 32-bit numbers without a branch: what LLVM vectorises.
"""

from __future__ import annotations

import numba as nb
import numpy as np

from dibit.codec.backends.cpu.jit import Kernel, inlined
from dibit.codec.keep_probabilities import FIXED_POINT_ONE
from dibit.codec.rng import C1, C2, C3, UNIT

u32, u64, i32, f32 = np.uint32, np.uint64, np.int32, np.float32
_C1, _C2, _C3, _UNIT = u32(C1), u32(C2), u32(C3), f32(UNIT)
_MOST = f32(np.finfo(np.float32).max)
_MAGNITUDE, _INF = i32(0x7FFFFFFF), i32(0x7F800000)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
CHUNK = 1 << 14  # elements that one task takes at the least
KEY = 16  # lower bits of a float32 without which a search for its level begins


@inlined
def _uniform(low, high, key0, key1):  # type: ignore[no-untyped-def]
    """The generator of `dibit.codec.rng` in 32-bit arithmetic: `low` of the counter, `high` its upper half times C3."""
    x = u32(low + key0)
    x = u32(u32(x ^ u32(x >> u32(16))) * _C1)
    x = u32(u32(u32(x ^ u32(x >> u32(15))) ^ key1) + high)
    x = u32(x * _C2)
    x = u32(u32(x ^ u32(x >> u32(16))) * _C3)
    x = u32(x ^ u32(x >> u32(15)))
    return f32(i32(x >> u32(8))) * _UNIT  # signed: the conversion that processors have


@inlined
def _upper(counter):  # type: ignore[no-untyped-def]
    """What the upper half of a counter adds."""
    return u32(u32(u64(counter) >> u64(32)) * _C3)


@inlined
def _chosen(low, first, here, beyond):  # type: ignore[no-untyped-def]
    """`here` as long as the counter's lower half has not wrapped since `first`."""
    return beyond if low < first else here


@inlined
def _affine(low, high):  # type: ignore[no-untyped-def]
    """Zero point, width and scale of a range; the scale is 1/2 where high - low would overflow."""
    scale = f32(0.5) if np.isinf(high - low) else f32(1.0)
    zero = low * scale
    return zero, high * scale - zero, scale


@inlined
def _ordered(bits):  # type: ignore[no-untyped-def]
    """float32 bits as an int32 of the same order (NaN beyond infinity): its minimum and maximum vectorise."""
    return i32(bits ^ i32(i32(bits >> i32(31)) & _MAGNITUDE))


@Kernel
def quantize(  # type: ignore[no-untyped-def]
    x, xbits, out, ranges, rbits, widths, key0, key1, bits, block, levels, begin, half, rounding, number
):
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
            zero, width, scale = _affine(low, high)
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
                here, beyond = _upper(number + start), _upper(number + start + part.size)
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
                            draws[j] = _uniform(low32, _chosen(low32, c0, here, beyond), key0, key1)
                        for j in range(some.size):
                            h = places[j]
                            code = i32(begin[min(place_bits[j] >> i32(KEY), i32(begin.size - 1))])
                            code = min(i32(code + i32(h >= levels[code + 1])), i32(topcode - 1))
                            while code < topcode - 1 and h >= levels[code + 1]:
                                code += i32(1)
                            fraction = (h - levels[code]) / (levels[code + 1] - levels[code])
                            up = fraction >= f32(0.5) if rounding == 1 else draws[j] < fraction
                            code = min(i32(code + i32(up)), topcode)
                            bytes_there[j] |= np.uint8(u32(code) << shift)


@Kernel
def dequantize(codes, ranges, out, key0, key1, bits, block, levels, dither, number):  # type: ignore[no-untyped-def]
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
            zero, span, scale = _affine(low, high)
            step = span / top
            bytes_ = codes[b * stride : b * stride + size]
            for slot in range(slots):
                shift = u32(slot * bits)
                start = first + slot * size
                part = out[start : min(start + size, first + count)]
                if dither != f32(0):
                    c0 = u32(number + start)
                    here, beyond = _upper(number + start), _upper(number + start + part.size)
                    for j in range(part.size):
                        low32 = u32(c0 + u32(j))
                        u = _uniform(low32, _chosen(low32, c0, here, beyond), key0, key1)
                        code = u32(u32(bytes_[j]) >> shift) & mask
                        h = (levels[code] if levels.size else f32(i32(code))) + (u - centre) * dither
                        value = (h * step + zero) / scale
                        value = -_MOST if value < -_MOST else value  # half a bin beyond the range; NaN stays
                        part[j] = _MOST if value > _MOST else value
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


@inlined
def _decoded(byte, shift, mask, u, dither, step, zero, scale):  # type: ignore[no-untyped-def]
    """An element of uniform levels, not clamped: within rounding of `dequantize`."""
    h = f32(i32(u32(u32(byte) >> shift) & mask)) + u * dither
    return (h * step + zero) / scale


@Kernel
def column_sums(codes, ranges, g, sums, key0, key1, bits, block, dither):  # type: ignore[no-untyped-def]
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
            zero, span, scale = _affine(low, high)
            step = span / top
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


@Kernel
def norm_gradient(codes, ranges, g, out, shift_by, factor, gain, key0, key1, bits, block, dither):  # type: ignore[no-untyped-def]
    n, width, slots, top = g.size, shift_by.size, 8 // bits, f32((1 << bits) - 1)
    blocks = ranges.shape[0]
    stride = (block + slots - 1) // slots
    group = max(1, CHUNK // block)
    mask, none, centre = u32((1 << bits) - 1), f32(0), f32(0.5 - UNIT / 2)
    for task in nb.prange((blocks + group - 1) // group):
        for b in range(task * group, min(blocks, (task + 1) * group)):
            first = b * block
            count = min(block, n - first)
            size = (count + slots - 1) // slots
            low, high = ranges[b, 0], ranges[b, 1]
            zero, span, scale = _affine(low, high)
            step = span / top
            own = f32(1) + (step / scale) * (step / scale) * (dither / (f32(12) * f32(n // width)))
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
                    if dither != none:
                        c0, here, beyond = u32(at), _upper(at), _upper(at + m)
                        for j in range(m):
                            low32 = u32(c0 + u32(j))
                            u = _uniform(low32, _chosen(low32, c0, here, beyond), key0, key1) - centre
                            x = _decoded(bytes_[j], shift, mask, u, dither, step, zero, scale)
                            result[j] = (part[j] * own - a[j] - x * f[j]) * s[j]
                    else:
                        for j in range(m):
                            x = _decoded(bytes_[j], shift, mask, none, none, step, zero, scale)
                            result[j] = (part[j] - a[j] - x * f[j]) * s[j]
                    at += m


@Kernel
def pack_mask(x, out):  # type: ignore[no-untyped-def]
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


@Kernel
def relu(x, y, out):  # type: ignore[no-untyped-def]
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


@Kernel
def apply_mask(grad, mask, out, slope):  # type: ignore[no-untyped-def]
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


@Kernel
def dropout(x, out, key0, key1, p, scale):  # type: ignore[no-untyped-def]
    for task in nb.prange((x.size + CHUNK - 1) // CHUNK):
        start = task * CHUNK
        part, result = x[start : start + CHUNK], out[start : start + CHUNK]
        c0, here, beyond = u32(start), _upper(start), _upper(start + part.size)
        for j in range(part.size):
            low32 = u32(c0 + u32(j))
            keep = _uniform(low32, _chosen(low32, c0, here, beyond), key0, key1) >= p
            result[j] = part[j] * (scale if keep else f32(0))


@Kernel
def norm_relu_dropout(x, mean, gain, bias, y, out, key0, key1, p, scale):  # type: ignore[no-untyped-def]
    n, size, width = x.size, out.size, mean.size
    for task in nb.prange((size + CHUNK // 8 - 1) // (CHUNK // 8)):
        start, stop = task * (CHUNK // 8), min(size, (task + 1) * (CHUNK // 8))
        bytes_ = out[start:stop]
        for j in range(stop - start):
            bytes_[j] = 0
        for slot in range(8):
            at, end = slot * size + start, min(n, slot * size + stop)
            while at < end:  # row by row: a column is one element of a vector
                column = at % width
                m = min(width - column, end - at)
                first = at - slot * size - start
                part, result, own = x[at : at + m], y[at : at + m], bytes_[first : first + m]
                a, s, b = mean[column : column + m], gain[column : column + m], bias[column : column + m]
                c0, here, beyond = u32(at), _upper(at), _upper(at + m)
                for j in range(m):
                    h = (part[j] - a[j]) * s[j] + b[j]
                    low32 = u32(c0 + u32(j))
                    kept = _uniform(low32, _chosen(low32, c0, here, beyond), key0, key1) >= p
                    own[j] |= np.uint8(u32(not (h <= 0)) << u32(slot))
                    result[j] = (f32(0) if h <= 0 else h) * (scale if kept else f32(0))
                at += m


@Kernel
def relu_dropout_gradient(grad, mask, out, key0, key1, p, scale):  # type: ignore[no-untyped-def]
    n, size = grad.size, mask.size
    for task in nb.prange((size + CHUNK // 8 - 1) // (CHUNK // 8)):
        start, stop = task * (CHUNK // 8), min(size, (task + 1) * (CHUNK // 8))
        bytes_ = mask[start:stop]
        for slot in range(8):
            bit, at = np.uint8(1 << slot), slot * size + start
            part, result = grad[at : min(n, slot * size + stop)], out[at:]
            c0, here, beyond = u32(at), _upper(at), _upper(at + part.size)
            for j in range(part.size):
                low32 = u32(c0 + u32(j))
                kept = _uniform(low32, _chosen(low32, c0, here, beyond), key0, key1) >= p
                passed = part[j] * (scale if kept else f32(0))
                result[j] = passed if bytes_[j] & bit else f32(0)


@Kernel
def passed_rows(  # type: ignore[no-untyped-def]
    codes, ranges, out, weight, bias, mask, slope, key0, key1, key2, key3, drops, p, scale, number, total, bits, block,
    dither,
):  # fmt: skip
    n, width, slots, top = out.size, weight.size, 8 // bits, f32((1 << bits) - 1)
    stride = (block + slots - 1) // slots
    group = max(1, CHUNK // block)
    blocks, first_block = (n + block - 1) // block, number // block
    code_mask, centre = u32((1 << bits) - 1), f32(0.5 - UNIT / 2)
    for task in nb.prange((blocks + group - 1) // group):
        for b in range(task * group, min(blocks, (task + 1) * group)):
            first = (first_block + b) * block  # in the whole
            size = (min(block, total - first) + slots - 1) // slots
            low, high = ranges[first_block + b, 0], ranges[first_block + b, 1]
            zero, span, unit = _affine(low, high)
            step = span / top
            for slot in range(slots):
                shift = u32(slot * bits)
                at, stop = first + slot * size, min(first + min(block, number + n - first), first + (slot + 1) * size)
                begin = first_block + b
                while at < stop:  # row by row: a column is one element of a vector; and one bit of the mask
                    column = at % width
                    m = min(width - column, stop - at)
                    bit, place = u32(0), 0
                    if mask.size:
                        bit, place = u32(at // mask.size), at % mask.size
                        m = min(m, mask.size - place)
                    at_code = begin * stride + at - first - slot * size
                    bytes_, result = codes[at_code : at_code + m], out[at - number : at - number + m]
                    w, a = weight[column : column + m], bias[column : column + m]
                    c0, here, beyond = u32(at), _upper(at), _upper(at + m)
                    for j in range(m):
                        low32 = u32(c0 + u32(j))
                        u = _uniform(low32, _chosen(low32, c0, here, beyond), key0, key1) - centre
                        result[j] = _decoded(bytes_[j], shift, code_mask, u, dither, step, zero, unit) * w[j] + a[j]
                    if mask.size:
                        passes = mask[place : place + m]
                        if slope != 0:
                            for j in range(m):
                                result[j] = result[j] if u32(passes[j]) >> bit & u32(1) else result[j] * slope
                        else:
                            for j in range(m):
                                result[j] = result[j] if u32(passes[j]) >> bit & u32(1) else f32(0)
                    if drops:
                        for j in range(m):
                            low32 = u32(c0 + u32(j))
                            kept = _uniform(low32, _chosen(low32, c0, here, beyond), key2, key3) >= p
                            result[j] *= scale if kept else f32(0)
                    at += m


@Kernel
def finite(xbits):  # type: ignore[no-untyped-def]
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


@Kernel
def fingerprint(words, rest):  # type: ignore[no-untyped-def]
    tasks = (words.size + CHUNK - 1) // CHUNK
    sums = np.zeros(tasks + 1, np.uint64)
    for task in nb.prange(tasks):
        start = task * CHUNK
        part = words[start : start + CHUNK]
        total = np.uint64(0)
        for k in range(part.size):
            total += _mixed(part[k] + np.uint64(start + k + 1) * _GOLDEN)
        sums[task] = total
    if rest.size:
        last = np.uint64(0)
        for k in range(rest.size):
            last |= np.uint64(rest[k]) << np.uint64(8 * k)
        sums[tasks] = _mixed(last + np.uint64(words.size + 1) * _GOLDEN)
    return np.int64(sums.sum())


@inlined
def _mixed(z):  # type: ignore[no-untyped-def]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@Kernel
def signs(out, key0, key1):  # type: ignore[no-untyped-def]
    for task in nb.prange((out.size + CHUNK - 1) // CHUNK):
        start = task * CHUNK
        part = out[start : start + CHUNK]
        c0, here, beyond = u32(start), _upper(start), _upper(start + part.size)
        for j in range(part.size):
            low32 = u32(c0 + u32(j))
            # the number's 24 bits are the topmost: below one half the first of them is clear
            u = _uniform(low32, _chosen(low32, c0, here, beyond), key0, key1)
            part[j] = f32(1) if u < f32(0.5) else f32(-1)


@Kernel
def aggregate(crow, col, values, x, out):  # type: ignore[no-untyped-def]
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


@Kernel
def row_scores(x, sums, bits, out):  # type: ignore[no-untyped-def]
    rows, width = x.shape
    for task in nb.prange((rows + 255) // 256):
        start, stop = task * 256, min(rows, (task + 1) * 256)
        lane = np.empty(16, np.float32)
        for row in range(start, stop):
            part = x[row]
            lane[:] = f32(0)
            whole = width // 16 * 16
            for k in range(0, whole, 16):
                some = part[k : k + 16]
                for j in range(16):  # sixteen sums side by side: what vectorises without fast-math
                    lane[j] += some[j] * some[j]
            total = f32(0)
            for j in range(16):
                total += lane[j]
            for k in range(whole, width):
                total += part[k] * part[k]
            sums[row] = total
        for row in range(start, stop):
            out[row] = np.uint8(u32(bits[row]) >> u32(23))


@Kernel
def pick_rows(scores, probabilities, start, index, weight):  # type: ignore[no-untyped-def]
    total, at, found = np.int64(0), np.int64(start), 0
    for row in range(scores.size):
        probability = probabilities[scores[row]]
        total += probability
        if total > at and found < index.size:
            index[found], weight[found] = row, f32(np.float64(FIXED_POINT_ONE) / np.float64(probability))
            found += 1
            at += np.int64(FIXED_POINT_ONE)
    for k in range(found, index.size):
        index[k], weight[k] = max(scores.size - 1, 0), f32(0)
