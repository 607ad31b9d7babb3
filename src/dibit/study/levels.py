"""Levels that fit the data: the optimum of stochastic rounding to 2^b levels (QUIVER, Ben-Basat et al., 2024)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from dibit.study.distribution import checked

_CELLS = 1200  # of the grid of candidates, about: 3 x 400 for 2 bits


def uniform_levels(bits: int) -> tuple[float, ...]:
    """0, 1, ..., B: what EXACT rounds to."""
    return tuple(float(level) for level in range(2**bits))


def optimal_levels(
    h: ArrayLike, bits: int, *, weights: ArrayLike | None = None, cells: int | None = None
) -> tuple[float, ...]:
    r"""The levels of least `measured_variance` on this activation, by dynamic programming.

    Candidates are the edges of a histogram; the cost of two neighbouring levels a < b,
    :math:`\sum_{h \in [a, b)} (h - a)(b - h)`, is exact from the data's own moments, so the result is the exact optimum
    among levels on those edges. The uniform levels are among them.

    Args:
        h: normalised activations in [0, B], any shape.
        bits: 1, 2, 4 or 8; B = 2**bits - 1.
        weights: of the elements, such as the squared ranges of their blocks; same shape as `h`.
        cells: of the histogram; a multiple of B. Default: about 1,200, at least 8 a bin.

    Returns:
        2**bits increasing levels, the first 0, the last B: as `Config(levels=...)` takes them.

    Raises:
        ValueError: `h` is empty or leaves [0, B].
    """
    flat = checked(h, bits)
    top = 2**bits - 1
    if bits == 1:
        return uniform_levels(1)
    cells = cells or top * max(8, _CELLS // top)
    if cells % top:
        raise ValueError(f"cells = {cells} was given; expected a multiple of {top}, so that uniform levels are there.")
    edges = np.linspace(0, top, cells + 1)
    own = np.ones_like(flat) if weights is None else np.asarray(weights, dtype=np.float64).reshape(-1)
    cell = np.minimum((flat * (cells / top)).astype(np.int64), cells - 1)
    # moments of all that lies below each edge
    below = [np.concatenate(([0.0], np.cumsum(np.bincount(cell, own * flat**k, cells)))) for k in range(3)]
    m0, m1, m2 = (b[None, :] - b[:, None] for b in below)
    cost = (edges[:, None] + edges[None, :]) * m1 - edges[:, None] * edges[None, :] * m0 - m2
    cost[np.tril_indices(cells + 1)] = np.inf
    best, choice = cost[0], []
    for _ in range(top - 1):  # best[j]: least cost of what lies below edge j with one more level
        total = best[:, None] + cost
        choice.append(total.argmin(0))
        best = total[choice[-1], np.arange(cells + 1)]
    at, found = cells, [cells]
    for previous in reversed(choice):
        at = int(previous[at])
        found.append(at)
    return tuple(float(level) for level in edges[[0, *reversed(found)]])
