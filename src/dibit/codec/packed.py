"""`Packed`: what is kept of a tensor after encoding, and products that read it without unpacking all of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dibit.codec import ops
from dibit.codec.backends import reference
from dibit.codec.layout import Layout, reduced_shape, row_parts
from dibit.codec.normal_levels import normal_levels
from dibit.codec.projection import projection, sampled_rows
from dibit.codec.rng import UNIT, uniform_range
from dibit.config import Config, Project, Sample


@dataclass(frozen=True)
class Packed:
    """A tensor, reduced, quantised and packed. As a matrix it has `rows` (all leading dimensions) and a `width`.

    Attributes:
        codes: uint8 (bytes,), packed as `layout` says.
        ranges: (blocks, 2), low and high of each block.
        seed: int64 0-d, the seed of the rounding, the projection and the choice of rows.
        nonfinite_flag: float32 0-d, NaN if a row is not finite, kept or not, else 0; `None` where every row is kept.
        shape, dtype: those of the tensor.
        config: how it was encoded.
        scores: uint8 (rows,), from which the choice of rows is repeated; `None` where rows are uniform, or all kept.
        count: how many rows are kept, where there are scores.
    """

    codes: Tensor
    ranges: Tensor
    seed: Tensor
    nonfinite_flag: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    config: Config
    scores: Tensor | None = None
    count: int = 0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors that are kept: what takes memory."""
        rest = (x for x in (self.nonfinite_flag, self.scores) if x is not None)
        return (self.codes, self.ranges, self.seed, *rest)

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Packed:
        """The same object on other tensors, in the order of `tensors`."""
        codes, ranges, seed, *rest = tensors
        flag = rest.pop(0) if self.nonfinite_flag is not None else None
        scores = rest.pop(0) if self.scores is not None else None
        return replace(self, codes=codes, ranges=ranges, seed=seed, nonfinite_flag=flag, scores=scores)

    def without_tensors(self) -> Packed:
        """The same object with empty tensors, for a caller who keeps the tensors elsewhere."""
        none = torch.empty(0)
        flag, scores = (None if x is None else none for x in (self.nonfinite_flag, self.scores))
        return replace(self, codes=none, ranges=none, seed=none, nonfinite_flag=flag, scores=scores)

    @property
    def layout(self) -> Layout:
        """How `codes` and `ranges` are laid out."""
        return Layout.of(*self.reduced_shape, self.config)

    @property
    def block(self) -> int:
        """Elements that share one range."""
        return self.layout.block

    @property
    def reduced_shape(self) -> tuple[int, int]:
        """Rows and columns of what was quantised."""
        return reduced_shape(self.rows, self.width, self.config) if self.scores is None else (self.count, self.width)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def rows(self) -> int:
        return self.shape[:-1].numel()

    @property
    def width(self) -> int:
        return self.shape[-1] if self.shape else 1

    def projection(self, dtype: torch.dtype) -> Tensor | None:
        """P (D, R) where columns were projected, else `None`."""
        reduce = self.config.reduce
        return projection(self.width, reduce.ratio, self.seed, dtype) if isinstance(reduce, Project) else None

    def sample(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Index int64 (m,) and weight (m,) of the rows kept, where rows were sampled, else `None`.

        The weights are NaN if a row of the tensor, kept or not, is not finite.
        """
        if not isinstance(self.config.reduce, Sample):
            return None
        if self.scores is not None:
            index, weight = ops.pick_rows(self.scores, self.seed, self.count)
        else:
            index, weight = sampled_rows(self.rows, self.config.reduce.ratio, self.seed)
        return index, (weight if self.nonfinite_flag is None else weight + self.nonfinite_flag).to(dtype)

    def reduced(self, dither: float | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The reduced tensor, unpacked, of shape `reduced_shape`; `dither` and `dtype` as in `ops.dequantize`."""
        elements, block, bits = self.layout
        x: Tensor = ops.dequantize(
            self.codes,
            self.ranges,
            self.seed,
            elements,
            bits,
            block,
            levels_of(self.config, block),
            self.dither if dither is None else dither,
            dtype or self.dtype,
        )
        return x.view(self.reduced_shape)

    def outer(self, dy: Tensor, sample: tuple[Tensor, Tensor] | None) -> Tensor:
        """dY^T R: (O, columns kept) for dy (N, O) and the reduced tensor R, which is never formed.

        Args:
            sample: the result of `self.sample`, in float32, or in float64 for such a dy.
        """
        block, (index, weight) = self.block, sample or (None, None)
        gradient: Tensor = ops.weight_gradient(
            self.codes,
            self.ranges,
            self.seed,
            dy.contiguous(),
            index,
            weight,
            *self.reduced_shape,
            self.config.bits,
            block,
            levels_of(self.config, block),
            self.dither,
        )
        return gradient

    @property
    def dither(self) -> float:
        """The `dither` of `ops.dequantize` that suits the rounding."""
        return float(self.config.rounding == "dither")

    @property
    def plain_rows(self) -> bool:
        """Whether all rows were kept whole, at uniform levels, in float32: for these `ops.passed_rows` is fast."""
        config = self.config
        return config.reduce is None and config.levels == "uniform" and self.dtype == torch.float32

    def parts(self) -> Iterator[tuple[int, int]]:
        """First row and end of parts that can be unpacked one by one: of cache size on a CPU, elsewhere one part."""
        if self.codes.device.type != "cpu":
            return iter([(0, self.rows)])
        return row_parts(self.rows, self.width, self.block)

    def variance(self) -> Tensor:
        r"""An unbiased estimate of each reduced element's rounding variance :math:`(h - a_{i-1})(a_i - h)`.

        Shape `reduced_shape`. If the random number u rounded the element to level c, and d_i are the gaps between
        levels, then :math:`(1 - 2u) \sum_{i \le c} d_i^2` has that mean; subtracted from the square of one draw it
        leaves an unbiased x^2. With dither the variance is a twelfth of a bin's square, whatever x is.
        """
        elements, block, bits = self.layout
        if self.config.rounding == "dither":
            own = reference.dither_variance(self.ranges, elements, bits, block)
            return own.view(self.reduced_shape).to(self.dtype)
        top = 2**bits - 1
        levels = levels_of(self.config, block) or range(top + 1)
        gaps = torch.tensor(levels, dtype=torch.float32, device=self.codes.device).diff()
        squares = torch.cat((gaps.new_zeros(1), (gaps**2).cumsum(0)))
        codes = reference.unpack_all(self.codes, elements, block, bits)
        step = (self.ranges[:, 1].float() - self.ranges[:, 0].float()) / top
        u = uniform_range(0, elements, self.seed) + UNIT / 2
        per_element = step.square().repeat_interleave(block)[:elements]
        bias: Tensor = squares[codes.int()] * (1 - 2 * u) * per_element
        return bias.view(self.reduced_shape).to(self.dtype)


def levels_of(config: Config, block: int) -> list[float]:
    """The levels of a config, for blocks of this many elements, as the operators take them: empty for uniform ones."""
    if config.levels == "normal":
        return list(normal_levels(config.bits, block)) if config.bits > 1 and block > 2 else []
    return [] if config.levels == "uniform" else list(config.levels)
