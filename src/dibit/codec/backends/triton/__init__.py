"""The codec's operators on a GPU: tensors in, tensors out, Triton kernels between.

Nothing here waits for the device, and seeds are read on it, so that calls can be captured in a CUDA graph. Kernels take
float32, bfloat16 and float16; for other dtypes the definition runs.
"""

from dibit.codec.backends.triton.blocks import dequantize, quantize, quantize_rows
from dibit.codec.backends.triton.edges import (
    add_neighbours,
    add_scaled,
    add_signed,
    edge_products,
    edge_signs,
)
from dibit.codec.backends.triton.elementwise import (
    apply_mask,
    dropout,
    finite,
    norm_relu_dropout,
    pack_mask,
    passed_rows,
    relu,
    relu_dropout_gradient,
    scale_masked,
    signs,
)
from dibit.codec.backends.triton.products import column_sums, norm_gradient, weight_gradient
from dibit.codec.backends.triton.sampling import pick_rows, row_scores
from dibit.codec.backends.triton.winners import add_winners, edge_extremes, edge_winners

__all__ = [
    "add_neighbours",
    "add_scaled",
    "add_signed",
    "add_winners",
    "apply_mask",
    "column_sums",
    "dequantize",
    "dropout",
    "edge_extremes",
    "edge_products",
    "edge_signs",
    "edge_winners",
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
    "weight_gradient",
]
