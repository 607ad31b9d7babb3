"""Kernels that make codes of numbers, block by block, and numbers of codes.

A program takes `B` blocks and `T` bytes of each; slot by slot, so that each access is a run of `T` elements. Blocks of
more bytes are shared out among `chunks` programs, which then find the ends of the range in `ends_ptr`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dibit.codec.backends.triton.kernels.numbers import (
    INFINITE,
    MAGNITUDE,
    NOT_A_NUMBER,
    decoded,
    keys,
    ordered,
    quotient,
    range_parameters,
    rounded,
    stored_range,
    uniform,
)

_UPPER, _NEXT, _LARGEST = tl.constexpr(-65536), tl.constexpr(65536), tl.constexpr(2147483647)


@triton.jit
def _element(
    x_ptr,
    index_ptr,
    shift_ptr,
    scale_ptr,
    first,
    j,
    mask,
    there,
    WIDTH: tl.constexpr,
    GATHER: tl.constexpr,
    AFFINE: tl.constexpr,
    RUN: tl.constexpr,
):
    """Elements `first` (int64) + j of the matrix that is encoded: of rows `index` of x, moved and scaled.

    RUN: how many elements from `first` on lie in one row, which is then looked up once; 0 where they may not.
    """
    if WIDTH:
        column = (first % WIDTH).to(tl.int32)
        if RUN:
            row = first // WIDTH
            if RUN % 16 == 0:
                column = tl.multiple_of(column, [1, 16])
            column += j
            found = there
        else:
            column += j
            row, column = first // WIDTH + column // WIDTH, column % WIDTH
            found = mask
        if GATHER:
            row = tl.load(index_ptr + row, mask=found, other=0)
        x = tl.load(x_ptr + row * WIDTH + column, mask=mask, other=0.0).to(tl.float32)
        if AFFINE:
            shift = tl.load(shift_ptr + column, mask=mask, other=0.0)
            x = (x - shift) * tl.load(scale_ptr + column, mask=mask, other=0.0)
    else:
        x = tl.load(x_ptr + (first + j), mask=mask, other=0.0).to(tl.float32)
    return x


@triton.jit
def ends(
    x_ptr,
    index_ptr,
    shift_ptr,
    scale_ptr,
    ends_ptr,
    block,
    start,
    chunks,
    WIDTH: tl.constexpr,
    GATHER: tl.constexpr,
    AFFINE: tl.constexpr,
    T: tl.constexpr,
):
    """Smallest and largest element of large blocks, as ordered int32, from `T` elements a program."""
    program = tl.program_id(0).to(tl.int64)
    b, c = program // chunks, program % chunks
    j = tl.arange(0, T)
    mask = c * T + j < block
    first = start + b * block + c * T
    x = _element(x_ptr, index_ptr, shift_ptr, scale_ptr, first, j, mask, mask, WIDTH, GATHER, AFFINE, 0)
    key = ordered(x.to(tl.int32, bitcast=True))
    tl.atomic_min(ends_ptr + 2 * b, tl.min(tl.where(mask, key, _LARGEST), axis=0))
    tl.atomic_max(ends_ptr + 2 * b + 1, tl.max(tl.where(mask, key, -_LARGEST - 1), axis=0))


@triton.jit
def quantize(
    x_ptr,
    index_ptr,
    shift_ptr,
    scale_ptr,
    seed_ptr,
    ends_ptr,
    levels_ptr,
    codes_ptr,
    ranges_ptr,
    widths_ptr,
    blocks,
    own,
    start,
    number,
    chunks,
    BLOCK: tl.constexpr,
    SHARED: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    NEAREST: tl.constexpr,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    GATHER: tl.constexpr,
    AFFINE: tl.constexpr,
    RUN: tl.constexpr,
    B: tl.constexpr,
    T: tl.constexpr,
):
    """`reference.quantize` of equal blocks, of BLOCK elements, or of `own` ones where BLOCK is 0.

    Args:
        chunks: programs that share a block (SHARED), whose ends are known.
        start: of the first element in the matrix that is encoded.
        number: of the first element in the stream of random numbers.
    """
    SLOTS: tl.constexpr = 8 // BITS
    TOP: tl.constexpr = (1 << BITS) - 1
    EVEN: tl.constexpr = BLOCK > 0 and BLOCK == SLOTS * T  # a tile has no element beyond its block
    program = tl.program_id(0).to(tl.int64)
    if BLOCK:
        block, size = BLOCK, (BLOCK + SLOTS - 1) // SLOTS
    else:
        block, size = own, (own + SLOTS - 1) // SLOTS
    if SHARED:
        b, begin = program // chunks + tl.arange(0, B)[:, None], program % chunks * T
    else:
        b, begin = program * B + tl.arange(0, B)[:, None], program * 0
    there = b < blocks
    j = tl.arange(0, T)[None, :]

    if not SHARED:
        lowest = tl.full((B, T), 2147483647, tl.int32)
        highest = tl.full((B, T), -2147483648, tl.int32)
        for slot in tl.static_range(SLOTS):
            mask = tl.broadcast_to(there, (B, T)) if EVEN else there & (j < size) & (slot * size + j < block)
            first = start + b * block + slot * size
            some = there & (slot * size < block)
            x = _element(x_ptr, index_ptr, shift_ptr, scale_ptr, first, j, mask, some, WIDTH, GATHER, AFFINE, RUN)
            key = ordered(x.to(tl.int32, bitcast=True))
            lowest = tl.minimum(lowest, tl.where(mask, key, 2147483647))
            highest = tl.maximum(highest, tl.where(mask, key, -2147483648))
        lowest, highest = tl.min(lowest, axis=1)[:, None], tl.max(highest, axis=1)[:, None]
    else:
        lowest = tl.load(ends_ptr + 2 * b, mask=there, other=0)
        highest = tl.load(ends_ptr + 2 * b + 1, mask=there, other=0)

    low_bits, high_bits = ordered(lowest), ordered(highest)
    finite = ((low_bits & MAGNITUDE) < INFINITE) & ((high_bits & MAGNITUDE) < INFINITE)
    low_bits, high_bits = tl.where(finite, low_bits, NOT_A_NUMBER), tl.where(finite, high_bits, NOT_A_NUMBER)
    span = high_bits.to(tl.float32, bitcast=True) - low_bits.to(tl.float32, bitcast=True)
    once = there & (begin == 0)
    tl.store(widths_ptr + b, span, mask=once)
    if HALF:
        # bfloat16 is a float32's upper half: cut towards zero, one further out where something was cut off
        cut_low, cut_high = low_bits & _UPPER, high_bits & _UPPER
        cut_low += tl.where(finite & (low_bits < 0) & (cut_low != low_bits), _NEXT, 0)
        cut_high += tl.where(finite & (high_bits >= 0) & (cut_high != high_bits), _NEXT, 0)
        tl.store(ranges_ptr + 2 * b, (cut_low >> 16).to(tl.int16), mask=once)
        tl.store(ranges_ptr + 2 * b + 1, (cut_high >> 16).to(tl.int16), mask=once)
        low, high = cut_low.to(tl.float32, bitcast=True), cut_high.to(tl.float32, bitcast=True)
    else:
        low, high = low_bits.to(tl.float32, bitcast=True), high_bits.to(tl.float32, bitcast=True)
        tl.store(ranges_ptr + 2 * b, low, mask=once)
        tl.store(ranges_ptr + 2 * b + 1, high, mask=once)

    zero, width, scale, _ = range_parameters(low, high)
    wide = width > 0
    divisor = tl.where(wide, width, 1.0)
    usual = (divisor >= 5.421010862427522e-20) & (divisor <= 4.253529586511731e37)  # 2^-64, 2^125
    usually = tl.min(usual.to(tl.int32)) == 1
    inverse = tl.div_rn(tl.full((B, 1), 1.0, tl.float32), divisor)
    every = tl.broadcast_to(divisor, (B, T))
    key0, key1 = keys(seed_ptr, 0)
    packed = tl.zeros((B, T), tl.int32)
    for slot in tl.static_range(SLOTS):
        if EVEN:
            mask = tl.broadcast_to(there, (B, T))
        else:
            mask = there & (begin + j < size) & (slot * size + begin + j < block)
        first = b * block + slot * size + begin
        some = there & (slot * size + begin < block)
        x = _element(x_ptr, index_ptr, shift_ptr, scale_ptr, start + first, j, mask, some, WIDTH, GATHER, AFFINE, RUN)
        above = x * scale - zero
        h = quotient(above, every, inverse) if usually else tl.div_rn(above, every)
        h = tl.where(wide, h * TOP, 0.0)
        u = uniform(number + first, j, key0, key1)
        code = rounded(tl.where(mask, h, 0.0), u, levels_ptr, BITS, LEVELS, NEAREST)
        packed |= tl.where(mask, code, 0) << (slot * BITS)
    tl.store(codes_ptr + (b * size + begin + j), packed.to(tl.uint8), mask=there & (begin + j < size))


@triton.jit
def dequantize(
    codes_ptr,
    ranges_ptr,
    seed_ptr,
    levels_ptr,
    out_ptr,
    blocks,
    own,
    number,
    dither,
    chunks,
    BLOCK: tl.constexpr,
    SHARED: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    DITHERED: tl.constexpr,
    HALF: tl.constexpr,
    CLAMP: tl.constexpr,
    B: tl.constexpr,
    T: tl.constexpr,
):
    """`reference.dequantize` of equal blocks; CLAMP: the largest number of the result's dtype, 0 for none."""
    SLOTS: tl.constexpr = 8 // BITS
    program = tl.program_id(0).to(tl.int64)
    if BLOCK:
        block, size = BLOCK, (BLOCK + SLOTS - 1) // SLOTS
    else:
        block, size = own, (own + SLOTS - 1) // SLOTS
    if SHARED:
        b, begin = program // chunks + tl.arange(0, B)[:, None], program % chunks * T
    else:
        b, begin = program * B + tl.arange(0, B)[:, None], program * 0
    there = b < blocks
    j = tl.arange(0, T)[None, :]
    low, high = stored_range(ranges_ptr, b, there, HALF)
    bytes_ = tl.load(codes_ptr + (b * size + begin + j), mask=there & (begin + j < size), other=0).to(tl.int32)
    key0, key1 = keys(seed_ptr, 0)
    for slot in tl.static_range(SLOTS):
        mask = there & (begin + j < size) & (slot * size + begin + j < block)
        first = b * block + slot * size + begin
        code = (bytes_ >> (slot * BITS)) & ((1 << BITS) - 1)
        u = uniform(number + first, j, key0, key1) if DITHERED else 0.0
        value = decoded(code, low, high, u, dither, levels_ptr, mask, BITS, LEVELS, DITHERED)
        if CLAMP > 0:
            value = tl.where(value > CLAMP, CLAMP, tl.where(value < -CLAMP, -CLAMP, value))
        tl.store(out_ptr + (first + j), value.to(out_ptr.dtype.element_ty), mask=mask)
