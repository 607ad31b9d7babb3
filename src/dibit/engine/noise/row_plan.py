r"""How many rows each residual keeps, chosen by the error that earlier passes have measured (`Config.noise`).

Three kinds of noise meet in a weight gradient :math:`dW = \sum_n dY_n^T x_n`, whose terms have the sum of squares
:math:`S = \sum_n |dY_n|^2 |x_n|^2`:

- of a *leaf*, the input x, which enters no other gradient: rows that are not kept, and rounding. Both are measured.
- of norms, *path* residuals: what those nearer to the loss have added to dY. If its square is q times that of dY,
  row by row, it adds q S. A norm whose residual has the variance v (one row of r: r - 1; 2 bits: 0.2) adds
  :math:`v \rho` to its dX, :math:`\rho` being the square of what it subtracts along :math:`\hat x` over that of dX. It
  multiplies what came by :math:`1 + v a`, a being the same share of the noise, of which more lies along
  :math:`\hat x` than of the gradient. So :math:`q_{k-1} = (1 + v a) q_k + v \rho_k` down the norms from the loss. Where
  gradients meet (h + f(h)), their squares add up, and so do those of the noise. Norms over columns (BatchNorm) add
  noise in the columns' means besides, the same for all rows: the more of it the fewer directions the rows of
  :math:`\hat x` spread over, as where neighbours have been averaged often.
- of *factors*, which multiply the gradient element by element, such as derivatives of smooth activations: their
  variance over their square adds to q.

docs/gradient-error.md derives this. Where the sum would exceed the bound, more rows are kept: all of them by norms,
which then serve the linear layers behind them too, or more of those by linear layers, whichever takes fewer bytes.
The predicted noise in dX is uncertain by a factor that grows with depth. So it may use only a quarter of the bound
(`_PATH`); in deep models the norms next to the loss, whose noise passes through all others, then keep 4 bits.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dibit._torch.private.modules import NORMS
from dibit.config import Config, Sample
from dibit.engine.noise.noise_flow import Factor, Leaf, Level, Norm, pass_down
from dibit.engine.noise.prediction import DEEP, NEAR_OPTIMAL, Prediction

FIRST_MEASURED = 4  # first passes that are measured
# Steps between later measurements: at first and after the predicted error has changed; at most.
_FIRST_INTERVAL, _LAST_INTERVAL = 4, 16
_CHANGED = 1.25  # factor in the error that is a change
_NEW, _LATER = 0.5, 0.75  # share of a new measurement in what is known: of the first ones, and of later ones
_BACK = 0.7  # return to fewer rows or bits only if the error is then below this share of the bound
_PATH = 0.25  # share of the bound for noise in dX: its prediction is uncertain by a factor that grows with depth
_MANY = 64  # at most this many passes before one step are measured
_FORGET_AFTER_STEPS = 4  # forget a residual that was absent from this many measured steps
_MAX_SAMPLED_NORMS = 3  # models with at most this many norms sample rows before the first measurement
_FIRST_LEAF_RATIO = 2  # before it, linear inputs of models with more norms keep one row of this many
_BLOCK = 128  # elements that share a range, in a norm that keeps all rows
# If mean(|x_n|^2) / mean(|x_n|)^2 exceeds this, rows are chosen by |dY_n| |x_n| instead of |dY_n|.
UNEVEN = 1.3
_SPREAD = 0.035  # a norm's concentration before the first measurement
_FINER = (4, 8)  # bits of factors to choose from if the recipe's make too much noise
_OF_LEAF, _OF_NORM, _OF_FACTOR = 8, 4, 2  # numbers of a measurement
_TERMS = 1  # place of S among a leaf's


def norms_of(model: nn.Module) -> int:
    """How many norms are among the modules of a model."""
    return sum(isinstance(module, NORMS) or type(module).__name__ == "LayerNorm" for module in model.modules())


def all_rows_config(config: Config, bits: int | None = None) -> Config:
    """The codec of a norm's input that keeps all rows."""
    return replace(config, reduce=None, block=_BLOCK, bits=bits or config.bits)


@dataclass
class RowPlan:
    """The plan of one model.

    Attributes:
        bound: on the squared error of the gradient over its square; 0: nothing is measured.
        leaves, norms, factors: by the name of the residual or norm.
        ratios: by residual, its ratio (one row of this many is kept), if that is not the recipe's.
        level: what norms keep; `None`: not decided.
        finer: bits of factors at least; 0: the recipe's.
        passes: steps of the optimiser so far.
        due: the step that is measured next.
        apart: steps from one measurement to the next; fewer while the error changes.
    """

    bound: float = 0.0
    leaves: dict[str, Leaf] = field(default_factory=dict)
    norms: dict[str, Norm] = field(default_factory=dict)
    factors: dict[str, Factor] = field(default_factory=dict)
    ratios: dict[str, int] = field(default_factory=dict)
    level: Level | None = None
    finer: int = 0
    passes: int = 0
    due: int = 0
    apart: int = _FIRST_INTERVAL
    _count: int = 0  # norms among the model's modules, once they were counted
    _pending: dict[str, tuple[float, ...]] = field(default_factory=dict)
    _walks: int = 0  # since the last step
    _since: int | None = None  # the first of autograd's nodes since then

    def expect(self, config: Config | None) -> None:
        """A module has this config: the least bound of all counts."""
        if config is not None and config.noise is not None:
            self.bound = min(self.bound or config.noise, config.noise)

    @property
    def measures(self) -> bool:
        """Whether the pass that runs is to be measured; of many passes before one step, the first ones are."""
        return self._walks < _MANY and self.passes >= self.due

    def measured(self, key: str, values: tuple[float, ...]) -> None:
        """Take in a measurement; those before one step of an optimiser add up."""
        if all(map(math.isfinite, values)):
            old = self._pending.get(key, (0.0,) * len(values))
            self._pending[key] = tuple(a + b for a, b in zip(old, values, strict=True))

    def norm_config(self, key: str, config: Config, shape: torch.Size, columns: bool, model: nn.Module) -> Config:
        """The codec of a norm's input (..., D) in a model."""
        if not isinstance(config.reduce, Sample):
            return config
        ratio = config.reduce.resolve(shape[:-1].numel()).ratio
        norm = self.norms.setdefault(key, Norm())
        norm.elements, norm.ratio = shape.numel(), ratio
        norm.concentration = (norm.concentration or _SPREAD) if columns else 0.0
        level = self.level
        if level is None:
            level = Level.ALL if self.deep(model) else Level.SAMPLED
        if level is Level.SAMPLED:
            return config
        return all_rows_config(config, self.prediction.bits(norm, level))

    @property
    def prediction(self) -> Prediction:
        """Errors and bytes at every choice, by what is known now."""
        return Prediction(self.leaves, self.norms, self.factors)

    def deep(self, model: nn.Module) -> bool:
        """Whether a model has more than `_MAX_SAMPLED_NORMS` norms: they keep all rows before the first measurement."""
        if not self._count:
            self._count = norms_of(model)
        return self._count > _MAX_SAMPLED_NORMS

    def unmeasured(self, config: Config | None, model: nn.Module) -> Config | None:
        """A config for passes in which nothing is measured: compiled ones."""
        if config is None or config.noise is None or config.norm is None or not self.deep(model):
            return config
        return replace(config, norm=all_rows_config(config.norm))

    def factor_config(self, key: str, config: Config, elements: int, fixed: bool) -> Config:
        """The codec of what multiplies the gradient element by element."""
        factor = self.factors.setdefault(key, Factor())
        factor.elements, factor.bits, factor.fixed = elements, config.bits, fixed
        if fixed or self.finer <= config.bits:
            return config
        return replace(config, bits=self.finer, levels="uniform")

    def leaf_config(self, key: str, config: Config, shape: torch.Size, served: bool, model: nn.Module) -> Config:
        """The codec of a linear layer's input (..., D) in a model."""
        if not isinstance(config.reduce, Sample):
            return config
        leaf = self.leaves.setdefault(key, Leaf())
        leaf.elements, leaf.most = shape.numel(), config.reduce.resolve(shape[:-1].numel()).ratio
        leaf.served = served or (leaf.served and not self.level)
        first = _FIRST_LEAF_RATIO if self.level is None and self.deep(model) else leaf.most
        ratio = min(self.ratios.get(key, first), leaf.most)
        return replace(config, reduce=replace(config.reduce, ratio=ratio))

    def walk(self, outputs: Iterable[Tensor], began: int) -> None:
        """Read off a finished forward pass how noisy the gradient of each leaf is; see `pass_down`.

        Where parts of a model are called one after the other, the pass of the last one goes down through all.
        """
        self._walks += 1
        self._since = began if self._since is None else min(began, self._since)
        pass_down(outputs, self._since, self.leaves, self.norms, self.factors, self.prediction.variance)

    def predicted(self, level: int | None = None, ratios: Mapping[str, int] | None = None) -> float:
        """The squared error of the gradient over its square, at a level of the norms (by default the one chosen)."""
        level = self.level or Level.SAMPLED if level is None else level
        prediction = self.prediction
        error = prediction.error(level, self.ratios if ratios is None else ratios, prediction.share(self.finer))
        return error / prediction.signal if prediction.signal > 0 else math.inf if error > 0 else 0.0

    def decide(self) -> None:
        """Choose, after an optimiser's step."""
        self._walks, self._since = 0, None
        was_due = self.passes >= self.due
        self.passes += 1
        measured = bool(self._pending and self.bound)
        if measured:
            self._take_in()
        if was_due:
            self.due = self.passes + (0 if self.passes < FIRST_MEASURED else self.apart - 1)
        if measured and self.passes >= 3:  # before, how the norms lie behind one another was not measured
            self._choose()

    def _take_in(self) -> None:
        """Learn what was measured since the last step, and whether it has changed."""
        before = self.predicted()
        self._rescale()
        for key, values in self._pending.items():
            if len(values) == _OF_FACTOR:
                noise, square = values
                self._learn(self.factors.setdefault(key, Factor()), variance=noise / square if square > 0 else 0.0)
            elif len(values) == _OF_NORM:
                part, whole, concentration, times = values
                norm = self.norms.setdefault(key, Norm())
                self._learn(norm, rho=part / whole if whole > 0 else 0.0, outgoing=whole / times)
                norm.concentration = concentration / times
            else:
                leaf = self.leaves.setdefault(key, Leaf())
                noise, terms, rounding, signal, sampled, outgoing, users, along = values
                if not sampled and leaf.terms > 0:  # rows by their gradients make less noise than any rows would
                    noise = terms * min(1.0, leaf.noise / leaf.terms)
                outgoing /= users or 1
                self._learn(
                    leaf, noise=noise, terms=terms, along=along, rounding=rounding, signal=signal, outgoing=outgoing
                )
        self._forget()
        self._pending.clear()
        steady = before / _CHANGED <= self.predicted() <= before * _CHANGED
        self.apart = min(_LAST_INTERVAL, max(_FIRST_INTERVAL, self.passes // 4)) if steady else _FIRST_INTERVAL

    def _choose(self) -> None:
        """Choose level and ratios: the fewest bytes within the bound or, out of reach, near the least error."""
        prediction = self.prediction
        whole = self.bound * max(0.0, prediction.signal)
        levels = list(Level) if prediction.depth >= DEEP else [Level.SAMPLED, Level.ALL]
        bits = [0, *_FINER] if any(factor.variance for factor in self.factors.values() if not factor.fixed) else [0]
        within, beyond = [], []
        for level, finer in itertools.product(levels, bits):
            less = (self.level is not None and level < self.level) or finer < self.finer
            bound, share = whole * (_BACK if less else 1.0), prediction.share(finer)
            ratios = prediction.within(bound, level, share)
            error, path = prediction.error(level, ratios, share), prediction.path(level)
            choice = prediction.elements(level, ratios, finer), -level, finer, ratios
            if error <= bound and (level is levels[-1] or path <= _PATH * bound):
                within.append(choice)
            beyond.append((max(error, path / _PATH), choice))
        if not within:
            least = min(error for error, _ in beyond)
            within = [choice for error, choice in beyond if error <= NEAR_OPTIMAL * least]
        _, chosen, self.finer, self.ratios = min(within, key=lambda choice: choice[:3])
        self.level = Level(-chosen)

    def state_dict(self) -> dict[str, Tensor]:
        """All that is known, float64 tensors by the kind and name of what it is known of."""
        level = -1.0 if self.level is None else float(self.level)
        tables: dict[str, Iterable[float]] = {
            "plan": (level, *map(float, (self.finer, self.passes, self.due, self.apart)))
        }
        tables |= {f"leaf/{key}": map(float, asdict(leaf).values()) for key, leaf in self.leaves.items()}
        tables |= {f"norm/{key}": map(float, asdict(norm).values()) for key, norm in self.norms.items()}
        tables |= {f"factor/{key}": map(float, asdict(factor).values()) for key, factor in self.factors.items()}
        tables |= {f"ratio/{key}": (float(ratio),) for key, ratio in self.ratios.items()}
        tables |= {f"seen/{key}": values for key, values in self._pending.items()}
        return {key: torch.tensor(list(values), dtype=torch.float64) for key, values in tables.items()} if self else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state_dict` gave; the bound stays that of the configs.

        What does not fit, as from another version, is forgotten, with a warning: it is measured anew.
        """
        vars(self).update({**vars(RowPlan()), "bound": self.bound})
        for name, values in ((name, table.tolist()) for name, table in state.items()):
            try:
                self._take(*name.partition("/")[::2], values)
            except (ValueError, OverflowError):
                warnings.warn(
                    f"dibit: the choice of rows in these scores is damaged or another version's (rows/{name} has "
                    f"{len(values)} numbers); it is measured anew.",
                    stacklevel=3,
                )
                vars(self).update({**vars(RowPlan()), "bound": self.bound})
                return

    def _take(self, kind: str, key: str, values: list[float]) -> None:
        """One table of a state.

        Raises:
            ValueError, OverflowError: it does not fit.
        """
        if not all(map(math.isfinite, values)):
            raise ValueError
        if kind == "plan":
            level, *counts = values
            self.level = None if level < 0 else Level(int(level))
            self.finer, self.passes, self.due, self.apart = map(int, counts)
        elif kind == "leaf":
            self.leaves[key] = _filled(Leaf(), values)
        elif kind == "norm":
            self.norms[key] = _filled(Norm(), values)
        elif kind == "factor":
            self.factors[key] = _filled(Factor(), values)
        elif kind == "ratio":
            (ratio,) = values
            self.ratios[key] = max(1, int(ratio))
        elif len(values) in (_OF_LEAF, _OF_NORM, _OF_FACTOR):
            self._pending[key] = tuple(values)
        else:
            raise ValueError

    def __bool__(self) -> bool:
        """Whether there is anything to know: some config asks for a bound."""
        return bool(self.bound)

    def _forget(self) -> None:
        """Forget residuals that are no longer kept: of a part that is not used any more, of a frozen weight."""
        tables: tuple[dict[str, Any], ...] = (self.leaves, self.norms, self.factors)
        for table in tables:
            for key, known in list(table.items()):
                known.missed = 0 if key in self._pending else known.missed + 1
                if known.missed >= _FORGET_AFTER_STEPS:
                    del table[key]
                    self.ratios.pop(key, None)

    def _rescale(self) -> None:
        """Bring what is known to the size of the gradient just measured: squares shrink by powers of ten in training,
        and what counts is their ratios. S tells its size best: it is a sum of squares, without a difference."""
        both = [key for key in self._pending if key in self.leaves]
        old, new = sum(self.leaves[key].terms for key in both), sum(self._pending[key][_TERMS] for key in both)
        if not (old > 0 and new > 0):
            return
        scale = new / old
        for leaf in self.leaves.values():
            for name in ("noise", "terms", "along", "rounding", "signal", "outgoing"):
                setattr(leaf, name, scale * getattr(leaf, name))
        for norm in self.norms.values():
            norm.outgoing *= scale

    def _learn(self, what: Leaf | Norm | Factor, **measured: float) -> None:
        new = _NEW if self.passes <= FIRST_MEASURED else _LATER
        known = what.terms if isinstance(what, Leaf) else what.rho if isinstance(what, Norm) else what.variance
        share = new if known else 1.0
        for name, value in measured.items():
            old = getattr(what, name)
            setattr(what, name, old + share * (value - old))


def _filled(known: Any, values: list[float]) -> Any:
    """A `Leaf` or `Norm` with these values, in the order of its fields."""
    for (name, old), value in zip(asdict(known).items(), values, strict=True):
        setattr(known, name, type(old)(value))
    return known
