r"""How many rows each residual keeps, chosen by the error that earlier passes have measured (`Config.noise`).

Two kinds of noise meet in a weight gradient :math:`dW = \sum_n dY_n^T x_n`, whose terms have the sum of squares
:math:`S = \sum_n |dY_n|^2 |x_n|^2`:

- of a *leaf*, the input x, which enters no other gradient: rows that are not kept, and rounding. Both are measured.
- of *path* residuals: what norms nearer to the loss have added to dY. If its square is q times that of dY, row by row,
  it adds q S. A norm whose residual has the variance v (one row of r: r - 1; 2 bits: 0.2) adds :math:`v \rho` to its
  dX, :math:`\rho` being the square of what it subtracts along :math:`\hat x` over that of dX, and multiplies what came
  by :math:`1 + v a`, a being the same share of the noise, of which more lies along :math:`\hat x` than of the gradient.
  So :math:`q_{k-1} = (1 + v a) q_k + v \rho_k` down the norms from the loss, on the quietest way where there are
  several. Norms over columns (BatchNorm) add noise in the columns' means besides, the same for all rows.

docs/gradient-error.md derives this. Where the sum would exceed the bound, more rows are kept: all of them by norms,
which then serve the linear layers behind them too, or more of those by linear layers, whichever takes fewer bytes.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dibit.config import Config, Sample

_EACH = 4  # first passes that are measured
_EVERY = 16  # of the later ones
_NEW = 0.5  # share of a new measurement in what is known
_BACK = 0.7  # norms are sampled again where less than so much of the bound would be reached
_PATH = 0.25  # share of the bound for what comes by the way of dX: it is known up to a power of the depth only
_MANY = 8  # passes before one step that are measured at most
_GONE = 4  # what so many measured steps have not had is forgotten
_FEW = 3  # norms of a model that are sampled as long as nothing is known
_FIRST = 2  # ratio of linear inputs in a model of more, as long as nothing is known
_BLOCK = 128  # elements a range, of a norm that keeps all rows
_ROUNDED = 0.2  # variance of a normalised input at 2 bits with dither
_ALIGNED = 0.15  # share of a norm's noise that lies along x_hat of the next one: W^T W x is near to x
_MOST = 1e12  # q beyond which all is lost
_COLUMNS = 0.01  # of S: what noise in the columns' means adds, times (ratio - 1)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)


def norms_of(model: nn.Module) -> int:
    """How many norms are among the modules of a model."""
    return sum(isinstance(module, _NORMS) for module in model.modules())


def whole(config: Config) -> Config:
    """The codec of a norm's input that keeps all rows."""
    return replace(config, reduce=None, block=_BLOCK)


@dataclass
class Leaf:
    """What is known of the gradients of weights that share an input.

    Attributes:
        noise: their variance by rows that are left out, at one row of two: it grows with (ratio - 1).
        terms: S, the sum of the squares of their terms.
        rounding: their variance by rounding where all rows are kept: it grows with the ratio.
        signal: their square, without noise.
        sampled, quiet: q of their dY, where norms are sampled and where they keep all rows.
        elements: of the input; 0 where the rows kept do not depend on a ratio (features).
        most: the recipe's ratio.
        served: norms that keep all rows keep this input, too.
    """

    noise: float = 0.0
    terms: float = 0.0
    rounding: float = 0.0
    signal: float = 0.0
    sampled: float = 0.0
    quiet: float = 0.0
    elements: int = 0
    most: int = 1
    served: bool = False
    missed: int = 0  # steps in a row that were measured, but this was not there

    def error(self, ratio: float, quiet: bool) -> float:
        """The squared error of the gradients."""
        q = self.quiet if quiet else self.sampled
        return q * self.terms + (1 + q) * (self.noise * (ratio - 1) + self.rounding * ratio)


@dataclass
class Norm:
    """What is known of one norm.

    Attributes:
        rho: the square of what it subtracts along x_hat over that of its dX.
        columns: its statistics are those of columns.
        elements: of its input.
        ratio: the recipe's, for so many rows.
    """

    rho: float = 0.0
    columns: bool = False
    elements: int = 0
    ratio: int = 1
    missed: int = 0


@dataclass
class RowPlan:
    """The plan of one model.

    Attributes:
        bound: on the squared error of the gradient over its square; 0: nothing is measured.
        leaves, norms: by residual and by norm.
        ratios: by residual, rows of which one is kept, where that is not the recipe's.
        quiet: norms keep all rows; `None`: not decided.
        passes: after which an optimiser has stepped.
    """

    bound: float = 0.0
    leaves: dict[str, Leaf] = field(default_factory=dict)
    norms: dict[str, Norm] = field(default_factory=dict)
    ratios: dict[str, int] = field(default_factory=dict)
    quiet: bool | None = None
    passes: int = 0
    _count: int = 0  # norms among the model's modules, once they were counted
    _pending: dict[str, tuple[float, ...]] = field(default_factory=dict)
    _walks: int = 0  # since the last step

    def expect(self, config: Config | None) -> None:
        """A module has this config: the least bound of all counts."""
        if config is not None and config.noise is not None:
            self.bound = min(self.bound or config.noise, config.noise)

    @property
    def measures(self) -> bool:
        """Whether the pass that runs is to be measured; of many passes before one step, the first ones are."""
        return self._walks < _MANY and (self.passes < _EACH or self.passes % _EVERY == 0)

    def measured(self, key: str, values: tuple[float, ...]) -> None:
        """Take in a measurement; those before one step of an optimiser add up."""
        if all(map(math.isfinite, values)):
            old = self._pending.get(key, (0.0,) * len(values))
            self._pending[key] = tuple(a + b for a, b in zip(old, values, strict=True))

    def norm_config(self, key: str, config: Config, shape: torch.Size, columns: bool, model: nn.Module) -> Config:
        """The codec of a norm's input (..., D) in a model."""
        if not isinstance(config.reduce, Sample):
            return config
        ratio = config.reduce.of(shape[:-1].numel()).ratio
        norm = self.norms.setdefault(key, Norm())
        norm.columns, norm.elements, norm.ratio = columns, shape.numel(), ratio
        quiet = self.deep(model) if self.quiet is None else self.quiet
        return whole(config) if quiet else config

    def deep(self, model: nn.Module) -> bool:
        """Whether a model has so many norms that they keep all rows as long as nothing is known."""
        if not self._count:
            self._count = norms_of(model)
        return self._count > _FEW

    def unmeasured(self, config: Config | None, model: nn.Module) -> Config | None:
        """A config for passes in which nothing is measured: compiled ones."""
        if config is None or config.noise is None or config.norm is None or not self.deep(model):
            return config
        return replace(config, norm=whole(config.norm))

    def leaf_config(self, key: str, config: Config, shape: torch.Size, served: bool, model: nn.Module) -> Config:
        """The codec of a linear layer's input (..., D) in a model."""
        if not isinstance(config.reduce, Sample):
            return config
        leaf = self.leaves.setdefault(key, Leaf())
        leaf.elements, leaf.most = shape.numel(), config.reduce.of(shape[:-1].numel()).ratio
        leaf.served = served or (leaf.served and not self.quiet)
        first = _FIRST if self.quiet is None and self.deep(model) else leaf.most
        ratio = min(self.ratios.get(key, first), leaf.most)
        return replace(config, reduce=replace(config.reduce, ratio=ratio))

    def walk(self, outputs: Iterable[Tensor], began: int) -> None:
        """Read off a finished forward pass how much noise norms add on the way to each leaf.

        Args:
            began: sequence number of autograd's nodes from which on they are of this pass.
        """
        self._walks += 1
        for quiet in (False, True):
            reached: dict[str, float] = {}
            best: dict[Any, float] = {x.grad_fn: 0.0 for x in outputs if x.grad_fn is not None}
            heap = [(0.0, number, node, 0.0) for number, node in enumerate(best)]
            numbers = itertools.count(len(heap))
            done: set[Any] = set()
            while heap:
                here, _, node, columns = heapq.heappop(heap)
                if node in done:
                    continue
                done.add(node)
                own = getattr(node, "measured", "")
                key = own if isinstance(own, str) else ""  # an attribute of somebody else's
                if key in self.leaves:
                    reached[key] = max(reached.get(key, 0.0), here + columns)
                elif (norm := self.norms.get(key)) is not None:
                    variance = _ROUNDED if quiet else norm.ratio - 1
                    here = min(here * (1 + variance * _ALIGNED) + variance * norm.rho, _MOST)
                    columns += _COLUMNS * variance * norm.columns
                for following, _ in node.next_functions:
                    if following is None or following._sequence_nr() < began:
                        continue
                    if here < best.get(following, math.inf):
                        best[following] = here
                        heapq.heappush(heap, (here, next(numbers), following, columns))
            for key, q in reached.items():
                setattr(self.leaves[key], "quiet" if quiet else "sampled", q)

    def predicted(self, quiet: bool, ratios: Mapping[str, int] | None = None) -> float:
        """The squared error of the gradient over its square."""
        ratios = self.ratios if ratios is None else ratios
        return self._relative(
            sum(leaf.error(self._ratio(key, quiet, ratios), quiet) for key, leaf in self.leaves.items())
        )

    def _path(self) -> float:
        """The part of the error that comes by the way of dX, where norms are sampled."""
        return self._relative(sum(leaf.sampled * leaf.terms for leaf in self.leaves.values()))

    @property
    def _signal(self) -> float:
        """The square of the gradient."""
        return sum(leaf.signal for leaf in self.leaves.values())

    def _relative(self, error: float) -> float:
        signal = self._signal
        return error / signal if signal > 0 else math.inf if error > 0 else 0.0

    def _ratio(self, key: str, quiet: bool, ratios: Mapping[str, int]) -> int:
        leaf = self.leaves[key]
        return 1 if not leaf.elements or (quiet and leaf.served) else min(leaf.most, ratios.get(key, leaf.most))

    def decide(self) -> None:
        """Choose, after an optimiser's step."""
        self.passes += 1
        self._walks = 0
        if not self._pending or not self.bound:
            return
        for key, values in self._pending.items():
            if len(values) == 2:
                self._learn(self.norms.setdefault(key, Norm()), rho=values[0] / values[1] if values[1] > 0 else 0.0)
            else:
                leaf = self.leaves.setdefault(key, Leaf())
                noise, terms, rounding, signal, sampled = values
                if not sampled and leaf.terms > 0:  # rows by their gradients make less noise than any rows would
                    noise = terms * min(1.0, leaf.noise / leaf.terms)
                self._learn(leaf, noise=noise, terms=terms, rounding=rounding, signal=signal)
        self._forget()
        self._pending.clear()
        if self.passes < 3:
            return  # how the norms lie behind one another was read off before they were measured
        choices = []
        for quiet in (False, True):
            bound = self.bound * (_BACK if self.quiet and not quiet else 1.0)
            ratios = self._within(bound, quiet)
            error = self.predicted(quiet, ratios)
            beyond = error > bound or (not quiet and self._path() > _PATH * bound)
            choices.append((beyond, error if beyond else self._bytes(quiet, ratios), not quiet, ratios))
        _, _, sampled, self.ratios = min(choices, key=lambda choice: choice[:3])  # fewest bytes, or least error
        self.quiet = not sampled

    def state_dict(self) -> dict[str, Tensor]:
        """All that is known, float64 tensors by the kind and name of what it is known of."""
        quiet = -1.0 if self.quiet is None else float(self.quiet)
        tables: dict[str, Iterable[float]] = {"plan": (quiet, float(self.passes))}
        tables |= {f"leaf/{key}": map(float, asdict(leaf).values()) for key, leaf in self.leaves.items()}
        tables |= {f"norm/{key}": map(float, asdict(norm).values()) for key, norm in self.norms.items()}
        tables |= {f"ratio/{key}": (float(ratio),) for key, ratio in self.ratios.items()}
        tables |= {f"seen/{key}": values for key, values in self._pending.items()}
        return {key: torch.tensor(list(values), dtype=torch.float64) for key, values in tables.items()} if self else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state_dict` gave; the bound stays that of the configs."""
        vars(self).update({**vars(RowPlan()), "bound": self.bound})
        for name, values in ((name, table.tolist()) for name, table in state.items()):
            kind, _, key = name.partition("/")
            if kind == "plan":
                quiet, passes = values
                self.quiet, self.passes = None if quiet < 0 else bool(quiet), int(passes)
            elif kind == "leaf":
                self.leaves[key] = _filled(Leaf(), values)
            elif kind == "norm":
                self.norms[key] = _filled(Norm(), values)
            elif kind == "ratio":
                self.ratios[key] = int(values[0])
            else:
                self._pending[key] = tuple(values)

    def __bool__(self) -> bool:
        """Whether there is anything to know: some config asks for a bound."""
        return bool(self.bound)

    def _forget(self) -> None:
        """Drop what is not coming back: a part that is no longer used, a weight that was frozen."""
        tables: tuple[dict[str, Any], ...] = (self.leaves, self.norms)
        for table in tables:
            for key, known in list(table.items()):
                known.missed = 0 if key in self._pending else known.missed + 1
                if known.missed >= _GONE:
                    del table[key]
                    self.ratios.pop(key, None)

    def _learn(self, what: Leaf | Norm, **measured: float) -> None:
        share = _NEW if (what.terms if isinstance(what, Leaf) else what.rho) else 1.0
        for name, value in measured.items():
            old = getattr(what, name)
            setattr(what, name, old + share * (value - old))

    def _within(self, bound: float, quiet: bool) -> dict[str, int]:
        """The ratios of least bytes whose error is within a bound, or as near to it as may be."""
        signal = self._signal
        free = {key: leaf for key, leaf in self.leaves.items() if self._ratio(key, quiet, {}) > 1}
        fixed = sum(leaf.error(1, quiet) for key, leaf in self.leaves.items() if key not in free)

        def ratios(price: float) -> dict[str, int]:
            """Where a byte less would cost more error than `price`, the ratio is as small as that asks for."""
            chosen = {}
            for key, leaf in free.items():
                slope = leaf.error(2, quiet) - leaf.error(1, quiet)
                best = math.sqrt(price * leaf.elements / slope) if slope > 0 else math.inf
                chosen[key] = int(max(1, min(leaf.most, best)))
            return chosen

        def error(chosen: Mapping[str, int]) -> float:
            return fixed + sum(leaf.error(chosen[key], quiet) for key, leaf in free.items())

        if error({key: leaf.most for key, leaf in free.items()}) <= bound * max(signal, 0.0):
            return {}
        if signal <= 0:
            return dict.fromkeys(free, 1)  # nothing but noise was seen
        low, high = -60.0, 60.0  # powers of e around error per element
        scale = sum(leaf.terms for leaf in free.values()) / max(1, sum(leaf.elements for leaf in free.values()))
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if error(ratios(scale * math.exp(middle))) <= bound * signal else (low, middle)
        return ratios(scale * math.exp(low))

    def _bytes(self, quiet: bool, ratios: Mapping[str, int]) -> float:
        """Of what is kept, in elements."""
        leaves = (
            0.0 if quiet and leaf.served else leaf.elements / self._ratio(key, quiet, ratios)
            for key, leaf in self.leaves.items()
        )
        norms = (norm.elements / (1 if quiet else norm.ratio / (1 + norm.columns)) for norm in self.norms.values())
        return sum(leaves) + sum(norms)


def _filled(known: Any, values: list[float]) -> Any:
    """A `Leaf` or `Norm` with these values, in the order of its fields."""
    for (name, old), value in zip(asdict(known).items(), values, strict=True):
        setattr(known, name, type(old)(value))
    return known
