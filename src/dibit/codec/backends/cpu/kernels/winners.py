"""Kernels for the maximum and minimum over neighbours, and for who attains them, row by row."""

from __future__ import annotations

import numba as nb
import numpy as np

from dibit.codec.backends.cpu.jit import Kernel
from dibit.codec.backends.cpu.kernels.numbers import f32

TASK = 256  # rows that a thread takes at a time
PART = 32  # columns that a thread takes at a time, where rows are written to in any order
u8, i32 = np.uint8, np.int32


@Kernel
def edge_extremes(crow, col, x, out, least):
    rows, width = out.shape
    for task in nb.prange((rows + TASK - 1) // TASK):
        for row in range(task * TASK, min(rows, (task + 1) * TASK)):
            start, end, total = crow[row], crow[row + 1], out[row]
            if start < end:
                part = x[col[start]]
                for k in range(width):
                    total[k] = part[k]
            for e in range(start + 1, end):
                part = x[col[e]]
                if least:  # of two zeros the later one, as torch has it; NaN stays
                    for k in range(width):
                        t, v = total[k], part[k]
                        total[k] = t if (t < v) | (t != t) else v
                else:
                    for k in range(width):
                        t, v = total[k], part[k]
                        total[k] = t if (t > v) | (t != t) else v


@Kernel
def edge_winners(crow, col, first, x, y, planes, many, known):
    """`known`: `many` is given, and `first` fits it; else it is found, and `first` is that of a graph without any."""
    rows, width = y.shape
    for task in nb.prange((rows + TASK - 1) // TASK):
        count, code = np.empty(width, i32), np.empty(width, i32)
        for row in range(task * TASK, min(rows, (task + 1) * TASK)):
            start, degree, best, at = crow[row], crow[row + 1] - crow[row], y[row], first[row]
            if known and many[row]:
                for k in range(degree):
                    part, bits = x[col[start + k]], planes[at + k]
                    for byte in range(bits.size):
                        found = u8(0)
                        for h in range(byte * 8, min(byte * 8 + 8, width)):
                            found |= u8(part[h] == best[h]) << u8(h & 7)
                        bits[byte] = found
                continue
            count[:] = 0
            code[:] = 0
            for k in range(degree):
                part, own = x[col[start + k]], i32(k)
                for h in range(width):
                    won = i32(part[h] == best[h])
                    count[h] += won
                    code[h] += won * own
            bad = False
            for h in range(width):
                if count[h] == degree and degree > 1:
                    code[h] = degree
                bad |= (count[h] != 1) & (count[h] != degree)
            if not known:
                many[row] = bad
            for k in range(first[row + 1] - at):
                bits = planes[at + k]
                for byte in range(bits.size):
                    found = u8(0)
                    for h in range(byte * 8, min(byte * 8 + 8, width)):
                        found |= u8(code[h] >> k & 1) << u8(h & 7)
                    bits[byte] = found


@Kernel
def add_winners(crow, col, first, planes, many, grad, initial, has_initial, out):
    rows, width = grad.shape
    for task in nb.prange((width + PART - 1) // PART):
        low = task * PART
        columns = min(width, low + PART) - low
        code, count, share = np.empty(PART, i32), np.empty(PART, f32), np.empty(PART, f32)
        for row in range(rows):
            start, degree, at = crow[row], crow[row + 1] - crow[row], first[row]
            if degree == 0:
                continue
            code[:] = 0
            count[:] = f32(0)
            if has_initial:
                for h in range(columns):
                    count[h] = f32(initial[row, (low + h) >> 3] >> u8(h & 7) & u8(1))
            if many[row]:
                for k in range(degree):
                    for h in range(columns):
                        count[h] += f32(planes[at + k, (low + h) >> 3] >> u8(h & 7) & u8(1))
                for h in range(columns):
                    share[h] = grad[row, low + h] / count[h]
                for k in range(degree):
                    total = out[col[start + k]]
                    for h in range(columns):
                        total[low + h] += share[h] * f32(planes[at + k, (low + h) >> 3] >> u8(h & 7) & u8(1))
                continue
            for k in range(first[row + 1] - at):
                for h in range(columns):
                    code[h] |= i32(planes[at + k, (low + h) >> 3] >> u8(h & 7) & u8(1)) << k
            for h in range(columns):
                everybody = degree == 1 or code[h] == degree
                value = grad[row, low + h] / (count[h] + f32(degree if everybody else 1))
                if everybody or value - value != 0:  # of infinity the others get NaN, as 0 times it is
                    for k in range(degree):
                        won = everybody or code[h] == k
                        out[col[start + k], low + h] += value if won else value * f32(0)
                else:
                    out[col[start + code[h]], low + h] += value
