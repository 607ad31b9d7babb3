"""What is kept, and how: `Config`, and its reductions."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch

BITS = (1, 2, 4, 8)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error sentence: what was probably meant, and what there is."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return (f"did you mean {close[0]!r}? " if close else "") + "the known names are " + ", ".join(map(repr, known))


@dataclass(frozen=True)
class Project:
    r"""Random projection of the columns (EXACT, section 3): :math:`H P`, :math:`P \in \{\pm 1/\sqrt R\}^{D \times R}`.

    `P` is drawn again from the seed wherever it is needed, so it is never stored.

    Args:
        ratio: D / R, the number of columns that become one.
    """

    ratio: int = 8

    def __post_init__(self) -> None:
        _positive("Project.ratio", self.ratio)


@dataclass(frozen=True)
class Sample:
    r"""A part of the rows (nodes), each scaled by 1 / its probability: unbiased, ceil(N / ratio) rows, at least one.

    Args:
        ratio: N / rows kept, at least 1.
        by: with which probability :math:`\pi_n` a row is kept.

            `"uniform"`: one row of every `ratio` consecutive ones, drawn again from the seed, so nothing is stored.

            `"norm"`: :math:`\pi_n \propto |x_n|`, systematic sampling. One byte a row is kept, of which the rows are
            drawn again.

            `"gradient"`: :math:`\pi_n \propto |dY_n|` of the last step, the optimum for a weight gradient
            :math:`dY^T X` whose inputs are of similar size. One byte a row lives on between steps; before there are
            any, `"norm"`. Inputs of linear layers and the statistics of norm layers have such gradients; where a
            residual has none of its own, `"uniform"`.
        least: keep at least about this many rows, or all if there are fewer. The sampling error averages out over the
            kept rows, so small graphs and batches must keep a larger share.
    """

    ratio: int = 8
    by: Literal["uniform", "norm", "gradient"] = "uniform"
    least: int = 1

    def __post_init__(self) -> None:
        _positive("Sample.ratio", self.ratio)
        _choice("Sample.by", self.by, ("uniform", "norm", "gradient"))
        _positive("Sample.least", self.least)

    def resolve(self, rows: int) -> Sample:
        """What is done to a matrix of so many rows: a whole number of them for each row kept."""
        return self if self.least == 1 else Sample(max(1, int(min(self.ratio, rows // self.least))), self.by)


@dataclass(frozen=True)
class Rows:
    """A block of whole rows: i-EXACT's G / R, whose experiments never take more than 1,024 elements.

    Args:
        count: rows of the reduced matrix that share one range (G / R).
        most: no block has more elements than this.
    """

    count: int = 1
    most: int | None = None

    def __post_init__(self) -> None:
        _positive("Rows.count", self.count)
        if self.most is not None:
            _positive("Rows.most", self.most)

    def __str__(self) -> str:
        text = "row" if self.count == 1 else f"{self.count} rows"
        return text if self.most is None else f"{text}, at most {self.most}"


@dataclass(frozen=True)
class Config:
    """How a residual is reduced, quantised and packed, and what of a layer is kept at all.

    Args:
        bits: bits an element: 1, 2, 4 or 8.
        block: elements that share one range; `"row"` takes each row for a block (EXACT), `Rows(n)` n rows (i-EXACT's
            G / R), `"tensor"` everything.
        reduce: `None`, `Project(ratio)` or `Sample(ratio)`, before quantisation.
        levels: `"uniform"`; `"normal"`, the levels of least expected variance for a clipped normal
            (i-EXACT, section 3.2); or 2**bits increasing numbers from 0 to 2**bits - 1.
        stats: dtype in which a block's range is stored, `torch.bfloat16` or `torch.float32`.
        rounding: `"stochastic"` (unbiased); `"dither"`: the same codes, but the decoder subtracts the random numbers
            that rounded them: unbiased, half the variance on dense data (uniform levels only); `"nearest"` (biased).
        norm: the codec for the normalised input of a norm layer, which enters gradients of what comes before it.
            `None`: the codec above without its reduction.
        dropout: `"seed"` keeps nothing of a dropout mask and draws it again: Dibit draws the mask itself, and each
            dropout takes one number from torch's generator. `"mask"` keeps 1 bit an element of the mask that torch
            drew.
        inputs: `"reference"`: tensors the caller holds anyway (features) are kept by reference, exact and free;
            `"compress"`: they are treated like any other activation, as the papers do.
        noise: a bound on the squared error of the gradient over its square. The ratios of `Sample` above are then the
            most that is left out: after the first steps, more rows are kept where the error that was measured asks for
            it (`dibit.engine.noise.row_plan`). `None`: the ratios hold whatever the error is.
        lossless: nothing is rounded or left out, and the gradient is the plain one up to the order of summation. What
            is saved comes from masks of 1 bit, narrow indices, and tensors that are computed again. Of the settings
            above, `dropout` alone then has a meaning.
    """

    bits: int = 2
    block: int | Literal["row", "tensor"] | Rows = 1024
    reduce: Project | Sample | None = None
    levels: Literal["uniform", "normal"] | tuple[float, ...] = "uniform"
    stats: torch.dtype = torch.bfloat16
    rounding: Literal["stochastic", "dither", "nearest"] = "stochastic"
    norm: Config | None = None
    dropout: Literal["seed", "mask"] = "seed"
    inputs: Literal["reference", "compress"] = "reference"
    noise: float | None = None
    lossless: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits = {self.bits!r} was given; choose one of 1, 2, 4, 8.")
        if self.block not in ("row", "tensor") and not isinstance(self.block, Rows):
            _positive("block", self.block, " (elements that share a range), 'row', 'tensor' or dibit.Rows(n)")
        if not (self.reduce is None or isinstance(self.reduce, Project | Sample)):
            raise TypeError(f"reduce = {self.reduce!r} was given; expected None, Project(ratio) or Sample(ratio).")
        _choice("rounding", self.rounding, ("stochastic", "dither", "nearest"))
        _choice("dropout", self.dropout, ("seed", "mask"))
        _choice("inputs", self.inputs, ("reference", "compress"))
        if self.stats not in (torch.bfloat16, torch.float32):
            raise ValueError(f"stats = {self.stats} was given; choose torch.bfloat16 or torch.float32.")
        if self.norm is not None and not isinstance(self.norm, Config):
            raise TypeError(f"norm = {self.norm!r} was given; expected None or a dibit.Config.")
        if self.noise is not None and not (isinstance(self.noise, int | float) and 0 < self.noise < math.inf):
            raise ValueError(f"noise = {self.noise!r} was given; expected a number above 0, or None for no bound.")
        self._check_levels()
        if self.rounding == "dither" and self.levels != "uniform":
            raise ValueError("rounding='dither' needs levels='uniform'; use rounding='stochastic' with other levels.")

    def block_size(self, rows: int, width: int) -> int:
        """Elements that share one range in a reduced matrix of this size (G; at least 1)."""
        match self.block:
            case "tensor":
                return max(1, rows * width)
            case "row":
                return max(1, width)
            case Rows(count, most):
                return max(1, min(count * width, most or count * width))
            case _:
                return int(self.block)

    def resolve(self, rows: int) -> Config:
        """The config for a matrix of so many rows, with the ratio that is then taken; a ratio of 1 is no reduction."""
        reduce = self.reduce.resolve(rows) if isinstance(self.reduce, Sample) else self.reduce
        if reduce is not None and reduce.ratio == 1:
            reduce = None
        return self if reduce is self.reduce else replace(self, reduce=reduce)

    def _check_levels(self) -> None:
        if isinstance(self.levels, str):
            return _choice("levels", self.levels, ("uniform", "normal"))
        object.__setattr__(self, "levels", tuple(float(level) for level in self.levels))
        top, levels = 2**self.bits - 1, self.levels
        rising = all(a < b for a, b in itertools.pairwise(levels))
        if len(levels) != top + 1 or not rising or levels[0] != 0 or levels[-1] != top:
            raise ValueError(
                f"levels = {levels} was given; for bits = {self.bits} give {top + 1} increasing numbers "
                f"that start at 0 and end at {top}."
            )
        return None


def _positive(name: str, value: object, more: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} = {value!r} was given; expected a whole number of at least 1{more}.")


def _choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} = {value!r} was given; {did_you_mean(str(value), known)}.")
