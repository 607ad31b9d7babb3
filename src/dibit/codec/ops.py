"""Every operator of the codec: schema, fake and dispatch by device.

`torch.library.custom_op` ties the backends together. The definition (`backends/reference.py`) serves any device; the
CPU has Numba kernels (`backends/cpu/`), GPUs have Triton's (`backends/triton/`). All take contiguous tensors and 0-d
int64 seeds.
"""

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from dibit.codec.backends import reference
from dibit.codec.layout import Layout, mask_bytes


@custom_op("dibit::quantize", mutates_args=())
def quantize(
    x: Tensor, seed: Tensor, bits: int, block: int, levels: list[float], stats: torch.dtype, rounding: int,
    number: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Block-wise quantisation and packing of a flat tensor (PAPER: i-EXACT, section 3.1).

    Args:
        x: floating point (n,); half precision is taken to float32 on the way.
        seed: int64 0-d.
        bits: 1, 2, 4 or 8.
        block: elements that share a range.
        levels: 2**bits levels in [0, 2**bits - 1]; empty for uniform ones.
        stats: dtype of the stored ranges, bfloat16 or the dtype of x.
        rounding: 0 stochastic, 1 nearest.
        number: of the first element, for a part of a longer tensor that begins with a block.

    Returns:
        codes uint8 (bytes,); ranges (blocks, 2), low and high, rounded outwards, NaN where a block is not finite;
        widths (blocks,), high - low before that rounding, in the dtype of x.
    """
    return reference.quantize(x, seed, bits, block, levels, stats, rounding, number)


@quantize.register_fake
def _(x, seed, bits, block, levels, stats, rounding, number=0):  # type: ignore[no-untyped-def]
    return _coded(x, Layout(x.numel(), block, bits), stats, torch.promote_types(x.dtype, torch.float32))


@custom_op("dibit::quantize_rows", mutates_args=())
def quantize_rows(
    x: Tensor, index: Tensor | None, shift: Tensor | None, scale: Tensor | None, seed: Tensor, bits: int, block: int,
    levels: list[float], stats: torch.dtype, rounding: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`quantize` of rows of a matrix, gathered, moved and scaled on the way.

    Args:
        x: floating point (N, D).
        index: int64 (m,), the rows; `None`: all.
        shift, scale: (D,); (x - shift) * scale is encoded. `None`: x.
    """
    return reference.quantize_rows(x, index, shift, scale, seed, bits, block, levels, stats, rounding)


@quantize_rows.register_fake
def _(x, index, shift, scale, seed, bits, block, levels, stats, rounding):  # type: ignore[no-untyped-def]
    rows = x.shape[0] if index is None else index.shape[0]
    dtype = x.dtype if shift is None else shift.dtype
    return _coded(x, Layout(rows * x.shape[1], block, bits), stats, torch.promote_types(dtype, torch.float32))


def _coded(x: Tensor, layout: Layout, stats: torch.dtype, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What `quantize` returns, its content aside."""
    codes = x.new_empty(layout.code_bytes, dtype=torch.uint8)
    return codes, x.new_empty((layout.blocks, 2), dtype=stats), x.new_empty(layout.blocks, dtype=dtype)


@custom_op("dibit::dequantize", mutates_args=())
def dequantize(
    codes: Tensor,
    ranges: Tensor,
    seed: Tensor,
    numel: int,
    bits: int,
    block: int,
    levels: list[float],
    dither: float,
    dtype: torch.dtype,
    number: int = 0,
) -> Tensor:
    """The inverse of `quantize`: an unbiased estimate of x, flat (numel,) of `dtype`. Arguments as there.

    `dither` times (u - 1/2) bins is added to each level, u the number that rounded the element (uniform levels only).
    All weights are unbiased. With 1 the error is uniform over one bin whatever x is: half the variance on average.
    With 2 the error is uncorrelated with that of weight 0, so that the product of the two has mean x^2.
    """
    return reference.dequantize(codes, ranges, seed, numel, bits, block, levels, dither, dtype, number)


@dequantize.register_fake
def _(codes, ranges, seed, numel, bits, block, levels, dither, dtype, number=0):  # type: ignore[no-untyped-def]
    return codes.new_empty(numel, dtype=dtype)


@custom_op("dibit::column_sums", mutates_args=())
def column_sums(codes: Tensor, ranges: Tensor, seed: Tensor, g: Tensor, bits: int, block: int, dither: float) -> Tensor:
    """sum_n g_n x_n, (D,), for a contiguous g (N, D) and x as `dequantize` gives it (uniform levels), never formed."""
    return reference.column_sums(codes, ranges, seed, g, bits, block, dither)


@column_sums.register_fake
def _(codes, ranges, seed, g, bits, block, dither):  # type: ignore[no-untyped-def]
    return g.new_empty(g.shape[1])


@custom_op("dibit::norm_gradient", mutates_args=())
def norm_gradient(
    codes: Tensor, ranges: Tensor, seed: Tensor, g: Tensor, shift: Tensor, factor: Tensor, gain: Tensor, bits: int,
    block: int, dither: float,
) -> Tensor:  # fmt: skip
    """(g - shift - x * factor) * gain for a contiguous g (N, D), rows of it (D,), and x as `dequantize` gives it.

    With `dither` 1 (else 0) g in the first place is g (1 + v / N), v the variance of x by rounding: where `factor` is
    the mean of g x of the same draw, this takes off what an element's error has to do with itself.
    """
    return reference.norm_gradient(codes, ranges, seed, g, shift, factor, gain, bits, block, dither)


@norm_gradient.register_fake
def _(codes, ranges, seed, g, shift, factor, gain, bits, block, dither):  # type: ignore[no-untyped-def]
    return torch.empty_like(g)


@custom_op("dibit::weight_gradient", mutates_args=())
def weight_gradient(
    codes: Tensor, ranges: Tensor, seed: Tensor, dy: Tensor, index: Tensor | None, weight: Tensor | None, rows: int,
    width: int, bits: int, block: int, levels: list[float], dither: float,
) -> Tensor:  # fmt: skip
    """dY^T X, (O, width), for what was encoded of X (rows, width), never formed: float32, or float64 for such a dy.

    Args:
        codes, ranges, seed, bits, block, levels, dither: as in `dequantize`.
        dy: contiguous (N, O), floating point.
        index, weight: row k of X belongs to row index[k] of dy, and counts weight[k] times; both or neither.
    """
    return reference.weight_gradient(codes, ranges, seed, dy, index, weight, rows, width, bits, block, levels, dither)


@weight_gradient.register_fake
def _(codes, ranges, seed, dy, index, weight, rows, width, bits, block, levels, dither):  # type: ignore[no-untyped-def]
    return dy.new_empty((dy.shape[1], width), dtype=torch.promote_types(dy.dtype, torch.float32))


@custom_op("dibit::pack_mask", mutates_args=())
def pack_mask(x: Tensor) -> Tensor:
    """1 bit an element, not (x <= 0): uint8 (ceil(n / 8),) for x of n elements, any shape."""
    return reference.pack_mask(x)


@pack_mask.register_fake
def _(x):  # type: ignore[no-untyped-def]
    return x.new_empty(mask_bytes(x.numel()), dtype=torch.uint8)


@custom_op("dibit::relu", mutates_args=())
def relu(x: Tensor) -> tuple[Tensor, Tensor]:
    """ReLU, torch's own bits, and `pack_mask(x)`, in one pass over a contiguous x."""
    return reference.relu(x)


@relu.register_fake
def _(x):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), x.new_empty(mask_bytes(x.numel()), dtype=torch.uint8)


@custom_op("dibit::apply_mask", mutates_args=())
def apply_mask(grad: Tensor, mask: Tensor, slope: float) -> Tensor:
    """`grad` where the bit is set, `slope * grad` elsewhere (exactly 0 for slope 0)."""
    return reference.apply_mask(grad, mask, slope)


@apply_mask.register_fake
def _(grad, mask, slope):  # type: ignore[no-untyped-def]
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


@custom_op("dibit::dropout", mutates_args=())
def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Inverted dropout whose mask is a function of (seed, element): the same call gives dy from the gradient of y."""
    return reference.dropout(x, seed, p)


@dropout.register_fake
def _(x, seed, p):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@custom_op("dibit::norm_relu_dropout", mutates_args=())
def norm_relu_dropout(
    x: Tensor, mean: Tensor, gain: Tensor, bias: Tensor, seed: Tensor, p: float
) -> tuple[Tensor, Tensor]:
    """`dropout(relu((x - mean) * gain + bias), seed, p)` and the ReLU's mask (`pack_mask`), in one pass.

    Args:
        x: contiguous (N, D).
        mean, gain, bias: (D,), float32 or, for such an x, float64.
        p: in [0, 1); 0 drops nothing.
    """
    return reference.norm_relu_dropout(x, mean, gain, bias, seed, p)


@norm_relu_dropout.register_fake
def _(x, mean, gain, bias, seed, p):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), x.new_empty(mask_bytes(x.numel()), dtype=torch.uint8)


@custom_op("dibit::relu_dropout_gradient", mutates_args=())
def relu_dropout_gradient(grad: Tensor, mask: Tensor, seed: Tensor, p: float) -> Tensor:
    """`apply_mask(dropout(grad, seed, p), mask, 0)` in one pass: back through both."""
    return reference.relu_dropout_gradient(grad, mask, seed, p)


@relu_dropout_gradient.register_fake
def _(grad, mask, seed, p):  # type: ignore[no-untyped-def]
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


@custom_op("dibit::passed_rows", mutates_args=())
def passed_rows(
    codes: Tensor, ranges: Tensor, seed: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None, slope: float,
    drop: Tensor | None, p: float, start: int, stop: int, rows: int, bits: int, block: int, dither: float,
) -> Tensor:  # fmt: skip
    """Rows start ... stop of dropout(relu(x_hat * weight + bias)), (stop - start, D), x_hat (N, D) as it was encoded.

    Args:
        codes, ranges, seed, bits, block, dither: as in `dequantize`, with uniform levels.
        weight, bias: (D,), of the result's dtype.
        mask: of the ReLU (`pack_mask`), with the `slope` of what it does not pass; `None`: no ReLU.
        drop, p: seed and probability of dropout; `None`: none.
        start, stop: start is 0 or begins a block.
        rows: N.
    """
    return reference.passed_rows(
        codes, ranges, seed, weight, bias, mask, slope, drop, p, start, stop, rows, bits, block, dither
    )


@passed_rows.register_fake
def _(codes, ranges, seed, weight, bias, mask, slope, drop, p, start, stop, rows, bits, block, dither):  # type: ignore[no-untyped-def]
    return weight.new_empty((stop - start, weight.shape[0]))


@passed_rows.register_kernel("cuda")
def _(codes, ranges, seed, weight, bias, mask, slope, drop, p, start, stop, rows, bits, block, dither):  # type: ignore[no-untyped-def]
    width = weight.shape[0]
    x = dequantize(codes, ranges, seed, rows * width, bits, block, [], dither, weight.dtype).view(rows, width)
    x = x.mul_(weight).add_(bias)
    if mask is not None and drop is not None and not slope:
        return relu_dropout_gradient(x, mask, drop, p)[start:stop]
    x = x if mask is None else apply_mask(x, mask, slope)
    return (x if drop is None else dropout(x, drop, p))[start:stop]


@custom_op("dibit::aggregate", mutates_args=())
def aggregate(crow: Tensor, col: Tensor, values: Tensor, x: Tensor) -> Tensor:
    """A x for A in compressed rows (N, M) and a contiguous x (M, D): (N, D), in the dtype of x."""
    return reference.aggregate(crow, col, values, x)


@aggregate.register_fake
def _(crow, col, values, x):  # type: ignore[no-untyped-def]
    return x.new_empty((crow.shape[0] - 1, x.shape[1]))


@custom_op("dibit::signs", mutates_args=())
def signs(seed: Tensor, count: int) -> Tensor:
    """1 or -1 with equal probability, a function of (seed, element): float32 (count,)."""
    return reference.signs(seed, count)


@signs.register_fake
def _(seed, count):  # type: ignore[no-untyped-def]
    return seed.new_empty(count, dtype=torch.float32)


@custom_op("dibit::row_scores", mutates_args=())
def row_scores(x: Tensor) -> Tensor:
    """uint8 (N,): the exponent bits of each row's squared norm, of a contiguous x (N, D); 255 where it is not finite.

    Norms at a power of two may fall on either side, with the order in which a backend adds.
    """
    return reference.row_scores(x)


@row_scores.register_fake
def _(x):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], dtype=torch.uint8)


@custom_op("dibit::pick_rows", mutates_args=())
def pick_rows(scores: Tensor, seed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Systematic sampling with the probabilities of `dibit.codec.keep_probabilities`, without replacement.

    Args:
        scores: uint8 (N,), see `dibit.codec.row_sampling`.
        seed: int64 0-d.
        count: rows to pick, at most those that are not `LEFT_OUT`.

    Returns:
        index int64 (count,), increasing; weight float32 (count,) = 1 / probability. Since probabilities are rounded
        down, their sum may fall short of `count`: then the last entry has weight 0.
    """
    return reference.pick_rows(scores, seed, count)


@pick_rows.register_fake
def _(scores, seed, count):  # type: ignore[no-untyped-def]
    return scores.new_empty(count, dtype=torch.int64), scores.new_empty(count, dtype=torch.float32)


@custom_op("dibit::finite", mutates_args=())
def finite(x: Tensor) -> Tensor:
    """float32 0-d: 0 where all of `x` is finite, else NaN."""
    return reference.finite(x)


@finite.register_fake
def _(x):  # type: ignore[no-untyped-def]
    return x.new_empty((), dtype=torch.float32)


OPS = (
    quantize, quantize_rows, dequantize, weight_gradient, column_sums, norm_gradient, pack_mask, relu, apply_mask,
    dropout, norm_relu_dropout, relu_dropout_gradient, passed_rows, signs, aggregate, row_scores, pick_rows, finite,
)  # fmt: skip


@functools.cache
def _backend(module: str, package: str, consequence: str) -> ModuleType:
    """The kernels of a kind of device, imported when the first one runs; without their compiler the definition."""
    if importlib.util.find_spec(package) is None:
        warnings.warn(
            f"dibit: {package} is not installed, so {consequence} runs the plain-torch codec, which is slower; "
            f"'pip install {package}'.",
            stacklevel=4,
        )
        return reference
    return importlib.import_module(f"dibit.codec.backends.{module}")


def _kernel(name: str, *backend: str) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        return getattr(_backend(*backend), name)(*args)

    return kernel


for _op in OPS:
    _op.register_kernel("cpu")(_kernel(_op._name, "cpu.ops", "numba", "the CPU"))
    if _op not in (aggregate, passed_rows):  # cuSPARSE's, and made of others
        _op.register_kernel("cuda")(_kernel(_op._name, "triton", "triton", "the GPU"))
