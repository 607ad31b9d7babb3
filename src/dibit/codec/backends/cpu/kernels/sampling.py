"""Kernels that choose rows: their scores, and systematic sampling by them."""

from __future__ import annotations

import numba as nb
import numpy as np

from dibit.codec.backends.cpu.jit import Kernel
from dibit.codec.backends.cpu.kernels.numbers import f32, u32
from dibit.codec.keep_probabilities import FIXED_POINT_ONE


@Kernel
def row_scores(x, sums, bits, out):
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
def pick_rows(scores, probabilities, start, index, weight):
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
