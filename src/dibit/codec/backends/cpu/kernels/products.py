"""Kernels that multiply with what was encoded, unpacked element by element and never formed; and sparse products."""

from __future__ import annotations

import numba as nb

from dibit.codec.backends.cpu.jit import Kernel
from dibit.codec.backends.cpu.kernels.numbers import (
    CHUNK,
    decoded,
    f32,
    range_parameters,
    u32,
    uniform,
    upper_term,
    upper_word,
)
from dibit.codec.rng import UNIT


@Kernel
def column_sums(codes, ranges, g, sums, key0, key1, bits, block, dither):
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
            zero, span, scale = range_parameters(low, high)
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
                    c0, here, beyond = u32(at), upper_term(at), upper_term(at + m)
                    if dither != f32(0):
                        for j in range(m):
                            low32 = u32(c0 + u32(j))
                            u = uniform(low32, upper_word(low32, c0, here, beyond), key0, key1) - centre
                            own[j] += part[j] * decoded(bytes_[j], shift, mask, u, dither, step, zero, scale)
                    else:
                        for j in range(m):
                            own[j] += part[j] * decoded(bytes_[j], shift, mask, f32(0), dither, step, zero, scale)
                    at += m


@Kernel
def norm_gradient(codes, ranges, g, out, shift_by, factor, gain, key0, key1, bits, block, dither):
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
            zero, span, scale = range_parameters(low, high)
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
                        c0, here, beyond = u32(at), upper_term(at), upper_term(at + m)
                        for j in range(m):
                            low32 = u32(c0 + u32(j))
                            u = uniform(low32, upper_word(low32, c0, here, beyond), key0, key1) - centre
                            x = decoded(bytes_[j], shift, mask, u, dither, step, zero, scale)
                            result[j] = (part[j] * own - a[j] - x * f[j]) * s[j]
                    else:
                        for j in range(m):
                            x = decoded(bytes_[j], shift, mask, none, none, step, zero, scale)
                            result[j] = (part[j] - a[j] - x * f[j]) * s[j]
                    at += m
