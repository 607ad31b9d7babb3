"""The arithmetic of blocks, against blocks that are cut one by one."""

from __future__ import annotations

import pytest
import torch

from dibit import Config, Project, Rows, Sample, encode
from dibit.codec.layout import Layout, mask_bytes, parts_of, reduced_shape, row_parts


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("block", [1, 3, 8, 100])
@pytest.mark.parametrize("elements", [0, 1, 7, 8, 99, 100, 101, 300])
def test_blocks_cut_one_by_one(elements: int, block: int, bits: int) -> None:
    cut = [min(block, elements - first) for first in range(0, elements, block)]
    sizes = [len(range(0, count, 8 // bits)) for count in cut]
    layout = Layout(elements, block, bits)
    assert layout.blocks == len(cut)
    assert layout.full == cut.count(block)
    assert layout.tail == (cut[-1] if cut and cut[-1] < block else 0)
    assert layout.tail_bytes == (sizes[-1] if layout.tail else 0)
    assert layout.block_bytes == (sizes[0] if layout.full else Layout(block, block, bits).code_bytes)
    assert layout.code_bytes == sum(sizes)


def test_a_mask_is_one_block_of_one_bit() -> None:
    for count in (0, 1, 7, 8, 9, 1000):
        assert mask_bytes(count) == Layout(count, max(1, count), 1).code_bytes


@pytest.mark.parametrize("reduce", [None, Project(1), Project(4), Project(90), Sample(4), Sample(4, least=30)], ids=str)
@pytest.mark.parametrize("block", ["row", Rows(3), "tensor", 50], ids=str)
def test_it_is_the_layout_of_what_is_encoded(reduce: Project | Sample | None, block: object) -> None:
    config = Config(bits=4, block=block, reduce=reduce)  # type: ignore[arg-type]
    packed = encode(torch.randn(61, 24), config, 1)
    assert packed.reduced_shape == reduced_shape(61, 24, config)
    assert packed.layout == Layout.of(*packed.reduced_shape, config)
    assert packed.codes.shape == (packed.layout.code_bytes,)
    assert packed.ranges.shape == (packed.layout.blocks, 2)


@pytest.mark.parametrize(
    ("rows", "width", "block"), [(0, 4, 16), (1, 1, 7), (1000, 12, 96), (3000, 12, 5000), (5, 0, 3)]
)
def test_parts_begin_with_a_block_and_cover_all_rows(rows: int, width: int, block: int) -> None:
    with parts_of(200):
        parts = list(row_parts(rows, width, block))
    assert [row for first, stop in parts for row in range(first, stop)] == list(range(rows))
    assert all(first * width % block == 0 for first, _ in parts)
    assert all(first < stop for first, stop in parts) or not rows
    if (rows, block) == (1000, 96):
        assert len(parts) == 63, "16 rows are two blocks, 192 elements, and a part has no more than 200"
    if block == 5000:
        assert parts == [(0, 1250), (1250, 2500), (2500, 3000)], "3 blocks are the first that end with a row"
