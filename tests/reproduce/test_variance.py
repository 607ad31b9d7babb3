"""The variance table to three decimals, and what is measured on real activations."""

import pytest

from dibit.reproduce.distribution import look_at, verdicts
from dibit.reproduce.paper import VARIANCE
from dibit.reproduce.variance import BITS, papers_table
from dibit.study import Activation, ClippedNormal


def test_table_to_three_decimals() -> None:
    rows = {(row["bits"], row["count"]): row for row in papers_table()}
    assert set(rows) == {(bits, count) for bits in BITS for count in VARIANCE}
    for count, (sigma, uniform, alpha, optimal, reduction) in VARIANCE.items():
        row = rows[2, count]
        assert row["sigma"] == pytest.approx(sigma, abs=5e-4)
        assert row["uniform"] == pytest.approx(uniform, abs=5e-5)
        assert row["levels"] == pytest.approx([0, alpha, 3 - alpha, 3], abs=5e-4)
        assert row["optimal"] == pytest.approx(optimal, abs=5e-5)
        assert row["reduction"] == pytest.approx(reduction, abs=5e-5)
        assert row["paper"]["alpha"] == alpha
    # more bits, finer bins: the density is flat within one, and the levels have less to win
    assert all(rows[8, count]["paper"] is None for count in VARIANCE)


def _activation(h: object) -> Activation:
    import torch

    from dibit import Config

    values = torch.tensor(h, dtype=torch.float32).view(-1, 64)
    values[:, 0], values[:, -1] = 0, 3  # so that every row's range is [0, 3]
    ranges = torch.tensor([[0.0, 3.0]]).expand(values.shape[0], 2)
    return Activation("layer", "linear", Config(block="row"), values.shape, values, ranges, 64)


def test_a_clipped_normal_is_recognised() -> None:
    row = look_at(_activation(ClippedNormal.sharing(2, 64).sample(64 * 500)), "EXACT", 0)
    assert (row["nearest"], row["holds"], row["count"], row["width"]) == ("CN[1/R]", True, 64, 64)
    assert row["divergence"]["CN[1/R]"] < row["divergence"]["uniform"] / 5
    assert sum(row["histogram"]) == pytest.approx(1, abs=1e-4)
    (sentence,) = verdicts([row])
    assert "on 1 of 1 activations" in sentence
    assert "times nearer than the uniform" in sentence


def test_a_uniform_density_and_a_lump_are_not() -> None:
    import numpy as np

    flat = np.random.default_rng(0).random(64 * 500) * 3
    row = look_at(_activation(flat), "EXACT", 0)
    assert (row["nearest"], row["holds"]) == ("uniform", False)
    flat[::2] = 0.71
    lump = look_at(_activation(flat), "EXACT", 0)
    assert lump["atom"] > 0.4
    assert any("% of the elements lie in one bin" in sentence for sentence in verdicts([lump]))
    assert "on 0 of 1 activations" in verdicts([lump])[0]
    assert "times farther" in verdicts([row])[0]
