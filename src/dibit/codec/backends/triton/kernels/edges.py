"""Kernels that sum over the edges of a graph, given as compressed rows, without gathering them.

A program has one node, and a tile of its features or one of its heads. It adds the edges one by one in their order, as
the definition does. `AT_ONCE` edges are loaded before the first of them is added.
"""

from __future__ import annotations

import triton
import triton.language as tl

AT_ONCE = tl.constexpr(4)


@triton.jit
def _edges_of(crow_ptr, row):
    """Where the edges of a node begin and end, in 64 bits: the last of `AT_ONCE` may lie beyond the graph's."""
    return tl.load(crow_ptr + row).to(tl.int64), tl.load(crow_ptr + row + 1).to(tl.int64)


@triton.jit
def _to_caller(order_ptr, e, here, ORDERED: tl.constexpr):
    """The caller's number of the edge e."""
    return tl.load(order_ptr + e, mask=here, other=0).to(tl.int64) if ORDERED else e


@triton.jit
def add_scaled(
    crow_ptr,
    col_ptr,
    order_ptr,
    scale_ptr,
    x_ptr,
    out_ptr,
    width,
    HEADS: tl.constexpr,
    SCALED: tl.constexpr,
    ORDERED: tl.constexpr,
    D: tl.constexpr,
):
    """out[n, h] += scale[order[e], h] x[col[e], h]: `width` features of HEADS heads in all."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * D + tl.arange(0, D)
    inside = d < width
    head = d // (width // HEADS)
    start, stop = _edges_of(crow_ptr, row)
    total = tl.load(out_ptr + row * width + d, mask=inside, other=0.0)
    for first in range(0, stop - start, AT_ONCE):
        for step in tl.static_range(AT_ONCE):
            e = start + first + step
            here = e < stop
            column = tl.load(col_ptr + e, mask=here, other=0).to(tl.int64)
            part = tl.load(x_ptr + column * width + d, mask=inside & here, other=0.0)
            if SCALED:
                own = _to_caller(order_ptr, e, here, ORDERED)
                part = part * tl.load(scale_ptr + own * HEADS + head, mask=inside & here, other=0.0)
            total = tl.where(here, total + part, total)
    tl.store(out_ptr + row * width + d, total, mask=inside)


@triton.jit
def edge_products(
    crow_ptr, col_ptr, order_ptr, a_ptr, x_ptr, out_ptr, width, heads, ORDERED: tl.constexpr, D: tl.constexpr
):
    """out[order[e], h] = <a[n, h], x[col[e], h]>: `width` features, at most D, of each head."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, D)
    inside = d < width
    a = tl.load(a_ptr + (row * heads + head) * width + d, mask=inside, other=0.0)
    start, stop = _edges_of(crow_ptr, row)
    for first in range(0, stop - start, AT_ONCE):
        for step in tl.static_range(AT_ONCE):
            e = start + first + step
            here = e < stop
            column = tl.load(col_ptr + e, mask=here, other=0).to(tl.int64)
            own = _to_caller(order_ptr, e, here, ORDERED)
            x = tl.load(x_ptr + (column * heads + head) * width + d, mask=inside & here, other=0.0)
            tl.store(out_ptr + own * heads + head, tl.sum(a * x), mask=here)


@triton.jit
def edge_signs(
    crow_ptr, col_ptr, order_ptr, a_ptr, b_ptr, signs_ptr, width, heads, ORDERED: tl.constexpr, B: tl.constexpr
):
    """a[n, h] + b[col[e], h] > 0, 1 bit an element: `width` features, at most 8 B, of each head."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    byte = tl.arange(0, B)
    size = (width + 7) // 8
    start, stop = _edges_of(crow_ptr, row)
    for number in range(stop - start):
        e = start + number
        column = tl.load(col_ptr + e).to(tl.int64)
        own = _to_caller(order_ptr, e, e < stop, ORDERED)
        packed = tl.zeros((B,), tl.int32)
        for place in tl.static_range(8):
            d = byte * 8 + place
            a = tl.load(a_ptr + (row * heads + head) * width + d, mask=d < width, other=0.0)
            b = tl.load(b_ptr + (column * heads + head) * width + d, mask=d < width, other=0.0)
            packed |= (a + b > 0).to(tl.int32) << place
        tl.store(signs_ptr + (own * heads + head) * size + byte, packed.to(tl.uint8), mask=byte < size)


@triton.jit
def add_signed(
    crow_ptr,
    order_ptr,
    signs_ptr,
    scale_ptr,
    out_ptr,
    width,
    slope,
    HEADS: tl.constexpr,
    ORDERED: tl.constexpr,
    D: tl.constexpr,
):
    """out[n, h] += scale[order[e], h], times slope where the sign is 0: `width` features of HEADS heads in all."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * D + tl.arange(0, D)
    inside = d < width
    own_width = width // HEADS
    head, feature = d // own_width, d % own_width
    size = (own_width + 7) // 8
    start, stop = _edges_of(crow_ptr, row)
    total = tl.load(out_ptr + row * width + d, mask=inside, other=0.0)
    for first in range(0, stop - start, AT_ONCE):
        for step in tl.static_range(AT_ONCE):
            e = start + first + step
            here = e < stop
            own = _to_caller(order_ptr, e, here, ORDERED)
            scale = tl.load(scale_ptr + own * HEADS + head, mask=inside & here, other=0.0)
            byte = (own * HEADS + head) * size + feature // 8
            bits = tl.load(signs_ptr + byte, mask=inside & here, other=0).to(tl.int32)
            part = tl.where(((bits >> (feature % 8)) & 1) == 1, scale, scale * slope)
            total = tl.where(here, total + part, total)
    tl.store(out_ptr + row * width + d, total, mask=inside)
