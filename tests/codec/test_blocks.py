"""Blocks by elements, by rows, and over the whole tensor."""

import pytest
import torch

from dibit import Config, Project, Rows, Sample, decode, encode


@pytest.mark.parametrize(
    ("block", "elements"),
    [
        ("row", 24),
        (Rows(), 24),
        (Rows(4), 96),
        (Rows(64, most=1024), 1024),
        (Rows(2, most=1024), 48),
        ("tensor", 2400),
        (7, 7),
    ],
    ids=str,
)
@pytest.mark.parametrize("bits", [2, 8])
def test_elements_that_share_a_range(block: object, elements: int, bits: int) -> None:
    x = torch.randn(100, 24)
    packed = encode(x, Config(bits=bits, block=block), 3)  # type: ignore[arg-type]
    plain = encode(x, Config(bits=bits, block=elements), 3)
    assert packed.block == elements
    assert packed.ranges.shape == (-(-x.numel() // elements), 2)
    assert torch.equal(packed.codes, plain.codes)
    assert torch.equal(decode(packed), decode(plain))


def test_rows_are_those_of_the_reduced_matrix() -> None:
    x = torch.randn(90, 32)
    assert encode(x, Config(block=Rows(2), reduce=Project(8)), 0).block == 8
    assert encode(x, Config(block=Rows(2), reduce=Sample(9)), 0).block == 64
    assert encode(x, Config(block="tensor", reduce=Sample(9)), 0).block == 320


@pytest.mark.parametrize("block", [0, "rows", 1.5, True])
def test_bad_blocks(block: object) -> None:
    with pytest.raises(ValueError, match=r"expected a whole number of at least 1 .* or dibit\.Rows"):
        Config(block=block)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Rows\.count = 0"):
        Rows(0)
