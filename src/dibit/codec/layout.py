"""How codes and masks lie in memory: the arithmetic that encoding, operators, backends and the compiler share.

A flat tensor is cut into blocks of `block` elements, each with a range of its own; the last, short block is a block
like any other. In a block of G elements byte j holds the codes of elements j, j + Q, j + 2Q, ... with
Q = ceil(G * bits / 8), lowest bits first. A mask is one block over the whole tensor, at 1 bit an element.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from dibit.config import Config, Project, Sample

_part = 1 << 20  # elements of a matrix that are gathered or unpacked at once: what a CPU's caches hold


class Layout(NamedTuple):
    """The blocks of a flat tensor, and the bytes of its codes.

    The sizes may be symbolic, as `torch.compile` has them, so nothing here branches on one.

    Attributes:
        elements: of the tensor.
        block: elements that share one range.
        bits: bits of an element's code: 1, 2, 4 or 8.
    """

    elements: int
    block: int
    bits: int

    @classmethod
    def of(cls, rows: int, width: int, config: Config) -> Layout:
        """The layout in which a config stores a matrix (rows, width); a reduced one where the config reduces."""
        return cls(rows * width, config.block_size(rows, width), config.bits)

    @property
    def full(self) -> int:
        """Blocks of `block` elements."""
        return self.elements // self.block

    @property
    def tail(self) -> int:
        """Elements of the short block at the end; 0 where there is none."""
        return self.elements % self.block

    @property
    def blocks(self) -> int:
        """All blocks, and so ranges."""
        return (self.elements + self.block - 1) // self.block

    @property
    def block_bytes(self) -> int:
        """Bytes of a full block's codes."""
        return packed_bytes(self.block, self.bits)

    @property
    def tail_bytes(self) -> int:
        """Bytes of the short block's codes."""
        return packed_bytes(self.tail, self.bits)

    @property
    def code_bytes(self) -> int:
        """Bytes of all codes."""
        return self.full * self.block_bytes + self.tail_bytes


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of one block take."""
    slots = 8 // bits
    return (count + slots - 1) // slots


def mask_bytes(count: int) -> int:
    """Bytes of a mask over `count` elements."""
    return packed_bytes(count, 1)


def reduced_shape(rows: int, width: int, config: Config) -> tuple[int, int]:
    """Rows and columns of what is quantised of a matrix (rows, width), after the config's reduction."""
    match config.reduce:
        case Project(ratio) if ratio > 1:
            return rows, max(1, width // ratio)
        case Sample():
            return -(-rows // config.reduce.resolve(rows).ratio), width
    return rows, width


def row_parts(rows: int, width: int, block: int) -> Iterator[tuple[int, int]]:
    """First row and end of parts that are whole blocks of whole rows (all but the last); one at least."""
    width = max(1, width)
    least = math.lcm(block, width) // width
    step = least * max(1, _part // (least * width))
    for first in range(0, max(1, rows), step):
        yield first, min(rows, first + step)


@contextmanager
def parts_of(elements: int) -> Iterator[None]:
    """Within it, a part of `row_parts` has so many elements: to show that no result depends on it."""
    global _part
    before, _part = _part, elements
    try:
        yield
    finally:
        _part = before
