"""Kernels that choose rows: their scores, the probability of each score, and systematic sampling, all on the device."""

from __future__ import annotations

import triton
import triton.language as tl

from dibit.codec.backends.triton.kernels.numbers import hashed, keys
from dibit.codec.keep_probabilities import FIXED_POINT_ONE

_ONE = tl.constexpr(FIXED_POINT_ONE)


@triton.jit
def row_scores(x_ptr, out_ptr, rows, width, R: tl.constexpr, C: tl.constexpr):
    """The exponent bits of each row's squared norm."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    total = tl.zeros((R, C), tl.float32)
    for column in range(0, width, C):
        d = column + tl.arange(0, C)[None, :]
        x = tl.load(x_ptr + row * width + d, mask=(row < rows) & (d < width), other=0.0).to(tl.float32)
        total += x * x
    score = (tl.sum(total, axis=1)[:, None].to(tl.int32, bitcast=True) >> 23) & 255
    tl.store(out_ptr + row, score.to(tl.uint8), mask=row < rows)


@triton.jit
def count_scores(scores_ptr, counts_ptr, rows, T: tl.constexpr):
    """Adds how often each score occurs among `T` rows to counts int32 (256,)."""
    first = tl.program_id(0).to(tl.int64) * T
    j = tl.arange(0, T)
    scores = tl.load(scores_ptr + first + j, mask=first + j < rows, other=0).to(tl.int32)
    found = tl.histogram(scores, 256)
    code = tl.arange(0, 256)
    beyond = tl.maximum(first + T - rows, 0).to(tl.int32)  # elements that are not there were counted as score 0
    tl.atomic_add(counts_ptr + code, found - tl.where(code == 0, beyond, 0))


@triton.jit
def keep_probabilities(
    counts_ptr, seed_ptr, probabilities_ptr, start_ptr, count, SALT: tl.constexpr, FLOOR: tl.constexpr
):
    """`dibit.codec.keep_probabilities` from the counts, within rounding, and where sampling starts. One program."""
    code = tl.arange(0, 256)
    n = tl.where(code == 255, 0, tl.load(counts_ptr + code)).to(tl.int64)
    # 2 to the power of (code - 127) / 2, put together from its bits
    half = code - 127
    root = tl.where((half & 1) == 1, tl.full((256,), 1.4142135623730951, tl.float64), 1.0)
    value = (((half >> 1) + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True) * root
    value = tl.where((code == 0) | (code == 255), 0.0, value)
    rows = tl.sum(n, axis=0)
    mean = tl.sum(n.to(tl.float64) * value, axis=0) / tl.maximum(rows, 1).to(tl.float64)
    value += tl.where(mean > 0, FLOOR * mean, 1.0)
    certain = rows - tl.cumsum(n, axis=0)  # rows of larger scores
    rest = tl.cumsum(n.to(tl.float64) * value, axis=0)
    factor = (count - certain).to(tl.float64) / tl.where(rest > 0, rest, 1.0)
    factor = tl.where(rest > 0, factor, 0.0)
    largest = tl.max(tl.where((factor * value <= 1) & (n > 0), code, -1), axis=0)
    c = tl.sum(tl.where(code == largest, factor, 0.0), axis=0)
    probability = tl.where(largest < 0, 1.0, tl.minimum(c * value, 1.0))  # none fits: every row is certain
    probability = tl.where(code == 255, 0.0, probability)
    tl.store(probabilities_ptr + code, (probability * _ONE).to(tl.int64))
    key0, key1 = keys(seed_ptr, SALT)
    begin = hashed(tl.zeros((1,), tl.int64), tl.zeros((1,), tl.int32), key0, key1) >> 2
    tl.store(start_ptr + tl.arange(0, 1), begin.to(tl.int64))


@triton.jit
def sum_probabilities(scores_ptr, probabilities_ptr, sums_ptr, rows, T: tl.constexpr):
    """The probabilities of `T` rows added up: int64, exact."""
    first = tl.program_id(0).to(tl.int64) * T
    j = tl.arange(0, T)
    mask = first + j < rows
    score = tl.load(scores_ptr + first + j, mask=mask, other=0).to(tl.int32)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(tl.load(probabilities_ptr + score, mask=mask, other=0), axis=0))


@triton.jit
def pick_rows(
    scores_ptr, probabilities_ptr, start_ptr, sums_ptr, running_ptr, index_ptr, weight_ptr, rows, count, T: tl.constexpr
):
    """The rows of `T` in whose share of the summed probabilities `start + k * ONE` falls.

    The last program fills what is left of the result.

    running_ptr: the inclusive sums of `sums_ptr`.
    """
    program = tl.program_id(0)
    first = program.to(tl.int64) * T
    j = tl.arange(0, T)
    mask = first + j < rows
    score = tl.load(scores_ptr + first + j, mask=mask, other=0).to(tl.int32)
    probability = tl.load(probabilities_ptr + score, mask=mask, other=0)
    after = tl.load(running_ptr + program) - tl.load(sums_ptr + program) + tl.cumsum(probability, axis=0)
    start = tl.load(start_ptr)
    # no probability is above one, so at most one of the points falls into a row's share
    k = tl.maximum(after - probability - start + (_ONE - 1), 0) // _ONE
    picked = mask & (start + k * _ONE < after) & (k < count)
    tl.store(index_ptr + k, first + j, mask=picked)
    weight = tl.full((T,), _ONE, tl.float64) / tl.maximum(probability, 1).to(tl.float64)
    tl.store(weight_ptr + k, weight.to(tl.float32), mask=picked)
    if program == tl.num_programs(0) - 1:
        found = tl.maximum(tl.load(running_ptr + program) - start + (_ONE - 1), 0) // _ONE
        for more in range(found, count, T):
            tl.store(index_ptr + more + j, rows - 1, mask=more + j < count)
            tl.store(weight_ptr + more + j, tl.zeros((T,), tl.float32), mask=more + j < count)
