"""The codec's operators on a CPU: tensors in, tensors out, Numba kernels between.

Kernels take float32 (and bfloat16 or float32 ranges); for other dtypes the definition runs.
"""

from dibit.codec.backends.cpu.blocks import dequantize, quantize, quantize_rows
from dibit.codec.backends.cpu.edges import (
    add_neighbours,
    add_rows,
    add_scaled,
    add_signed,
    aggregate,
    edge_products,
    edge_signs,
    sort_edges,
)
from dibit.codec.backends.cpu.elementwise import (
    apply_mask,
    dropout,
    fingerprint,
    finite,
    norm_relu_dropout,
    pack_mask,
    passed_rows,
    relu,
    relu_dropout_gradient,
    scale_masked,
    signs,
)
from dibit.codec.backends.cpu.products import column_sums, norm_gradient, weight_gradient
from dibit.codec.backends.cpu.sampling import pick_rows, row_scores
from dibit.codec.backends.cpu.winners import add_winners, edge_extremes, edge_winners

__all__ = [
    "add_neighbours",
    "add_rows",
    "add_scaled",
    "add_signed",
    "add_winners",
    "aggregate",
    "apply_mask",
    "column_sums",
    "dequantize",
    "dropout",
    "edge_extremes",
    "edge_products",
    "edge_signs",
    "edge_winners",
    "fingerprint",
    "finite",
    "norm_gradient",
    "norm_relu_dropout",
    "pack_mask",
    "passed_rows",
    "pick_rows",
    "quantize",
    "quantize_rows",
    "relu",
    "relu_dropout_gradient",
    "row_scores",
    "scale_masked",
    "signs",
    "sort_edges",
    "weight_gradient",
]
