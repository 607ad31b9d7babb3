import itertools

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from dibit.study import ClippedNormal, divergence, fit, histogram, uniform


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("count", [3, 16, 1024])
def test_clipped_normal_masses_are_integrals_with_the_tails_on_the_ends(bits: int, count: int) -> None:
    model, top, bins = ClippedNormal.sharing(bits, count), 2**bits - 1, 12
    masses = model.masses(bins)
    assert masses.sum() == pytest.approx(1, abs=1e-12)
    assert model.count == pytest.approx(count, rel=1e-9)
    edges = np.linspace(0, top, bins + 1)
    inside = [quad(lambda h: norm.pdf(h, top / 2, model.sigma), a, b)[0] for a, b in itertools.pairwise(edges)]
    inside[0] += 1 / count
    inside[-1] += 1 / count
    assert masses == pytest.approx(inside, abs=1e-9)


def test_sample_has_the_masses() -> None:
    model = ClippedNormal.sharing(2, 16)
    found, expected, size = histogram(model.sample(200_000), 2), model.masses(), 200_000
    chi2 = (size * (found - expected) ** 2 / expected).sum()
    assert abs(chi2 - 59) < 5 * (2 * 59) ** 0.5


def test_histogram_counts_the_ends() -> None:
    assert histogram([0, 0, 1.5, 3], 2, 3) == pytest.approx([0.5, 0.25, 0.25])


def test_divergence() -> None:
    assert divergence([1, 0], [0, 1]) == pytest.approx(1)
    assert divergence([0.3, 0.7], [0.3, 0.7]) == pytest.approx(0, abs=1e-12)
    p, q = np.array([0.25, 0.75]), np.array([0.5, 0.5])
    m = (p + q) / 2
    by_hand = 0.5 * (p * np.log2(p / m)).sum() + 0.5 * (q * np.log2(q / m)).sum()
    assert divergence(p, q) == pytest.approx(by_hand)
    assert divergence(p, q) == pytest.approx(divergence(q, p))


@pytest.mark.parametrize("count", [8, 64, 1024])
def test_fit_finds_the_model_that_made_the_data(count: int) -> None:
    true = ClippedNormal.sharing(2, count)
    size = 40_000
    found = fit(true.sample(size), 2)
    assert abs(found.sigma / true.sigma - 1) < 5 / (2 * size) ** 0.5  # the likelihood's standard error, or less
    assert divergence(true.masses(), found.masses()) < divergence(true.masses(), uniform()) / 100


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: histogram([], 2), "empty"),
        (lambda: histogram([0.0, 4.0], 2), r"lies in \[0, 4\]; expected a normalised one in \[0, 3\]"),
        (lambda: histogram([float("nan")], 2), "expected a normalised one"),
        (lambda: fit([1.5, 1.5], 2), "constant activation, 1.5"),
        (lambda: fit([0.0, 0.0], 2), "constant activation, 0"),
        (lambda: divergence([1.0], [0.5, 0.5]), "the same bins"),
        (lambda: divergence([0.0, 0.0], [0.5, 0.5]), "no mass"),
        (lambda: ClippedNormal.sharing(2, 2), "at least 3 elements"),
    ],
)
def test_bad_input(call, sentence: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=sentence):
        call()
