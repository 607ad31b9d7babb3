"""The models of a normalised activation, real histograms, and how far they are apart (i-EXACT, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dibit.codec import normal_levels


@dataclass(frozen=True)
class ClippedNormal:
    r"""A normal of mean :math:`\mu = B/2` and deviation `sigma`, the mass outside [0, B] put on the two ends.

    Args:
        bits: B = 2**bits - 1.
        sigma: in bins of the uniform grid.
    """

    bits: int
    sigma: float

    @classmethod
    def sharing(cls, bits: int, count: int) -> ClippedNormal:
        """CN[1/D]: the model for `count` = D elements that share one range, 1/D of the mass outside on each side.

        Raises:
            ValueError: `count` is below 3, where the model degenerates.
        """
        if count < 3:
            raise ValueError(f"count = {count} was given; the clipped normal needs at least 3 elements a range.")
        return cls(bits, normal_levels.sigma(bits, count))

    @property
    def top(self) -> int:
        """B, the upper end."""
        return (1 << self.bits) - 1

    @property
    def count(self) -> float:
        r"""D of CN[1/D]: one over the mass beyond each end, :math:`1 / \Phi(-\mu / \sigma)`."""
        from scipy.stats import norm

        return float(1 / norm.cdf(-self.top / 2 / self.sigma))

    def masses(self, bins: int = 60) -> np.ndarray:
        """Probability of each of `bins` equal bins of [0, B], float64 (bins,); the ends' mass is in the end bins."""
        from scipy.stats import norm

        edges = np.linspace(0, self.top, bins + 1)
        edges[0], edges[-1] = -np.inf, np.inf
        return np.diff(norm.cdf(edges, self.top / 2, self.sigma))

    def sample(self, size: int, seed: int = 0) -> np.ndarray:
        """Draws, float64 (size,)."""
        draw = np.random.default_rng(seed).normal(self.top / 2, self.sigma, size)
        return draw.clip(0, self.top)


def uniform(bins: int = 60) -> np.ndarray:
    """EXACT's assumption as masses of `bins` equal bins: float64 (bins,)."""
    return np.full(bins, 1 / bins)


def histogram(h: ArrayLike, bits: int, bins: int = 60) -> np.ndarray:
    """The masses of a normalised activation in `bins` equal bins of [0, B], float64 (bins,), sum 1.

    Args:
        h: any shape, in [0, B]; see `Activation.normalised`.
        bits: B = 2**bits - 1.
        bins: their number; a multiple of B puts the uniform levels on edges.

    Raises:
        ValueError: `h` is empty or leaves [0, B].
    """
    flat = checked(h, bits)
    counts, _ = np.histogram(flat, bins, range=(0, 2**bits - 1))
    return counts / flat.size


def divergence(p: ArrayLike, q: ArrayLike) -> float:
    """Jensen-Shannon divergence of two vectors of masses, in bits: 0 where equal, 1 where they have nothing in common.

    Raises:
        ValueError: lengths differ, a mass is negative, or a vector has no mass.
    """
    from scipy.spatial.distance import jensenshannon

    a, b = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"divergence got masses of shapes {a.shape} and {b.shape}; expected two of the same bins.")
    if not (min(a.min(initial=0), b.min(initial=0)) >= 0 and a.sum() > 0 and b.sum() > 0):
        raise ValueError("divergence got a negative mass, or no mass at all; expected the shares of the bins.")
    return float(jensenshannon(a, b, base=2) ** 2)


def fit(h: ArrayLike, bits: int) -> ClippedNormal:
    """The clipped normal (mean B/2) of greatest likelihood: what lies on an end counts as mass beyond it.

    Args:
        h: normalised activations in [0, B], any shape.
        bits: B = 2**bits - 1.

    Raises:
        ValueError: `h` is empty, leaves [0, B], or is constant.
    """
    from scipy.optimize import minimize_scalar
    from scipy.stats import norm

    flat = checked(h, bits)
    top = 2**bits - 1
    inner = flat[(flat > 0) & (flat < top)]
    outside = flat.size - inner.size
    square = float(np.sum((inner - top / 2) ** 2))
    if flat.min() == flat.max() or (square == 0 and outside == 0):
        raise ValueError(f"fit got a constant activation, {flat.flat[0]:g}; expected one with spread.")

    def loss(log_sigma: float) -> float:
        sigma = np.exp(log_sigma)
        return float(square / (2 * sigma**2) + inner.size * log_sigma - outside * norm.logcdf(-top / 2 / sigma))

    found: Any = minimize_scalar(loss, bounds=(np.log(top) - 8, np.log(top) + 8), method="bounded")
    return ClippedNormal(bits, float(np.exp(found.x)))


def checked(h: ArrayLike, bits: int) -> np.ndarray:
    """`h` as a flat float64 array, or a `ValueError` that says why it is no normalised activation."""
    flat = np.asarray(h, dtype=np.float64).reshape(-1)
    top = 2**bits - 1
    if flat.size == 0:
        raise ValueError("the activation is empty; expected at least one element.")
    if not (flat.min() >= 0 and flat.max() <= top):  # also NaN
        raise ValueError(
            f"the activation lies in [{flat.min():g}, {flat.max():g}]; expected a normalised one in [0, {top}], such "
            "as Activation.normalised() gives."
        )
    return flat
