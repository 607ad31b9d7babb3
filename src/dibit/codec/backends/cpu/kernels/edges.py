"""Kernels that sum over the edges of a graph, row by row, without gathering them."""

from __future__ import annotations

import numba as nb
import numpy as np

from dibit.codec.backends.cpu.jit import Kernel
from dibit.codec.backends.cpu.kernels.numbers import f32

LANES = 16  # sums side by side in a scalar product, so that it takes whole vectors
TASK = 256  # rows that a thread takes at a time
COLUMNS = 64  # columns that a thread takes at a time, where it takes columns
u8 = np.uint8


@Kernel
def sort_edges(index, pointers, order):
    """A counting sort; `pointers` is zero. Returns whether every index had a place."""
    count = pointers.size - 1
    for e in range(index.size):
        at = index[e]
        if at < 0 or at >= count:
            return False
        pointers[at + 1] += 1
    for n in range(count):
        pointers[n + 1] += pointers[n]
    free = pointers[:-1].copy()
    for e in range(index.size):
        at = index[e]
        order[free[at]] = e
        free[at] += 1
    return True


@Kernel
def add_neighbours(crow, col, x, out):
    rows, width = out.shape
    for task in nb.prange((rows + TASK - 1) // TASK):
        for row in range(task * TASK, min(rows, (task + 1) * TASK)):
            total = out[row]
            e, end = crow[row], crow[row + 1]
            while e + 4 <= end:  # four rows of x at once: the caches are asked for all before the first arrives
                x0, x1, x2, x3 = x[col[e]], x[col[e + 1]], x[col[e + 2]], x[col[e + 3]]
                for k in range(width):
                    total[k] = (((total[k] + x0[k]) + x1[k]) + x2[k]) + x3[k]
                e += 4
            while e < end:
                part = x[col[e]]
                for k in range(width):
                    total[k] += part[k]
                e += 1


@Kernel
def add_weighted(crow, col, values, x, out, fresh):
    """`fresh`: what is in `out` does not count."""
    rows, width = out.shape
    for task in nb.prange((rows + TASK - 1) // TASK):
        for row in range(task * TASK, min(rows, (task + 1) * TASK)):
            total = out[row]
            if fresh:
                for k in range(width):
                    total[k] = f32(0)
            e, end = crow[row], crow[row + 1]
            while e + 4 <= end:
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
def add_rows(index, x, out):
    """Threads take columns, as rows may be written to in any order."""
    rows, width = x.shape
    for task in nb.prange((width + COLUMNS - 1) // COLUMNS):
        low, high = task * COLUMNS, min(width, (task + 1) * COLUMNS)
        for row in range(rows):
            total, part = out[index[row], low:high], x[row, low:high]
            for k in range(total.size):
                total[k] += part[k]


@Kernel
def add_scaled(crow, col, order, scale, x, out):
    rows, heads, width = out.shape
    for task in nb.prange((rows + TASK - 1) // TASK):
        for row in range(task * TASK, min(rows, (task + 1) * TASK)):
            for e in range(crow[row], crow[row + 1]):
                c, own = col[e], order[e]
                for h in range(heads):
                    v, total, part = scale[own, h], out[row, h], x[c, h]
                    for k in range(width):
                        total[k] += v * part[k]


@Kernel
def edge_products(crow, col, order, a, x, out):
    rows, heads, width = a.shape
    whole = width // LANES * LANES
    for task in nb.prange((rows + TASK - 1) // TASK):
        sums = np.empty(LANES, f32)
        for row in range(task * TASK, min(rows, (task + 1) * TASK)):
            for e in range(crow[row], crow[row + 1]):
                c, own = col[e], order[e]
                for h in range(heads):
                    p, q = a[row, h], x[c, h]
                    sums[:] = f32(0)
                    for k in range(0, whole, LANES):
                        pk, qk = p[k : k + LANES], q[k : k + LANES]
                        for j in range(LANES):
                            sums[j] += pk[j] * qk[j]
                    total = f32(0)
                    for j in range(LANES):
                        total += sums[j]
                    for k in range(whole, width):
                        total += p[k] * q[k]
                    out[own, h] = total


@Kernel
def edge_signs(crow, col, order, a, b, signs):
    rows, heads, width = a.shape
    for task in nb.prange((rows + TASK - 1) // TASK):
        for row in range(task * TASK, min(rows, (task + 1) * TASK)):
            for e in range(crow[row], crow[row + 1]):
                c, own = col[e], order[e]
                for h in range(heads):
                    p, q, out = a[row, h], b[c, h], signs[own, h]
                    for byte in range(out.size):
                        bits = u8(0)
                        for k in range(byte * 8, min(byte * 8 + 8, width)):
                            bits |= u8(p[k] + q[k] > 0) << u8(k & 7)
                        out[byte] = bits


@Kernel
def add_signed(crow, order, signs, scale, slope, bits, out):
    """`bits` (256, 8): those of each byte, as numbers."""
    rows, heads, width = out.shape
    whole = width // 8
    for task in nb.prange((rows + TASK - 1) // TASK):
        for row in range(task * TASK, min(rows, (task + 1) * TASK)):
            for e in range(crow[row], crow[row + 1]):
                own = order[e]
                for h in range(heads):
                    total, bytes_ = out[row, h], signs[own, h]
                    low = scale[own, h] * slope
                    more = scale[own, h] - low
                    for byte in range(whole):
                        part, set_ = total[byte * 8 : byte * 8 + 8], bits[bytes_[byte]]
                        for k in range(8):
                            part[k] += low + more * set_[k]
                    for k in range(whole * 8, width):
                        total[k] += low + more * bits[bytes_[whole], k & 7]
