"""Kernels over the elements of a tensor: bit masks, dropout, signs, whether all is finite.

A mask is one block of the whole tensor: byte j holds elements j, j + size, ..., j + 7 size, each a run in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dibit.codec.backends.triton.kernels.numbers import INFINITE, MAGNITUDE, hashed, keys, uniform


@triton.jit
def pack_mask(x_ptr, y_ptr, bits_ptr, n, size, RELU: tl.constexpr, T: tl.constexpr):
    """not (x <= 0), 1 bit an element; with RELU the elements where it is set go to y, 0 elsewhere."""
    begin = tl.program_id(0).to(tl.int64) * T
    j = tl.arange(0, T)
    packed = tl.zeros((T,), tl.int32)
    first = begin
    for slot in tl.static_range(8):
        mask = (begin + j < size) & (first + j < n)
        x = tl.load(x_ptr + first + j, mask=mask, other=0.0)
        positive = (x.to(tl.float32) <= 0) == 0  # true for NaN
        packed |= (mask & positive).to(tl.int32) << slot
        if RELU:
            tl.store(y_ptr + first + j, tl.where(positive, x, tl.zeros_like(x)), mask=mask)
        first += size  # in 64 bits
    tl.store(bits_ptr + begin + j, packed.to(tl.uint8), mask=begin + j < size)


@triton.jit
def apply_mask(grad_ptr, bits_ptr, out_ptr, n, size, slope, SLOPED: tl.constexpr, T: tl.constexpr):
    """grad where the bit is set, slope * grad (or 0) elsewhere."""
    begin = tl.program_id(0).to(tl.int64) * T
    j = tl.arange(0, T)
    packed = tl.load(bits_ptr + begin + j, mask=begin + j < size, other=0).to(tl.int32)
    first = begin
    for slot in tl.static_range(8):
        mask = (begin + j < size) & (first + j < n)
        grad = tl.load(grad_ptr + first + j, mask=mask, other=0.0).to(tl.float32)
        rest = grad * slope if SLOPED else tl.zeros_like(grad)
        passed = tl.where(((packed >> slot) & 1) == 1, grad, rest)
        tl.store(out_ptr + first + j, passed.to(out_ptr.dtype.element_ty), mask=mask)
        first += size  # in 64 bits


@triton.jit
def scale_masked(x_ptr, bits_ptr, out_ptr, n, size, scale, T: tl.constexpr):
    """x * scale where the bit is set, x * 0 elsewhere."""
    begin = tl.program_id(0).to(tl.int64) * T
    j = tl.arange(0, T)
    packed = tl.load(bits_ptr + begin + j, mask=begin + j < size, other=0).to(tl.int32)
    first = begin
    for slot in tl.static_range(8):
        mask = (begin + j < size) & (first + j < n)
        x = tl.load(x_ptr + first + j, mask=mask, other=0.0).to(tl.float32)
        scaled = x * tl.where(((packed >> slot) & 1) == 1, scale, 0.0)
        tl.store(out_ptr + first + j, scaled.to(out_ptr.dtype.element_ty), mask=mask)
        first += size  # in 64 bits


@triton.jit
def dropout(x_ptr, out_ptr, seed_ptr, n, p, scale, T: tl.constexpr):
    """x * scale where the element's number is at least p, x * 0 elsewhere."""
    first = tl.program_id(0).to(tl.int64) * T
    j = tl.arange(0, T)
    mask = first + j < n
    key0, key1 = keys(seed_ptr, 0)
    x = tl.load(x_ptr + first + j, mask=mask, other=0.0).to(tl.float32)
    y = x * tl.where(uniform(first, j, key0, key1) >= p, scale, 0.0)
    tl.store(out_ptr + first + j, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def norm_relu_dropout(
    x_ptr,
    mean_ptr,
    gain_ptr,
    bias_ptr,
    seed_ptr,
    y_ptr,
    bits_ptr,
    n,
    size,
    p,
    scale,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    DROPS: tl.constexpr,
    T: tl.constexpr,
):
    """Dropout of the ReLU of (x - mean) * gain + bias, and the ReLU's mask, in one pass.

    ALIGNED: WIDTH and size are multiples of 4, so that four elements in a row have four columns in a row.
    """
    begin = tl.program_id(0).to(tl.int64) * T
    j = tl.arange(0, T)
    packed = tl.zeros((T,), tl.int32)
    key0, key1 = keys(seed_ptr, 0)
    first = begin
    for slot in tl.static_range(8):
        mask = (begin + j < size) & (first + j < n)
        column = ((first % WIDTH).to(tl.int32) + j) % WIDTH
        if ALIGNED:
            column = tl.max_contiguous(tl.multiple_of(column, 4), 4)
        x = tl.load(x_ptr + first + j, mask=mask, other=0.0).to(tl.float32)
        mean, gain = tl.load(mean_ptr + column), tl.load(gain_ptr + column)
        h = (x - mean) * gain + tl.load(bias_ptr + column)
        positive = (h <= 0) == 0
        packed |= (mask & positive).to(tl.int32) << slot
        y = tl.where(positive, h, 0.0)
        if DROPS:
            y = y * tl.where(uniform(first, j, key0, key1) >= p, scale, 0.0)
        tl.store(y_ptr + first + j, y.to(y_ptr.dtype.element_ty), mask=mask)
        first += size  # in 64 bits
    tl.store(bits_ptr + begin + j, packed.to(tl.uint8), mask=begin + j < size)


@triton.jit
def relu_dropout_gradient(
    grad_ptr, bits_ptr, seed_ptr, out_ptr, n, size, p, scale, DROPS: tl.constexpr, T: tl.constexpr
):
    """The gradient of a ReLU and a dropout behind it, from the mask of the one and the seed of the other."""
    begin = tl.program_id(0).to(tl.int64) * T
    j = tl.arange(0, T)
    key0, key1 = keys(seed_ptr, 0)
    packed = tl.load(bits_ptr + begin + j, mask=begin + j < size, other=0).to(tl.int32)
    first = begin
    for slot in tl.static_range(8):
        mask = (begin + j < size) & (first + j < n)
        grad = tl.load(grad_ptr + first + j, mask=mask, other=0.0).to(tl.float32)
        if DROPS:
            grad = grad * tl.where(uniform(first, j, key0, key1) >= p, scale, 0.0)
        grad = tl.where(((packed >> slot) & 1) == 1, grad, 0.0)
        tl.store(out_ptr + first + j, grad.to(out_ptr.dtype.element_ty), mask=mask)
        first += size  # in 64 bits


@triton.jit
def signs(out_ptr, seed_ptr, n, T: tl.constexpr):
    """1 where the topmost bit of the element's hash is clear, else -1."""
    first = tl.program_id(0).to(tl.int64) * T
    j = tl.arange(0, T)
    key0, key1 = keys(seed_ptr, 0)
    top = (hashed(first, j, key0, key1) >> 31).to(tl.int32)
    tl.store(out_ptr + first + j, 1.0 - 2.0 * top.to(tl.float32), mask=first + j < n)


@triton.jit
def finite(x_ptr, out_ptr, n, T: tl.constexpr):
    """NaN in the place of the 0 at `out_ptr` where an element is not finite; several programs write the same."""
    first = tl.program_id(0).to(tl.int64) * T
    j = tl.arange(0, T)
    x = tl.load(x_ptr + first + j, mask=first + j < n, other=0.0).to(tl.float32)
    worst = tl.max(x.to(tl.int32, bitcast=True) & MAGNITUDE, axis=0)
    tl.store(out_ptr, float("nan"), mask=worst >= INFINITE)
