import numpy as np
import pytest
from scipy.stats import norm

from dibit.codec.normal_levels import expected_variance, normal_levels, sigma

# PAPER, section 1.4: D or G, sigma, expected variance of uniform levels, optimal alpha, its variance, reduction in %
TABLE = [
    (8, 1.304, 0.1258, 1.030, 0.1250, 0.61),
    (16, 0.978, 0.1469, 1.050, 0.1442, 1.84),
    (32, 0.805, 0.1573, 1.069, 0.1514, 3.78),
    (64, 0.696, 0.1623, 1.086, 0.1521, 6.33),
    (128, 0.620, 0.1647, 1.102, 0.1493, 9.34),
    (256, 0.564, 0.1659, 1.116, 0.1449, 12.66),
    (512, 0.520, 0.1667, 1.128, 0.1398, 16.16),
    (1024, 0.484, 0.1675, 1.139, 0.1345, 19.71),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"D{row[0]}")
def test_paper_table(row: tuple[float, ...]) -> None:
    count, deviation, uniform, alpha, optimal, reduction = row
    levels = normal_levels(2, int(count))
    assert sigma(2, int(count)) == pytest.approx(deviation, abs=5e-4)
    assert levels[1] == pytest.approx(alpha, abs=5e-4)
    assert levels[1] + levels[2] == pytest.approx(3, abs=1e-9)
    before, after = expected_variance((0, 1, 2, 3), int(count)), expected_variance(levels, int(count))
    assert before == pytest.approx(uniform, abs=5e-5)
    assert after == pytest.approx(optimal, abs=5e-5)
    assert 100 * (1 - after / before) == pytest.approx(reduction, abs=5e-3)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("count", [3, 16, 1024, 10**8])
def test_no_neighbour_is_better(bits: int, count: int) -> None:
    levels = np.array(normal_levels(bits, count))
    assert (levels[0], levels[-1]) == (0, 2**bits - 1)
    assert (np.diff(levels) > 0).all()
    best = expected_variance(levels, count)
    for i in range(1, len(levels) - 1, max(1, len(levels) // 8)):
        for step in (-0.05, 0.05):
            moved = levels.copy()
            moved[i] += step * (levels[i + 1] - levels[i - 1])
            assert expected_variance(moved, count) > best


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [1, 2])
def test_degenerate_blocks_fall_back_to_uniform(bits: int, count: int) -> None:
    assert normal_levels(bits, count) == tuple(range(2**bits))


def test_expected_variance_by_monte_carlo() -> None:
    levels = np.array(normal_levels(2, 64))
    draw = np.random.default_rng(0)
    h = norm.rvs(1.5, sigma(2, 64), size=400_000, random_state=draw).clip(0, 3)
    above = np.searchsorted(levels, h, side="right").clip(1, 3)
    variances = (h - levels[above - 1]) * (levels[above] - h)
    error = variances.std() / len(h) ** 0.5
    assert abs(variances.mean() - expected_variance(levels, 64)) < 5 * error
