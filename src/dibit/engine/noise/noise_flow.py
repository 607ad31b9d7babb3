"""How the noise that norms add to a gradient passes down a network, read off autograd's graph.

docs/gradient-error.md derives the formulas.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from torch import Tensor

from dibit._torch.private.autograd import sequence_number

# Share of a norm's noise that lies along x_hat of the next one (W^T W x is near to x): of rows, and over columns.
_ALIGNED, _ALIGNED_COLUMNS = 0.4, 0.15
_MOST = 1e12  # larger q are cut to this: the gradient is lost anyway
_COLUMNS = 0.3  # of S: what noise in the columns' means adds, times the variance and the norm's concentration


class Level(IntEnum):
    """What norms keep."""

    SAMPLED = 0  # some rows
    ALL = 1  # all rows
    FINE = 2  # all rows, in deep models at more bits next to the loss


@dataclass
class Leaf:
    """What is known of the gradients of weights that share an input.

    Attributes:
        noise: their variance from rows that are left out, at ratio 2; it is proportional to (ratio - 1).
        terms: S, the sum of the squares of their terms.
        along: the same for noise that is large in the rows where x is, as that of norms over columns tends to be.
        rounding: their variance from rounding, if all rows are kept; it is proportional to the ratio.
        signal: their square, without noise.
        sampled, all_rows, fine: q, the noise in dY over |dY|^2, that norms (and factors of fixed bits) add at each
            `Level`.
        sampled_factors, all_rows_factors, fine_factors: the part of q that other factors add, at the recipe's bits.
        elements: of the input; 0 where the rows kept do not depend on a ratio (features).
        most: the recipe's ratio.
        served: norms that keep all rows keep this input, too.
        outgoing: |dX|^2, the mean over the linear layers that read this input.
        by_columns: some norm on the way to it is over columns.
        uneven: the lengths of its rows differ so much that rows are chosen by |dY_n| |x_n|.
        missed: measured steps in a row in which this input was not kept.
    """

    noise: float = 0.0
    terms: float = 0.0
    along: float = 0.0
    rounding: float = 0.0
    signal: float = 0.0
    sampled: float = 0.0
    all_rows: float = 0.0
    fine: float = 0.0
    sampled_factors: float = 0.0
    all_rows_factors: float = 0.0
    fine_factors: float = 0.0
    elements: int = 0
    most: int = 1
    served: bool = False
    outgoing: float = 0.0
    by_columns: bool = False
    uneven: bool = False
    missed: int = 0

    def q(self, level: int, share: float = 1.0) -> float:
        """The noise in dY over the square of dY; `share`: of the factors' variance, what their bits leave."""
        factors = (self.sampled_factors, self.all_rows_factors, self.fine_factors)[level]
        return (self.sampled, self.all_rows, self.fine)[level] + share * factors

    def error(self, ratio: float, level: int, share: float = 1.0) -> float:
        """The squared error of the gradients."""
        own = self.noise * (ratio - 1) + self.rounding * ratio
        factors = self.q(level, share) - self.q(level, 0.0)
        return self.path_error(level) + factors * self.terms + (1 + self.q(level, share)) * own

    def path_error(self, level: int) -> float:
        """The part of the squared error that comes from noise which norms (and factors of fixed bits) add to dX."""
        return self.q(level, 0.0) * max(self.terms, self.along * self.by_columns)


@dataclass
class Norm:
    """What is known of one norm.

    Attributes:
        rho: the square of what it subtracts along x_hat over that of its dX.
        concentration: of its x_hat, where its statistics are those of columns: the sum of the squared eigenvalues of
            x_hat^T x_hat over their sum's square, from 1 / D (every direction alike) to 1; else 0.
        outgoing: the square of its dX.
        above: norms between it and the loss, at least.
        elements: of its input.
        ratio: the recipe's, for this number of rows.
        missed: measured steps in a row in which this norm did not run.
    """

    rho: float = 0.0
    concentration: float = 0.0
    outgoing: float = 0.0
    above: int = 0
    elements: int = 0
    ratio: int = 1
    missed: int = 0


@dataclass
class Factor:
    """What is known of a residual that multiplies the gradient element by element, such as a derivative.

    Attributes:
        variance: of it over its square, at the bits of its config.
        elements: of it.
        bits: of its config.
        fixed: it keeps these, whatever the error is.
        missed: measured steps in a row in which this residual was not kept.
    """

    variance: float = 0.0
    elements: int = 0
    bits: int = 2
    fixed: bool = False
    missed: int = 0


@dataclass
class _Flow:
    """The gradient on its way: noise over its square, and its square.

    Attributes:
        energy: its square as far as it is known, else 0.
        q: at each level of the norms; of rows.
        factors: the same of what factors of the recipe's bits have added.
        columns: the same of what is common to all rows.
        above: norms that it has passed at least.
    """

    energy: float = 0.0
    q: list[float] = field(default_factory=lambda: [0.0] * len(Level))
    factors: list[float] = field(default_factory=lambda: [0.0] * len(Level))
    columns: list[float] = field(default_factory=lambda: [0.0] * len(Level))
    above: int = 0

    def copy(self) -> _Flow:
        return _Flow(self.energy, [*self.q], [*self.factors], [*self.columns], self.above)

    def join(self, other: _Flow) -> None:
        """The sum of two gradients: their squares add up, and so do those of their noise.

        One whose square is not known, as of an output that the loss may not use, counts for nothing beside one whose
        is; of two such the noisier one counts.
        """
        both = bool(self.energy) == bool(other.energy)
        if not both and self.energy:
            return
        whole = self.energy + other.energy
        for own, more in ((self.q, other.q), (self.factors, other.factors), (self.columns, other.columns)):
            if whole:
                share = other.energy / whole
                own[:] = (a + share * (b - a) for a, b in zip(own, more, strict=True))
            else:
                own[:] = map(max, own, more)
        self.energy, self.above = whole, min(self.above, other.above) if both else other.above

    def times(self, factor: Factor) -> None:
        """Multiply by a factor, whose errors are independent: their relative variance adds to the noise."""
        noise = self.q if factor.fixed else self.factors
        noise[:] = (min(q + factor.variance, _MOST) for q in noise)

    def through(self, norm: Norm, variance: Callable[[Norm, Level], float]) -> None:
        """Pass a norm, which multiplies the noise and adds its own."""
        self.above += 1
        for level in Level:
            v = variance(norm, level)
            growth = 1 + v * (_ALIGNED_COLUMNS if norm.concentration else _ALIGNED)
            self.q[level] = min(self.q[level] * growth + v * norm.rho, _MOST)
            self.factors[level] = min(self.factors[level] * growth, _MOST)
            self.columns[level] += _COLUMNS * v * norm.concentration
        self.energy = norm.outgoing or self.energy


def pass_down(
    outputs: Iterable[Tensor],
    began: int,
    leaves: Mapping[str, Leaf],
    norms: Mapping[str, Norm],
    factors: Mapping[str, Factor],
    variance: Callable[[Norm, Level], float],
) -> None:
    """Set the noise on the way to each leaf, and how many norms lie above each norm, after a forward pass.

    Args:
        outputs: of the model.
        began: sequence number of autograd's nodes from which on they are looked at.
        leaves, norms, factors: by the names that the nodes have.
        variance: of what a norm keeps of x_hat, over its square.
    """
    flows: dict[Any, _Flow] = {}
    heap: list[tuple[int, int, Any]] = []
    numbers = itertools.count()

    def enter(node: Any, flow: _Flow) -> None:
        """Add what comes to a node from one of its users; a node is looked at after all of them."""
        if node in flows:
            flows[node].join(flow)
        else:
            flows[node] = flow.copy()
            heapq.heappush(heap, (-sequence_number(node), next(numbers), node))

    for x in outputs:
        if x.grad_fn is not None:
            enter(x.grad_fn, _Flow())
    reached: dict[str, list[float]] = {}
    by_columns: dict[str, bool] = {}
    while heap:
        node = heapq.heappop(heap)[2]
        flow = flows[node]
        own = getattr(node, "measured", "")
        key = own if isinstance(own, str) else ""  # an attribute of somebody else's
        if (leaf := leaves.get(key)) is not None:
            q = [*(a + b for a, b in zip(flow.q, flow.columns, strict=True)), *flow.factors]
            reached[key] = [max(a, b) for a, b in zip(reached.get(key, q), q, strict=True)]
            by_columns[key] = by_columns.get(key, False) or flow.columns[Level.ALL] > 0
            flow.energy = leaf.outgoing or flow.energy
        elif (norm := norms.get(key)) is not None:
            norm.above = flow.above
            flow.through(norm, variance)
        elif (factor := factors.get(key)) is not None:
            flow.times(factor)
        for following, _ in node.next_functions:
            if following is not None and sequence_number(following) >= began:
                enter(following, flow)
    for key, q in reached.items():
        leaf = leaves[key]
        leaf.by_columns = by_columns[key]
        leaf.sampled, leaf.all_rows, leaf.fine, leaf.sampled_factors, leaf.all_rows_factors, leaf.fine_factors = q
