"""Levels and variances: by brute force, by formula, by the codec's own rounding."""

import itertools

import numpy as np
import pytest
import torch

from dibit import Config, Rows
from dibit.study import (
    Activation,
    ClippedNormal,
    expected_variance,
    measured_variance,
    monte_carlo,
    normal_levels,
    optimal_levels,
    uniform_levels,
)


def activation(values: torch.Tensor, config: Config) -> Activation:
    from dibit.codec import encode

    packed = encode(values, config, 0)
    return Activation("", "linear", config, values.shape, values, packed.ranges, packed.block)


@pytest.mark.parametrize("weighted", [False, True])
def test_dynamic_programming_is_the_best_of_all_choices(weighted: bool) -> None:
    draw = np.random.default_rng(1)
    h, cells = 3 * draw.beta(0.8, 2.0, 500), 24
    weights = draw.random(500) if weighted else None
    found = optimal_levels(h, 2, weights=weights, cells=cells)
    edges = np.linspace(0, 3, cells + 1)
    pairs = itertools.combinations(edges[1:-1], 2)
    best = min(pairs, key=lambda pair: measured_variance(h, (0, *pair, 3), weights=weights))
    assert found == pytest.approx((0, *best, 3))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.slow
def test_fitted_levels_on_the_papers_own_model(bits: int) -> None:
    h = ClippedNormal.sharing(bits, 1024).sample(200_000)
    fitted, normal = optimal_levels(h, bits), normal_levels(bits, 1024)
    assert (fitted[0], fitted[-1], len(fitted)) == (0, 2**bits - 1, 2**bits)
    cell = (2**bits - 1) / (1200 if bits < 8 else 2040)
    assert measured_variance(h, fitted) <= measured_variance(h, normal) + cell**2
    assert measured_variance(h, fitted) <= measured_variance(h, uniform_levels(bits)) + 1e-12
    if bits == 2:
        assert fitted == pytest.approx(normal, abs=0.02)
        assert measured_variance(h, normal) == pytest.approx(expected_variance(normal, 1024), rel=0.01)


def test_one_bit_has_no_choice() -> None:
    assert optimal_levels([0.1, 0.9], 1) == (0, 1)


def test_levels_cost_nothing_where_the_data_lie_on_them() -> None:
    h = np.repeat([0.0, 0.5, 2.5, 3.0], 10)
    assert optimal_levels(h, 2) == pytest.approx((0, 0.5, 2.5, 3))
    assert measured_variance(h, (0, 0.5, 2.5, 3)) == 0
    assert measured_variance(h, (0, 1, 2, 3)) == pytest.approx(0.125)
    assert measured_variance(h, (0, 1, 2, 3), weights=np.repeat([1, 0, 0, 1], 10)) == 0


@pytest.mark.parametrize("block", ["row", 100, Rows(3, 50), "tensor"], ids=str)
@pytest.mark.parametrize("levels", ["uniform", "normal", "fitted"])
def test_monte_carlo_is_the_analytic_variance(block: object, levels: str) -> None:
    values = torch.randn(2000, 16) * torch.linspace(0.1, 10, 2000)[:, None]
    a = activation(values, Config(block=block))  # type: ignore[arg-type]
    h = a.normalised()
    grid = {"uniform": uniform_levels(2), "normal": normal_levels(2, a.count), "fitted": optimal_levels(h, 2)}[levels]
    estimate = monte_carlo(a, grid, draws=8)
    assert estimate.error < 0.004
    assert abs(estimate.mean - measured_variance(h, grid)) < 5 * estimate.error


def test_blocks_without_spread_are_left_out() -> None:
    values = torch.randn(10, 16)
    values[::2] = 1.0
    a = activation(values, Config(block="row"))
    assert a.normalised().shape == (80,)
    assert monte_carlo(a, uniform_levels(2)).mean > 0


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (torch.full((4, 8), 2.0), "constant in every block"),
        (torch.empty(0, 8), "is empty"),
        (torch.full((4, 8), float("inf")), "NaN or infinite"),
    ],
)
def test_activations_without_a_distribution(values: torch.Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        activation(values, Config(block="row")).normalised()


@pytest.mark.parametrize("levels", [(0, 1, 2), (0, 2, 1, 3), (0.5, 1, 2, 3)])
def test_bad_levels(levels: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected 2\*\*bits increasing numbers"):
        measured_variance([0.5], levels)


def test_cells_must_hold_the_uniform_levels() -> None:
    with pytest.raises(ValueError, match="a multiple of 3"):
        optimal_levels([0.5], 2, cells=100)
