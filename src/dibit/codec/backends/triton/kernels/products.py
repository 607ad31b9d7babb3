"""Kernels that multiply with what was encoded, unpacked in registers and never formed.

The matrix (rows, WIDTH) was encoded in blocks of BLOCK elements, or of `own` ones where BLOCK is 0. TAIL: block `last`
is short, of `short` bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dibit.codec.backends.triton.kernels.numbers import decoded, keys, stored_range, uniform


@triton.jit
def _unpacked(
    codes_ptr,
    ranges_ptr,
    levels_ptr,
    key0,
    key1,
    row,
    r,
    d,
    rows,
    own,
    last,
    short,
    dither,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    DITHERED: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
):
    """The tile of elements (row + r, d) for row int64, r (R, 1) and d (1, C) int32; 0 outside of the matrix."""
    SLOTS: tl.constexpr = 8 // BITS
    if BLOCK:
        count, size = BLOCK, (BLOCK + SLOTS - 1) // SLOTS
    else:
        count, size = own, (own + SLOTS - 1) // SLOTS
    mask = (row + r < rows) & (d < WIDTH)
    first = row * WIDTH
    at = (first % count).to(tl.int32) + r * WIDTH + d
    block, within = first // count + at // count, at % count
    slot, j = within // size, within % size
    if TAIL:
        slot, j = tl.where(block == last, within // short, slot), tl.where(block == last, within % short, j)
    low, high = stored_range(ranges_ptr, block, mask, HALF)
    byte = tl.load(codes_ptr + block * size + j, mask=mask, other=0).to(tl.int32)
    code = (byte >> (slot * BITS)) & ((1 << BITS) - 1)
    u = uniform(first, r * WIDTH + d, key0, key1) if DITHERED else 0.0
    value = decoded(code, low, high, u, dither, levels_ptr, mask, BITS, LEVELS, DITHERED)
    return tl.where(mask, value, 0.0)


@triton.jit
def weight_gradient(
    codes_ptr,
    ranges_ptr,
    levels_ptr,
    seed_ptr,
    dy_ptr,
    index_ptr,
    weight_ptr,
    out_ptr,
    rows,
    own,
    last,
    short,
    share,
    columns,
    dither,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    DITHERED: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
    SAMPLED: tl.constexpr,
    PRECISION: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
):
    """A part of dY^T X: rows `share * program` onwards, to the slab of `out` (parts, columns, WIDTH) of that program.

    SAMPLED: row k of X belongs to row index[k] of dY, and counts weight[k] times.
    """
    part = tl.program_id(1).to(tl.int64)
    tiles: tl.constexpr = (WIDTH + D - 1) // D
    o = tl.program_id(0) // tiles * C + tl.arange(0, C)[None, :]
    d = tl.program_id(0) % tiles * D + tl.arange(0, D)[None, :]
    r = tl.arange(0, R)[:, None]
    key0, key1 = keys(seed_ptr, 0)
    total = tl.zeros((C, D), tl.float32)
    stop = tl.minimum(rows, (part + 1) * share)
    for step in range(0, share, R):
        row = part * share + step
        mask = row + r < stop
        if SAMPLED:
            source = tl.load(index_ptr + row + r, mask=mask, other=0)
            rows_of_dy = tl.load(dy_ptr + source * columns + o, mask=mask & (o < columns), other=0.0).to(tl.float32)
            rows_of_dy = rows_of_dy * tl.load(weight_ptr + row + r, mask=mask, other=0.0)
        else:
            rows_of_dy = tl.load(dy_ptr + (row + r) * columns + o, mask=mask & (o < columns), other=0.0).to(tl.float32)
        x = _unpacked(
            codes_ptr,
            ranges_ptr,
            levels_ptr,
            key0,
            key1,
            row,
            r,
            d,
            rows,
            own,
            last,
            short,
            dither,
            WIDTH,
            BLOCK,
            BITS,
            LEVELS,
            DITHERED,
            HALF,
            TAIL,
        )
        total += tl.dot(tl.trans(rows_of_dy), x, input_precision=PRECISION)
    o = tl.program_id(0) // tiles * C + tl.arange(0, C)[:, None]
    to = out_ptr + (part * columns + o) * WIDTH + d
    tl.store(to, total, mask=(o < columns) & (d < WIDTH))


@triton.jit
def column_sums(
    codes_ptr,
    ranges_ptr,
    levels_ptr,
    seed_ptr,
    g_ptr,
    out_ptr,
    rows,
    own,
    last,
    short,
    share,
    dither,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    DITHERED: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
):
    """A part of sum_n g_n x_n: rows `share * program` onwards, to the row of `out` (parts, WIDTH) of that program."""
    part = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * D + tl.arange(0, D)[None, :]
    r = tl.arange(0, R)[:, None]
    key0, key1 = keys(seed_ptr, 0)
    total = tl.zeros((R, D), tl.float32)
    stop = tl.minimum(rows, (part + 1) * share)
    for step in range(0, share, R):
        row = part * share + step
        mask = (row + r < stop) & (d < WIDTH)
        g = tl.load(g_ptr + (row + r) * WIDTH + d, mask=mask, other=0.0).to(tl.float32)
        x = _unpacked(
            codes_ptr,
            ranges_ptr,
            levels_ptr,
            key0,
            key1,
            row,
            r,
            d,
            rows,
            own,
            last,
            short,
            dither,
            WIDTH,
            BLOCK,
            BITS,
            LEVELS,
            DITHERED,
            HALF,
            TAIL,
        )
        total += tl.where(mask, g * x, 0.0)
    column = tl.program_id(0) * D + tl.arange(0, D)
    tl.store(out_ptr + part * WIDTH + column, tl.sum(total, axis=0), mask=column < WIDTH)


@triton.jit
def norm_gradient(
    codes_ptr,
    ranges_ptr,
    levels_ptr,
    seed_ptr,
    g_ptr,
    shift_ptr,
    factor_ptr,
    gain_ptr,
    out_ptr,
    rows,
    own,
    last,
    short,
    dither,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    HALF: tl.constexpr,
    TAIL: tl.constexpr,
    DITHERED: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
):
    """(g (1 + v / N) - shift - x * factor) * gain, v the variance of dither 1; 0 where there is none."""
    row = tl.program_id(0).to(tl.int64) * R
    r = tl.arange(0, R)[:, None]
    d = tl.program_id(1) * D + tl.arange(0, D)[None, :]
    mask = (row + r < rows) & (d < WIDTH)
    key0, key1 = keys(seed_ptr, 0)
    x = _unpacked(
        codes_ptr,
        ranges_ptr,
        levels_ptr,
        key0,
        key1,
        row,
        r,
        d,
        rows,
        own,
        last,
        short,
        dither,
        WIDTH,
        BLOCK,
        BITS,
        False,
        DITHERED,
        HALF,
        TAIL,
    )
    inside = d < WIDTH
    shift = tl.load(shift_ptr + d, mask=inside, other=0.0)
    factor = tl.load(factor_ptr + d, mask=inside, other=0.0)
    gain = tl.load(gain_ptr + d, mask=inside, other=0.0)
    g = tl.load(g_ptr + (row + r) * WIDTH + d, mask=mask, other=0.0)
    if DITHERED:
        count = BLOCK if BLOCK else own
        block = row * WIDTH // count + ((row * WIDTH % count).to(tl.int32) + r * WIDTH + d) // count
        low, high = stored_range(ranges_ptr, block, mask, HALF)
        step = tl.where(mask, (high - low) / ((1 << BITS) - 1), 0.0)
        g = g * (1.0 + step * step * (dither / (12.0 * rows)))
    tl.store(out_ptr + (row + r) * WIDTH + d, (g - shift - x * factor) * gain, mask=mask)
