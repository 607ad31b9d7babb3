"""The variance of stochastic rounding on real activations: by formula, and by rounding them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from dibit.codec import encode
from dibit.study.capture import Activation
from dibit.study.distribution import checked


@dataclass(frozen=True)
class Estimate:
    """A mean over random draws and its standard error."""

    mean: float
    error: float


def measured_variance(h: ArrayLike, levels: Sequence[float], *, weights: ArrayLike | None = None) -> float:
    r"""Mean variance of rounding `h` stochastically to `levels`: :math:`(h - a_{i-1})(a_i - h)`, exactly.

    Args:
        h: normalised activations in [0, B], any shape.
        levels: 2**bits increasing levels from 0 to B.
        weights: of the elements; with the squared ranges of their blocks it is the error in the activation's own units.

    Returns:
        In units of the squared bin width of the uniform grid.

    Raises:
        ValueError: `h` is empty or leaves [0, B].
    """
    low, high = _parts(h, levels)
    return float(np.average(low * high, weights=None if weights is None else np.asarray(weights).reshape(-1)))


def monte_carlo(activation: Activation, levels: Sequence[float], draws: int = 8, seed: int = 0) -> Estimate:
    """The same by the codec itself: encode, decode, mean squared error over `draws` draws.

    Args:
        activation: what `capture` gave.
        levels: 2**bits increasing levels from 0 to B.
        draws: how often the whole activation is rounded.
        seed: of the first; the others follow.

    Returns:
        In units of the squared bin width of each block, blocks without spread left out. The standard error is that of
        rounding, from the known fourth moment.

    Raises:
        ValueError: the activation is constant.
    """
    h = activation.normalised()
    varied, step = activation.varied(), activation.steps()
    config = replace(activation.config, reduce=None, levels=tuple(levels), rounding="stochastic", norm=None)
    values = activation.values
    means = []
    for i in range(draws):
        miss = (encode(values, config, seed + i).reduced(0.0) - values).reshape(-1)[varied] / step
        means.append(float(miss.double().square().mean()))
    low, high = _parts(h, levels)
    spread = low * high * (low**3 + high**3) / (low + high) - (low * high) ** 2  # E e^4 - (E e^2)^2 of each element
    return Estimate(float(np.mean(means)), float(np.sqrt(max(0.0, spread.mean()) / (h.size * draws))))


def _parts(h: ArrayLike, levels: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """How far each element is above the level below it, and below the level above."""
    grid = np.asarray(levels, dtype=np.float64)
    bits = round(np.log2(len(grid)))
    if len(grid) != 2**bits or grid[0] != 0 or grid[-1] != len(grid) - 1 or (np.diff(grid) <= 0).any():
        raise ValueError(
            f"levels = {tuple(levels)} was given; expected 2**bits increasing numbers from 0 to 2**bits-1."
        )
    flat = checked(h, bits)
    at = np.searchsorted(grid, flat, side="right").clip(1, len(grid) - 1)
    return flat - grid[at - 1], grid[at] - flat
