"""What kernels share: the generator, ranges, the order of floats, levels. All in 32 bits, as in the definition."""

from __future__ import annotations

import triton
import triton.language as tl

from dibit.codec import rng

_C1, _C2, _C3 = tl.constexpr(rng.C1), tl.constexpr(rng.C2), tl.constexpr(rng.C3)
_M1, _M2 = tl.constexpr(rng.M1 + 2**64), tl.constexpr(rng.M2 + 2**64)
_UNIT = tl.constexpr(rng.UNIT)
_CENTRE = tl.constexpr(0.5 - rng.UNIT / 2)
_MOST = tl.constexpr(3.4028234663852886e38)
MAGNITUDE, INFINITE, NOT_A_NUMBER = tl.constexpr(0x7FFFFFFF), tl.constexpr(0x7F800000), tl.constexpr(0x7FC00000)


@triton.jit
def keys(seed_ptr, salt: tl.constexpr):
    """The two halves of the key of a seed, `rng.keys` of `seed ^ salt`."""
    z = (tl.load(seed_ptr) ^ salt).to(tl.uint64, bitcast=True)
    z = (z ^ (z >> 30)) * _M1
    z = (z ^ (z >> 27)) * _M2
    z = z ^ (z >> 31)
    return z.to(tl.uint32), (z >> 32).to(tl.uint32)


@triton.jit
def hashed(first, offset, key0, key1):
    """`rng.hash32` of the counters `first` (int64) + `offset` (int32, not negative)."""
    low0, high0 = first.to(tl.uint32), (first >> 32).to(tl.uint32)
    low = low0 + offset.to(tl.uint32)
    here, beyond = high0 * _C3, (high0 + 1) * _C3  # what the upper half adds, before and after the lower one wraps
    x = low + key0
    x = (x ^ (x >> 16)) * _C1
    x = (x ^ (x >> 15) ^ key1) + tl.where(low < low0, beyond, here)
    x = x * _C2
    x = (x ^ (x >> 16)) * _C3
    return x ^ (x >> 15)


@triton.jit
def uniform(first, offset, key0, key1):
    """float32 in [0, 1), multiples of 2^-24."""
    return (hashed(first, offset, key0, key1) >> 8).to(tl.int32).to(tl.float32) * _UNIT


@triton.jit
def ordered(bits):
    """float32 bits as an int32 of the same order, NaN beyond infinity; its own inverse."""
    return bits ^ ((bits >> 31) & MAGNITUDE)


@triton.jit
def quotient(a, d, r):
    """a / d to nearest, for r = 1 / d to nearest and d in [2^-64, 2^125]: a product and two corrections.

    A remainder is exact in one fused operation. It is not where a is below 2^-102; there a / d is so small that only
    its being positive counts, and that it keeps.
    """
    q = a * r
    q = tl.fma(tl.fma(-q, d, a), r, q)
    return tl.fma(tl.fma(-q, d, a), r, q)


@triton.jit
def range_parameters(low, high):
    """Zero point, width, scale and 1 / scale of ranges; the scale is 1/2 where high - low would overflow."""
    wide = ((high - low).to(tl.int32, bitcast=True) & MAGNITUDE) == INFINITE
    scale = tl.where(wide, 0.5, 1.0)
    zero = low * scale
    return zero, high * scale - zero, scale, tl.where(wide, 2.0, 1.0)


@triton.jit
def stored_range(ranges_ptr, at, mask, HALF: tl.constexpr):
    """A block's range in float32, from bfloat16's bits (int16) or as it is."""
    if HALF:
        low = (tl.load(ranges_ptr + 2 * at, mask=mask, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
        high = (tl.load(ranges_ptr + 2 * at + 1, mask=mask, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        low = tl.load(ranges_ptr + 2 * at, mask=mask, other=0.0)
        high = tl.load(ranges_ptr + 2 * at + 1, mask=mask, other=0.0)
    return low, high


@triton.jit
def rounded(h, u, levels_ptr, BITS: tl.constexpr, LEVELS: tl.constexpr, NEAREST: tl.constexpr):
    """Codes (int32) of h in [0, 2^bits - 1]."""
    TOP: tl.constexpr = (1 << BITS) - 1
    if LEVELS:
        code = tl.zeros_like(h).to(tl.int32)
        if BITS == 2:
            code += (h >= tl.load(levels_ptr + 1)).to(tl.int32)
            code += (h >= tl.load(levels_ptr + 2)).to(tl.int32)
        if BITS > 2:
            for k in tl.static_range(BITS):
                further = code + (1 << (BITS - 1 - k))
                reached = (further < TOP) & (h >= tl.load(levels_ptr + tl.minimum(further, TOP)))
                code = tl.where(reached, further, code)
        below = tl.load(levels_ptr + code)
        fraction = tl.div_rn(h - below, tl.load(levels_ptr + code + 1) - below)
    else:
        code = h.to(tl.int32)
        fraction = h - code.to(tl.float32)
    up = fraction >= 0.5 if NEAREST else u < fraction
    return tl.minimum(code + up.to(tl.int32), TOP)


@triton.jit
def decoded(
    code, low, high, u, dither, levels_ptr, mask, BITS: tl.constexpr, LEVELS: tl.constexpr, DITHERED: tl.constexpr
):
    """The value of a code (int32) in float32, as `reference.dequantize` has it; u is read where it is dithered."""
    TOP: tl.constexpr = (1 << BITS) - 1
    zero, width, _, inverse = range_parameters(low, high)
    step = tl.div_rn(width, tl.full(width.shape, TOP, tl.float32))
    h = tl.load(levels_ptr + code, mask=mask, other=0.0) if LEVELS else code.to(tl.float32)
    if DITHERED:
        value = ((h + (u - _CENTRE) * dither) * step + zero) * inverse
        value = tl.where(value < -_MOST, -_MOST, value)  # half a bin beyond the range; NaN stays
        value = tl.where(value > _MOST, _MOST, value)
    else:
        value = (h * step + zero) * inverse
        value = tl.where(value > high, high, tl.where(value < low, low, value))
    return value
