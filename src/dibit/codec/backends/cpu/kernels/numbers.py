"""What the CPU's kernels share: the random numbers, ranges and the order of floats, in 32 bits, inlined where used."""

from __future__ import annotations

import numpy as np

from dibit.codec.backends.cpu.jit import inlined
from dibit.codec.rng import C1, C2, C3, UNIT

u32, u64, i32, f32 = np.uint32, np.uint64, np.int32, np.float32
_C1, _C2, _C3, _UNIT = u32(C1), u32(C2), u32(C3), f32(UNIT)
MAGNITUDE, INFINITE = i32(0x7FFFFFFF), i32(0x7F800000)
CHUNK = 1 << 14  # elements that one task takes at the least


@inlined
def uniform(low, high, key0, key1):
    """The generator of `dibit.codec.rng` in 32-bit arithmetic: `low` of the counter, `high` its upper half times C3."""
    x = u32(low + key0)
    x = u32(u32(x ^ u32(x >> u32(16))) * _C1)
    x = u32(u32(u32(x ^ u32(x >> u32(15))) ^ key1) + high)
    x = u32(x * _C2)
    x = u32(u32(x ^ u32(x >> u32(16))) * _C3)
    x = u32(x ^ u32(x >> u32(15)))
    return f32(i32(x >> u32(8))) * _UNIT  # signed: the conversion that processors have


@inlined
def upper_term(counter):
    """What the upper half of a counter adds to the hash."""
    return u32(u32(u64(counter) >> u64(32)) * _C3)


@inlined
def upper_word(low, first, here, beyond):
    """What the upper half adds: `here` until the counter's lower half wraps after `first`, then `beyond`."""
    return beyond if low < first else here


@inlined
def range_parameters(low, high):
    """Zero point, width and scale of a range; the scale is 1/2 where high - low would overflow."""
    scale = f32(0.5) if np.isinf(high - low) else f32(1.0)
    zero = low * scale
    return zero, high * scale - zero, scale


@inlined
def ordered(bits):
    """float32 bits as an int32 of the same order (NaN beyond infinity): its minimum and maximum vectorise."""
    return i32(bits ^ i32(i32(bits >> i32(31)) & MAGNITUDE))


@inlined
def decoded(byte, shift, mask, u, dither, step, zero, scale):
    """An element of uniform levels, not clamped: within rounding of `dequantize`."""
    h = f32(i32(u32(u32(byte) >> shift) & mask)) + u * dither
    return (h * step + zero) / scale
