"""Kernels over the elements of a tensor: bit masks, dropout, signs, whether all is finite.

A mask is one block of the whole tensor: byte j holds elements j, j + size, ..., j + 7 size, each a run in memory.
"""

from __future__ import annotations

import numba as nb
import numpy as np

from dibit.codec.backends.cpu.jit import Kernel
from dibit.codec.backends.cpu.kernels.numbers import (
    CHUNK,
    INFINITE,
    MAGNITUDE,
    decoded,
    f32,
    i32,
    range_parameters,
    u32,
    uniform,
    upper_term,
    upper_word,
)
from dibit.codec.rng import UNIT


@Kernel
def pack_mask(x, out):
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
def relu(x, y, out):
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
def apply_mask(grad, mask, out, slope):
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
def scale_masked(x, mask, out, scale):
    n, size = x.size, mask.size
    for task in nb.prange((size + CHUNK // 8 - 1) // (CHUNK // 8)):
        start, stop = task * (CHUNK // 8), min(size, (task + 1) * (CHUNK // 8))
        bytes_ = mask[start:stop]
        for slot in range(8):
            bit = np.uint8(1 << slot)
            part, result = x[slot * size + start : min(n, slot * size + stop)], out[slot * size + start :]
            for j in range(part.size):
                result[j] = part[j] * (scale if bytes_[j] & bit else f32(0))


@Kernel
def dropout(x, out, key0, key1, p, scale):
    for task in nb.prange((x.size + CHUNK - 1) // CHUNK):
        start = task * CHUNK
        part, result = x[start : start + CHUNK], out[start : start + CHUNK]
        c0, here, beyond = u32(start), upper_term(start), upper_term(start + part.size)
        for j in range(part.size):
            low32 = u32(c0 + u32(j))
            keep = uniform(low32, upper_word(low32, c0, here, beyond), key0, key1) >= p
            result[j] = part[j] * (scale if keep else f32(0))


@Kernel
def norm_relu_dropout(x, mean, gain, bias, y, out, key0, key1, p, scale):
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
                c0, here, beyond = u32(at), upper_term(at), upper_term(at + m)
                for j in range(m):
                    h = (part[j] - a[j]) * s[j] + b[j]
                    low32 = u32(c0 + u32(j))
                    kept = uniform(low32, upper_word(low32, c0, here, beyond), key0, key1) >= p
                    own[j] |= np.uint8(u32(not (h <= 0)) << u32(slot))
                    result[j] = (f32(0) if h <= 0 else h) * (scale if kept else f32(0))
                at += m


@Kernel
def relu_dropout_gradient(grad, mask, out, key0, key1, p, scale):
    n, size = grad.size, mask.size
    for task in nb.prange((size + CHUNK // 8 - 1) // (CHUNK // 8)):
        start, stop = task * (CHUNK // 8), min(size, (task + 1) * (CHUNK // 8))
        bytes_ = mask[start:stop]
        for slot in range(8):
            bit, at = np.uint8(1 << slot), slot * size + start
            part, result = grad[at : min(n, slot * size + stop)], out[at:]
            c0, here, beyond = u32(at), upper_term(at), upper_term(at + part.size)
            for j in range(part.size):
                low32 = u32(c0 + u32(j))
                kept = uniform(low32, upper_word(low32, c0, here, beyond), key0, key1) >= p
                passed = part[j] * (scale if kept else f32(0))
                result[j] = passed if bytes_[j] & bit else f32(0)


@Kernel
def passed_rows(
    codes,
    ranges,
    out,
    weight,
    bias,
    mask,
    slope,
    key0,
    key1,
    key2,
    key3,
    drops,
    p,
    scale,
    number,
    total,
    bits,
    block,
    dither,
):
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
            zero, span, unit = range_parameters(low, high)
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
                    c0, here, beyond = u32(at), upper_term(at), upper_term(at + m)
                    for j in range(m):
                        low32 = u32(c0 + u32(j))
                        u = uniform(low32, upper_word(low32, c0, here, beyond), key0, key1) - centre
                        result[j] = decoded(bytes_[j], shift, code_mask, u, dither, step, zero, unit) * w[j] + a[j]
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
                            kept = uniform(low32, upper_word(low32, c0, here, beyond), key2, key3) >= p
                            result[j] *= scale if kept else f32(0)
                    at += m


@Kernel
def signs(out, key0, key1):
    for task in nb.prange((out.size + CHUNK - 1) // CHUNK):
        start = task * CHUNK
        part = out[start : start + CHUNK]
        c0, here, beyond = u32(start), upper_term(start), upper_term(start + part.size)
        for j in range(part.size):
            low32 = u32(c0 + u32(j))
            # the number's 24 bits are the topmost: below one half the first of them is clear
            u = uniform(low32, upper_word(low32, c0, here, beyond), key0, key1)
            part[j] = f32(1) if u < f32(0.5) else f32(-1)


@Kernel
def finite(xbits):
    tasks = (xbits.size + CHUNK - 1) // CHUNK
    bad = np.zeros(tasks, np.int32)
    for task in nb.prange(tasks):
        worst = i32(0)
        part = xbits[task * CHUNK : (task + 1) * CHUNK]
        for k in range(part.size):
            size = i32(part[k] & MAGNITUDE)
            worst = size if size > worst else worst
        bad[task] = worst
    return bad.max() < INFINITE if tasks else True
