"""Every operator of the codec; but for `fingerprint` as torch knows it: `dibit::NAME`, with its schema and its fake.

An operator's name, arguments and documentation are those of its definition in `dibit.codec.backends.reference`;
`dibit.codec.dispatch` finds the kernels that run it. A fake gives shapes and dtypes of the results, for
`torch.compile`. Tensors are contiguous, and seeds are int64 0-d.
"""

import torch
from torch import Tensor

from dibit.codec.backends import reference
from dibit.codec.dispatch import operator, served
from dibit.codec.layout import Layout, mask_bytes

quantize = operator(reference.quantize)
quantize_rows = operator(reference.quantize_rows)
dequantize = operator(reference.dequantize)
weight_gradient = operator(reference.weight_gradient)
column_sums = operator(reference.column_sums)
norm_gradient = operator(reference.norm_gradient)
aggregate = operator(reference.aggregate)
sort_edges = operator(reference.sort_edges)
add_neighbours = operator(reference.add_neighbours, writes="out")
add_rows = operator(reference.add_rows, writes="out")
add_scaled = operator(reference.add_scaled, writes="out")
edge_products = operator(reference.edge_products)
edge_signs = operator(reference.edge_signs)
add_signed = operator(reference.add_signed, writes="out")
edge_extremes = operator(reference.edge_extremes, writes="out")
edge_winners = operator(reference.edge_winners)
add_winners = operator(reference.add_winners, writes="out")
pack_mask = operator(reference.pack_mask)
relu = operator(reference.relu)
apply_mask = operator(reference.apply_mask)
scale_masked = operator(reference.scale_masked)
dropout = operator(reference.dropout)
norm_relu_dropout = operator(reference.norm_relu_dropout)
relu_dropout_gradient = operator(reference.relu_dropout_gradient)
passed_rows = operator(reference.passed_rows)
signs = operator(reference.signs)
finite = operator(reference.finite)
row_scores = operator(reference.row_scores)
pick_rows = operator(reference.pick_rows)
# Never traced, and its tensors are often small: a call through torch would take longer than the kernel.
fingerprint = served(reference.fingerprint)

OPS = (
    quantize,
    quantize_rows,
    dequantize,
    weight_gradient,
    column_sums,
    norm_gradient,
    aggregate,
    sort_edges,
    add_neighbours,
    add_rows,
    add_scaled,
    edge_products,
    edge_signs,
    add_signed,
    edge_extremes,
    edge_winners,
    add_winners,
    pack_mask,
    relu,
    apply_mask,
    scale_masked,
    dropout,
    norm_relu_dropout,
    relu_dropout_gradient,
    passed_rows,
    signs,
    finite,
    row_scores,
    pick_rows,
)


def _contiguous(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _mask(x: Tensor) -> Tensor:
    return x.new_empty(mask_bytes(x.numel()), dtype=torch.uint8)


def _coded(x: Tensor, layout: Layout, stats: torch.dtype, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, ranges and widths."""
    widths = x.new_empty(layout.blocks, dtype=torch.promote_types(dtype, torch.float32))
    return x.new_empty(layout.code_bytes, dtype=torch.uint8), x.new_empty((layout.blocks, 2), dtype=stats), widths


@quantize.register_fake
def _(x, seed, bits, block, levels, stats, rounding, number=0):
    return _coded(x, Layout(x.numel(), block, bits), stats, x.dtype)


@quantize_rows.register_fake
def _(x, index, shift, scale, seed, bits, block, levels, stats, rounding):
    rows = x.shape[0] if index is None else index.shape[0]
    return _coded(x, Layout(rows * x.shape[1], block, bits), stats, (x if shift is None else shift).dtype)


@dequantize.register_fake
def _(codes, ranges, seed, numel, bits, block, levels, dither, dtype, number=0):
    return codes.new_empty(numel, dtype=dtype)


@weight_gradient.register_fake
def _(codes, ranges, seed, dy, index, weight, rows, width, bits, block, levels, dither):
    return dy.new_empty((dy.shape[1], width), dtype=torch.promote_types(dy.dtype, torch.float32))


@column_sums.register_fake
def _(codes, ranges, seed, g, bits, block, dither):
    return g.new_empty(g.shape[1])


@norm_gradient.register_fake
def _(codes, ranges, seed, g, shift, factor, gain, bits, block, dither):
    return torch.empty_like(g)


@aggregate.register_fake
def _(crow, col, values, x):
    return x.new_empty((crow.shape[0] - 1, x.shape[1]))


@sort_edges.register_fake
def _(index, count):
    dtype = torch.int32 if index.numel() < 2**31 else torch.int64
    return index.new_empty(count + 1, dtype=dtype), index.new_empty(index.shape, dtype=dtype)


@add_neighbours.register_fake
def _(out, crow, col, values, x):
    return None


@add_rows.register_fake
def _(out, index, x):
    return None


@add_scaled.register_fake
def _(out, crow, col, order, scale, x):
    return None


@edge_products.register_fake
def _(crow, col, order, a, x):
    return a.new_empty((col.shape[0], a.shape[1]))


@edge_signs.register_fake
def _(crow, col, order, a, b):
    return a.new_empty((col.shape[0], a.shape[1], -(-a.shape[2] // 8)), dtype=torch.uint8)


@add_signed.register_fake
def _(out, crow, order, signs, scale, slope):
    return None


@edge_extremes.register_fake
def _(out, crow, col, x, least):
    return None


@edge_winners.register_fake
def _(crow, col, x, y):
    planes = torch.library.get_ctx().new_dynamic_size()
    return y.new_empty((planes, -(-y.shape[1] // 8)), dtype=torch.uint8), y.new_empty(y.shape[0], dtype=torch.bool)


@add_winners.register_fake
def _(out, crow, col, planes, many, grad, initial):
    return None


@pack_mask.register_fake
def _(x):
    return _mask(x)


@relu.register_fake
def _(x):
    return torch.empty_like(x), _mask(x)


@apply_mask.register_fake
def _(grad, mask, slope):
    return _contiguous(grad)


@scale_masked.register_fake
def _(x, mask, scale):
    return _contiguous(x)


@dropout.register_fake
def _(x, seed, p):
    return _contiguous(x)


@norm_relu_dropout.register_fake
def _(x, mean, gain, bias, seed, p):
    return torch.empty_like(x), _mask(x)


@relu_dropout_gradient.register_fake
def _(grad, mask, seed, p):
    return _contiguous(grad)


@passed_rows.register_fake
def _(codes, ranges, seed, weight, bias, mask, slope, drop, p, start, stop, rows, bits, block, dither):
    return weight.new_empty((stop - start, weight.shape[0]))


@signs.register_fake
def _(seed, count):
    return seed.new_empty(count, dtype=torch.float32)


@finite.register_fake
def _(x):
    return x.new_empty((), dtype=torch.float32)


@row_scores.register_fake
def _(x):
    return x.new_empty(x.shape[0], dtype=torch.uint8)


@pick_rows.register_fake
def _(scores, seed, count):
    return scores.new_empty(count, dtype=torch.int64), scores.new_empty(count, dtype=torch.float32)
