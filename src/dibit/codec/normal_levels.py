r"""Levels of least expected variance for a clipped normal (i-EXACT, section 3.2): bits and block size in, levels out.

The normalised activation in [0, B] is modelled by CN[1/D]: mean :math:`\mu = B/2`, deviation
:math:`\sigma = -\mu / \Phi^{-1}(1/D)`, the mass outside put on the two ends; D elements share a range. Rounding
stochastically at h in :math:`[a_{i-1}, a_i]` has variance :math:`(h - a_{i-1})(a_i - h)`; the levels minimise its
expectation.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def sigma(bits: int, count: int) -> float:
    r"""The standard deviation of CN[1/D] on [0, B]: :math:`-\mu / \Phi^{-1}(1/D)`, for D = `count` > 2."""
    from scipy.stats import norm

    top = 2**bits - 1
    return float(-(top / 2) / norm.ppf(1 / count))


def expected_variance(levels: tuple[float, ...] | np.ndarray, count: int) -> float:
    """Expected variance of stochastic rounding to `levels` under CN[1/count], in units of (uniform bin width)^2."""
    import numpy as np

    a = np.asarray(levels, dtype=np.float64)
    bits = round(math.log2(len(a)))
    m0, m1, m2 = _moments(a, (len(a) - 1) / 2, sigma(bits, count))
    low, high = a[:-1], a[1:]
    return float(np.sum((low + high) * m1 - low * high * m0 - m2))


@lru_cache(maxsize=256)
def normal_levels(bits: int, count: int) -> tuple[float, ...]:
    """2**bits levels from 0 to B = 2**bits - 1 that minimise `expected_variance` under CN[1/count].

    Args:
        bits: 1 to 8.
        count: elements that share one range (D of the paper, G with blocks). At 1 or 2 the clipped normal
            degenerates and the levels are uniform.
    """
    import numpy as np
    from scipy.optimize import root
    from scipy.stats import norm

    top = 2**bits - 1
    if bits == 1 or count <= 2:
        return tuple(float(level) for level in range(top + 1))
    mu, sd = top / 2, sigma(bits, count)
    # Start where many levels would lie: bins of equal mass under density^(1/3), a normal of deviation sqrt(3) sigma.
    wide = math.sqrt(3) * sd
    ends = norm.cdf([0, top], mu, wide)
    start = norm.ppf(np.linspace(ends[0], ends[1], top + 1), mu, wide)
    start[0], start[-1] = 0, top

    def slope(inner: np.ndarray) -> np.ndarray:
        a = np.concatenate(([0.0], inner, [top]))
        m0, m1, _ = _moments(a, mu, sd)
        left, right = (
            m1 - a[:-1] * m0,
            a[1:] * m0 - m1,
        )  # integrals of (h - a_(i-1)) p and (a_i - h) p over bin i
        return left[:-1] - right[1:]

    def curvature(inner: np.ndarray) -> np.ndarray:
        a = np.concatenate(([0.0], inner, [top]))
        m0, _, _ = _moments(a, mu, sd)
        width, density = np.diff(a), norm.pdf(a, mu, sd)
        diagonal = (width[:-1] + width[1:]) * density[1:-1]
        return np.diag(diagonal) - np.diag(m0[1:-1], 1) - np.diag(m0[1:-1], -1)

    found = root(slope, start[1:-1], jac=curvature, tol=1e-12)
    levels = np.concatenate(([0.0], found.x, [top]))
    levels = (levels + (top - levels[::-1])) / 2  # the problem is symmetric: remove the solver's last digits
    if not (np.all(np.diff(levels) > 0) and np.abs(slope(levels[1:-1])).max() < 1e-7):
        raise RuntimeError(f"the levels for bits = {bits}, count = {count} did not converge: {found.message}")
    return tuple(float(level) for level in levels)


def _moments(a: np.ndarray, mu: float, sd: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integrals of p, h p and h^2 p over each bin of `a`, p the normal density."""
    import numpy as np
    from scipy.stats import norm

    z = (a - mu) / sd
    cdf, pdf = norm.cdf(z), norm.pdf(z)
    m0 = np.diff(cdf)
    z1 = -np.diff(pdf)  # the integral of z phi(z)
    z2 = m0 - np.diff(z * pdf)
    return m0, mu * m0 + sd * z1, mu**2 * m0 + 2 * mu * sd * z1 + sd**2 * z2
