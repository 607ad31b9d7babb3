"""Products with what was encoded, and with sparse matrices. Other backends never form the encoded tensor."""

import torch
from torch import Tensor

from dibit.codec.backends.reference.blocks import dequantize, dither_variance


def weight_gradient(
    codes: Tensor,
    ranges: Tensor,
    seed: Tensor,
    dy: Tensor,
    index: Tensor | None,
    weight: Tensor | None,
    rows: int,
    width: int,
    bits: int,
    block: int,
    levels: list[float],
    dither: float,
) -> Tensor:
    """dY^T X, (O, width), for what was encoded of X (rows, width): float32, or float64 for such a dy.

    Args:
        codes, ranges, seed, bits, block, levels, dither: as in `dequantize`.
        dy: contiguous (N, O), floating point.
        index, weight: row k of X belongs to row index[k] of dy, and counts weight[k] times; both or neither.
        rows, width: the shape of X.
    """
    dtype = torch.float64 if dy.dtype == torch.float64 else torch.float32
    x = dequantize(codes, ranges, seed, rows * width, bits, block, levels, dither, dtype).view(rows, width)
    if index is None or weight is None:
        return dy.to(dtype).T @ x
    return dy.index_select(0, index).to(dtype).mul_(weight[:, None]).T @ x


def column_sums(codes: Tensor, ranges: Tensor, seed: Tensor, g: Tensor, bits: int, block: int, dither: float) -> Tensor:
    """sum_n g_n x_n, (D,), for a contiguous g (N, D) and x as `dequantize` gives it (uniform levels)."""
    x = dequantize(codes, ranges, seed, g.numel(), bits, block, [], dither, g.dtype)
    return (g * x.view(g.shape)).sum(0)


def norm_gradient(
    codes: Tensor,
    ranges: Tensor,
    seed: Tensor,
    g: Tensor,
    shift: Tensor,
    factor: Tensor,
    gain: Tensor,
    bits: int,
    block: int,
    dither: float,
) -> Tensor:
    """(g - shift - x * factor) * gain for a contiguous g (N, D), rows of it (D,), and x as `dequantize` gives it.

    With `dither` 1 (else 0) g in the first place is g (1 + v / N), v the variance of x by rounding: where `factor` is
    the mean of g x of the same draw, this takes off what an element's error has to do with itself.
    """
    x = dequantize(codes, ranges, seed, g.numel(), bits, block, [], dither, g.dtype).view(g.shape)
    if dither and g.numel():
        g = g * (1 + dither_variance(ranges, g.numel(), bits, block).to(g.dtype).view(g.shape) / g.shape[0])
    return (g - shift - x * factor) * gain
