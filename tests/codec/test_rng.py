import pytest
import torch

from dibit.codec import mix, seed_tensor
from dibit.codec.projection import projection, sampled_rows
from dibit.codec.rng import hash32, uniform_range

PINNED = [1473459185, 415563400, 4238459426, 583803937, 2040640526]


def test_the_stream_is_pinned() -> None:
    """Every backend and every release must give these numbers: stored results depend on them."""
    numbers = hash32(torch.tensor([0, 1, 2, 2**32, 2**40 + 5]), seed_tensor(mix(1, "a")))
    assert numbers.tolist() == PINNED


@pytest.mark.parametrize("seed", [0, 1, 2**62 + 12345])
def test_uniform(seed: int) -> None:
    n = 1 << 18
    u = uniform_range(0, n, seed_tensor(seed)).double()
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5
    for lag in (1, 2, 32, 1024):
        correlation = ((u[lag:] - 0.5) * (u[:-lag] - 0.5)).mean() * 12
        assert abs(correlation) < 5 / n**0.5
    counts = torch.histc(u, 256, 0, 1)
    chi2 = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert abs(chi2 - 255) < 5 * (2 * 255) ** 0.5


def test_keys_give_different_multisets_and_uncorrelated_streams() -> None:
    n = 1 << 16
    for a, b in [(0, 1), (5, 5 ^ (1 << 40)), (mix(0, "x"), mix(0, "y"))]:
        u, v = (uniform_range(0, n, seed_tensor(s)).double() for s in (a, b))
        assert not torch.equal(u.sort().values, v.sort().values)
        assert abs(((u - 0.5) * (v - 0.5)).mean() * 12) < 5 / n**0.5


def test_neighbouring_seeds_share_nothing() -> None:
    """Users pass 0, 1, 2, ...: pooled over seeds the numbers are as even as independent ones, not more, not less."""
    n, seeds = 1 << 12, 256
    u = torch.stack([uniform_range(0, n, seed_tensor(s)).double() for s in range(seeds)])
    for shift in (1, 2, 255):
        assert not torch.equal(u[0, shift:], u[shift, :-shift])
        assert abs(((u[:-1, shift:] - 0.5) * (u[1:, :-shift] - 0.5)).mean() * 12) < 5 / (n * seeds) ** 0.5
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / u.numel()) ** 0.5
    spread = u.mean(1).std() / (1 / 12 / n) ** 0.5
    assert abs(spread - 1) < 5 / (2 * seeds) ** 0.5
    counts = torch.histc(u, 256, 0, 1)
    chi2 = ((counts - u.numel() / 256) ** 2 / (u.numel() / 256)).sum()
    assert abs(chi2 - 255) < 5 * (2 * 255) ** 0.5


def test_counter_has_64_bits() -> None:
    seed = seed_tensor(3)
    low = torch.arange(1000)
    assert not torch.equal(hash32(low, seed), hash32(low + 2**32, seed))


@pytest.mark.parametrize("ratio", [1, 2, 8, 50])
@pytest.mark.parametrize("rows", [1, 7, 64, 1001])
def test_sampled_rows(rows: int, ratio: int) -> None:
    draws = 400
    hits = torch.zeros(rows)
    for i in range(draws):
        index, weight = sampled_rows(rows, ratio, seed_tensor(mix(i)))
        assert len(index) == -(-rows // ratio)
        assert (index.diff() > 0).all()
        assert torch.equal(index // ratio, torch.arange(len(index)))
        assert weight.sum() == rows
        hits[index] += weight
    # E[weight * 1(sampled)] = 1 for every row; its variance is (size - 1) / draws
    assert (hits / draws - 1).abs().max() <= 5.5 * ((ratio - 1) / draws) ** 0.5 + 1e-6


def test_projection_is_the_identity_on_average() -> None:
    draws, width = 2000, 24
    total = sum((p := projection(width, 8, seed_tensor(mix(i)), torch.float64)) @ p.T for i in range(draws)) / draws
    off = total - torch.eye(width)
    assert off.diagonal().abs().max() < 1e-12
    assert off.abs().max() < 5 * (1 / 3 / draws) ** 0.5 * 1.2
