"""What the gradient's error and the kept bytes are at each choice, by the formulas of docs/gradient-error.md."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dibit.engine.noise.noise_flow import Factor, Leaf, Level, Norm

NEAR_OPTIMAL = 1.1  # errors of up to this times the least error count as near it
_ROUNDED = 0.2  # variance of a normalised input at 2 bits with dither
DEEP = 8  # from this many norms behind one another on, those next to the loss may keep more bits
SHARE_NEAR_LOSS = 0.45  # this share of the depth counts as next to the loss
FINE = 4  # bits of the norms next to the loss


class Prediction:
    """Errors and bytes of one model.

    Args:
        leaves, norms, factors: what was measured, by the name of the residual or norm.
    """

    def __init__(self, leaves: Mapping[str, Leaf], norms: Mapping[str, Norm], factors: Mapping[str, Factor]) -> None:
        self.leaves, self.norms, self.factors = leaves, norms, factors

    @property
    def depth(self) -> int:
        """How many norms lie behind one another; where branches meet, the shorter one counts."""
        return 1 + max((norm.above for norm in self.norms.values()), default=-1)

    def bits(self, norm: Norm, level: int) -> int | None:
        """Bits of a norm that keeps all rows; `None`: the recipe's."""
        fine = level == Level.FINE and self.depth >= DEEP and norm.above < SHARE_NEAR_LOSS * self.depth
        return FINE if fine else None

    def variance(self, norm: Norm, level: int) -> float:
        """The variance of what a norm keeps of x_hat, over the square of x_hat."""
        if level == Level.SAMPLED:
            return norm.ratio - 1
        return _ROUNDED if self.bits(norm, level) is None else _ROUNDED * 4.0 ** (2 - FINE)

    def error(self, level: int, ratios: Mapping[str, int], share: float = 1.0) -> float:
        """The squared error of the gradient."""
        return sum(leaf.error(self.ratio(key, level, ratios), level, share) for key, leaf in self.leaves.items())

    def path(self, level: int) -> float:
        """The part of the squared error that comes from noise which norms (and factors of fixed bits) add to dX."""
        return sum(leaf.path_error(level) for leaf in self.leaves.values())

    def share(self, finer: int) -> float:
        """The factors' variance at `finer` bits over that at the recipe's bits; 1 if `finer` is 0 (the recipe's)."""
        given = min((factor.bits for factor in self.factors.values() if not factor.fixed), default=finer)
        return 4.0 ** min(0, given - finer) if finer else 1.0

    @property
    def signal(self) -> float:
        """The square of the gradient; below zero where nothing but noise was seen."""
        return sum(leaf.signal for leaf in self.leaves.values())

    def ratio(self, key: str, level: int, ratios: Mapping[str, int]) -> int:
        """The ratio of a leaf: it keeps one row of this many."""
        leaf = self.leaves[key]
        return 1 if not leaf.elements or (level and leaf.served) else min(leaf.most, ratios.get(key, leaf.most))

    def within(self, bound: float, level: int, share: float = 1.0) -> dict[str, int]:
        """The ratios of least bytes whose error is within a bound or, if that is out of reach, near the least error."""
        free = {key: leaf for key, leaf in self.leaves.items() if self.ratio(key, level, {}) > 1}
        least = sum(leaf.error(1, level, share) for leaf in self.leaves.values())
        # an error grows with its ratio in a straight line
        slopes = {key: leaf.error(2, level, share) - leaf.error(1, level, share) for key, leaf in free.items()}

        def ratios(price: float) -> dict[str, int]:
            """The ratios at which one element less costs the error `price`; each between 1 and the recipe's."""
            chosen = {}
            for key, leaf in free.items():
                best = math.sqrt(price * leaf.elements / slopes[key]) if slopes[key] > 0 else math.inf
                chosen[key] = int(max(1, min(leaf.most, best)))
            return chosen

        def error(chosen: Mapping[str, int]) -> float:
            return least + sum(slopes[key] * (ratio - 1) for key, ratio in chosen.items())

        if error({key: leaf.most for key, leaf in free.items()}) <= bound:
            return {}
        bound = max(bound, NEAR_OPTIMAL * least)
        low, high = -60.0, 60.0  # powers of e around error per element
        scale = sum(leaf.terms for leaf in free.values()) / max(1, sum(leaf.elements for leaf in free.values()))
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if error(ratios(scale * math.exp(middle))) <= bound else (low, middle)
        return ratios(scale * math.exp(low))

    def elements(self, level: int, ratios: Mapping[str, int], finer: int = 0) -> float:
        """What is kept, in elements of 2 bits."""
        leaves = (
            0.0 if level and leaf.served else leaf.elements / self.ratio(key, level, ratios)
            for key, leaf in self.leaves.items()
        )
        norms = (norm.elements * self._kept(norm, level) for norm in self.norms.values())
        factors = (f.elements * (f.bits if f.fixed else max(f.bits, finer)) / 2 for f in self.factors.values())
        return sum(leaves) + sum(norms) + sum(factors)

    def _kept(self, norm: Norm, level: int) -> float:
        """How many elements of 2 bits a norm keeps for each of its own: over columns two draws of some rows."""
        if level == Level.SAMPLED:
            return (1 + (norm.concentration > 0)) / norm.ratio
        return 1.0 if self.bits(norm, level) is None else FINE / 2
