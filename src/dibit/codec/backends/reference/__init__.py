"""The codec's operators in plain torch, for any device: their definition, with their arguments and results.

`dibit.codec.ops` takes names and schemas from here. The other backends must give the same codes, bit for bit.
"""

from dibit.codec.backends.reference.blocks import (
    NEAREST,
    STOCHASTIC,
    affine,
    cast_clamped,
    dequantize,
    dither_variance,
    quantize,
    quantize_rows,
    unpack,
    unpack_all,
)
from dibit.codec.backends.reference.edges import (
    add_neighbours,
    add_rows,
    add_scaled,
    add_signed,
    aggregate,
    edge_products,
    edge_signs,
    sort_edges,
)
from dibit.codec.backends.reference.elementwise import (
    apply_mask,
    dropout,
    dropout_scale,
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
from dibit.codec.backends.reference.products import column_sums, norm_gradient, weight_gradient
from dibit.codec.backends.reference.sampling import pick_rows, row_scores
from dibit.codec.backends.reference.winners import add_winners, edge_extremes, edge_winners

__all__ = [
    "NEAREST",
    "STOCHASTIC",
    "add_neighbours",
    "add_rows",
    "add_scaled",
    "add_signed",
    "add_winners",
    "affine",
    "aggregate",
    "apply_mask",
    "cast_clamped",
    "column_sums",
    "dequantize",
    "dither_variance",
    "dropout",
    "dropout_scale",
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
    "unpack",
    "unpack_all",
    "weight_gradient",
]
