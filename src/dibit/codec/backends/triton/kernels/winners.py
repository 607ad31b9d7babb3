"""Kernels for the maximum and minimum over neighbours, and for who attains them.

A program has one node and a tile of its features. Only `add_winners` is the other way round: a program has one row of
the gradient, and adds what the edges that read this row contribute, in their order. So nothing is added atomically, and
the result has the same bits at each call.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dibit.codec.backends.triton.kernels.edges import AT_ONCE, _edges_of


@triton.jit
def edge_extremes(crow_ptr, col_ptr, x_ptr, out_ptr, width, LEAST: tl.constexpr, D: tl.constexpr):
    """out[n] = max of x[col[e]] over the edges e of node n; LEAST: the minimum."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * D + tl.arange(0, D)
    inside = d < width
    start, stop = _edges_of(crow_ptr, row)
    total = tl.load(out_ptr + row * width + d, mask=inside, other=0.0)
    for first in range(0, stop - start, AT_ONCE):
        for step in tl.static_range(AT_ONCE):
            e = start + first + step
            here = e < stop
            column = tl.load(col_ptr + e, mask=here, other=0).to(tl.int64)
            part = tl.load(x_ptr + column * width + d, mask=inside & here, other=0.0)
            beyond = total < part if LEAST else total > part
            stays = beyond | (total != total)  # of two zeros the later one is taken; NaN stays
            total = tl.where(here & ((stays == 0) | (e == start)), part, total)
    tl.store(out_ptr + row * width + d, total, mask=inside)


@triton.jit
def find_winners(crow_ptr, col_ptr, x_ptr, y_ptr, code_ptr, many_ptr, width, tiles, D: tl.constexpr):
    """The number of the neighbour that attains y, or of all of them; whether the tile has an element that has neither.

    What is written where several, but not all, attain an element has no meaning.
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * D + tl.arange(0, D)
    inside = d < width
    start, stop = _edges_of(crow_ptr, row)
    best = tl.load(y_ptr + row * width + d, mask=inside, other=0.0)
    count, code = tl.zeros((D,), tl.int32), tl.zeros((D,), tl.int32)
    for first in range(0, stop - start, AT_ONCE):
        for step in tl.static_range(AT_ONCE):
            e = start + first + step
            here = e < stop
            column = tl.load(col_ptr + e, mask=here, other=0).to(tl.int64)
            part = tl.load(x_ptr + column * width + d, mask=inside & here, other=0.0)
            won = ((part == best) & here).to(tl.int32)
            count += won
            code += won * (e - start).to(tl.int32)
    degree = (stop - start).to(tl.int32)
    all_of_them = count == degree
    code = tl.where(all_of_them & (degree > 1), degree, code)
    tl.store(code_ptr + row * width + d, code, mask=inside)
    tied = inside & ((all_of_them | (count == 1)) == 0)
    tl.store(many_ptr + row * tiles + tl.program_id(1), tl.max(tied.to(tl.int32)).to(tl.uint8))


@triton.jit
def pack_winners(crow_ptr, col_ptr, first_ptr, many_ptr, x_ptr, y_ptr, code_ptr, planes_ptr, width, B: tl.constexpr):
    """The planes of a node: the digits of what `find_winners` gave, or a plane for each neighbour of one that has many.

    A program has B bytes of each.
    """
    row = tl.program_id(0).to(tl.int64)
    byte, place = tl.program_id(1) * B + tl.arange(0, B), tl.arange(0, 8)
    d = byte[:, None] * 8 + place[None, :]
    inside, size = d < width, (width + 7) // 8
    at, end = _edges_of(first_ptr, row)
    if tl.load(many_ptr + row) != 0:
        start = tl.load(crow_ptr + row).to(tl.int64)
        best = tl.load(y_ptr + row * width + d, mask=inside, other=0.0)
        for k in range((end - at).to(tl.int32)):
            column = tl.load(col_ptr + start + k).to(tl.int64)
            part = tl.load(x_ptr + column * width + d, mask=inside, other=0.0)
            packed = tl.sum(((part == best) & inside).to(tl.int32) << place[None, :], axis=1)
            tl.store(planes_ptr + (at + k) * size + byte, packed.to(tl.uint8), mask=byte < size)
    else:
        code = tl.load(code_ptr + row * width + d, mask=inside, other=0)
        for k in range((end - at).to(tl.int32)):
            packed = tl.sum(((code >> k) & 1) << place[None, :], axis=1)
            tl.store(planes_ptr + (at + k) * size + byte, packed.to(tl.uint8), mask=byte < size)


@triton.jit
def _bits(planes_ptr, plane, d, inside, size):
    """0 and 1 of one plane."""
    return (tl.load(planes_ptr + plane * size + d // 8, mask=inside, other=0).to(tl.int32) >> (d % 8)) & 1


@triton.jit
def share_gradient(
    crow_ptr,
    first_ptr,
    many_ptr,
    planes_ptr,
    grad_ptr,
    initial_ptr,
    share_ptr,
    width,
    INITIAL: tl.constexpr,
    D: tl.constexpr,
):
    """The gradient of each element, divided by the number of those that attain it."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * D + tl.arange(0, D)
    inside, size = d < width, (width + 7) // 8
    start, stop = _edges_of(crow_ptr, row)
    at, end = _edges_of(first_ptr, row)
    many = tl.load(many_ptr + row) != 0
    found, code = tl.zeros((D,), tl.int32), tl.zeros((D,), tl.int32)
    for k in range((end - at).to(tl.int32)):
        bits = _bits(planes_ptr, at + k, d, inside, size)
        found += bits
        code |= bits << tl.where(many, 0, k)  # a node that has many may have more planes than bits here
    degree = (stop - start).to(tl.int32)
    count = tl.where(many, found, tl.where(code == degree, degree, 1))
    if INITIAL:
        count += _bits(initial_ptr, row, d, inside, size)
    grad = tl.load(grad_ptr + row * width + d, mask=inside, other=0.0)
    tl.store(share_ptr + row * width + d, tl.div_rn(grad, count.to(tl.float32)), mask=inside)


@triton.jit
def add_winners(
    pointers_ptr,
    order_ptr,
    rows_ptr,
    crow_ptr,
    first_ptr,
    many_ptr,
    planes_ptr,
    share_ptr,
    out_ptr,
    width,
    GATHERED: tl.constexpr,
    D: tl.constexpr,
):
    """out[m] += the shares of the edges that read row m and attain the result; without GATHERED edge m is the only one.

    The edges of row m are order[pointers[m]], ..., and rows[e] is the node of edge e.
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * D + tl.arange(0, D)
    inside, size = d < width, (width + 7) // 8
    start, stop = row, row + 1
    if GATHERED:
        start, stop = _edges_of(pointers_ptr, row)
    total = tl.load(out_ptr + row * width + d, mask=inside, other=0.0)
    for number in range(stop - start):
        e = tl.load(order_ptr + start + number).to(tl.int64) if GATHERED else row
        node = tl.load(rows_ptr + e).to(tl.int64)
        begin, after = _edges_of(crow_ptr, node)
        at, end = _edges_of(first_ptr, node)
        place, degree = (e - begin).to(tl.int32), (after - begin).to(tl.int32)
        many = tl.load(many_ptr + node) != 0
        low = at + tl.where(many, place, 0)
        digits = tl.where(many, 1, (end - at).to(tl.int32))
        code = tl.zeros((D,), tl.int32)
        for k in range(digits):
            code |= _bits(planes_ptr, low + k, d, inside, size) << k
        won = tl.where(many, code == 1, (code == place) | (code == degree))
        share = tl.load(share_ptr + node * width + d, mask=inside, other=0.0)
        total += won.to(tl.float32) * share  # of infinity the others get NaN, as 0 times it is
    tl.store(out_ptr + row * width + d, total, mask=inside)
