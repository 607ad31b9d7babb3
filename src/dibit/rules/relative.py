"""Codes whose error is a small part of each element, however small the element is beside the others of its block.

A derivative may meet a reciprocal later on: the loss divides by the result of a sigmoid, a norm by the root of squares.
Then the smallest elements count as much as the largest, and an error that is a part of the block's range would be far
larger than they are. Levels in geometric progression keep the error a part of the element itself. Rounding to them is
unbiased like to any others, and zero stays zero.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dibit.codec import ops
from dibit.config import Config
from dibit.engine.forward_pass import ForwardPass
from dibit.residuals.base import GradientMap, Residual
from dibit.rules.common import running_config

_FINE, _ALL = 40, 124  # octaves below the largest element: a sigmoid's at +-28, and all that float32 has
_MOST, _STEP = 128, 8  # octaves: float32 has no more; multiples of this, so that there are few tables


@dataclass(frozen=True)
class Signed(Residual, GradientMap):
    """Magnitudes through the codec, and their signs: one bit an element, or the same for all.

    Attributes:
        magnitude: residual of |x|.
        signs: packed bits, set where x > 0; `None` where all elements have the same sign.
        sign: of all elements without `signs`, 1 or -1.
    """

    magnitude: Residual
    signs: Tensor | None
    sign: float = 1.0

    @property
    def how(self) -> str:
        return f"{self.magnitude.how}, relative" + (" and a sign" if self.signs is not None else "")

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.magnitude.tensors if self.signs is None else (self.signs, *self.magnitude.tensors)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Signed:
        if self.signs is None:
            return Signed(self.magnitude.with_tensors(tensors), None, self.sign)
        signs = tensors[0] if tensors else torch.empty(0)
        return Signed(self.magnitude.with_tensors(tensors[1:]), signs, self.sign)

    def value(self) -> Tensor:
        x = self.magnitude.value()
        if self.signs is not None:
            return ops.apply_mask(x.contiguous(), self.signs, -1.0)
        return x if self.sign > 0 else x.neg_()

    def apply(self, grad: Tensor) -> Tensor:
        """The gradient of an element-wise operation whose derivative this is."""
        return grad * self.value().to(grad.dtype)


@functools.cache
def geometric(octaves: int) -> tuple[float, ...]:
    """256 levels: zero, and 255 that fall by this many octaves from the top."""
    return (0.0, *(255 * 2.0 ** (-(255 - i) * octaves / 254) for i in range(1, 256)))


def octaves_of(span: float) -> int:
    """How many octaves the levels cover, for magnitudes whose largest is 2**span times the smallest."""
    return min(_MOST, _STEP * math.ceil((1 + span) / _STEP))


@functools.cache
def full_range_levels() -> tuple[float, ...]:
    """256 levels for a tensor whose range is not read: 200 for the first `_FINE` octaves, 55 for others, and zero."""
    low = range(55, 0, -1)
    fine = (255 * 2.0 ** (-i * _FINE / 199) for i in range(199, -1, -1))
    return (0.0, *(255 * 2.0 ** (-_FINE - i * (_ALL - _FINE) / 55) for i in low), *fine)


def saturating(config: Config) -> tuple[float, ...]:
    """Levels for what mostly lies near its largest value: 16, or 256 where the config has 8 bits.

    Linear from 1 to 1/6 (1/200), then 9 (55) that fall to 2^-24.
    """
    return _saturating(15, 6) if config.bits < 8 else _saturating(255, 200)


@functools.cache
def _saturating(top: int, linear: int) -> tuple[float, ...]:
    more = top - linear
    low = (linear * 2.0**-24) ** (1 / more)
    return (
        0.0,
        *(top / linear * low**i for i in range(more, 0, -1)),
        *(top * i / linear for i in range(1, linear + 1)),
    )


@functools.cache
def relative(config: Config, levels: tuple[float, ...] | None = None) -> Config:
    """The config whose error is a part of each element; default levels: `full_range_levels()`."""
    levels = levels or full_range_levels()
    config = replace(config, rounding="stochastic") if config.rounding == "dither" else config
    return replace(config, bits=len(levels).bit_length() - 1, reduce=None, levels=levels, block=1024, norm=None)


def keep_relative(forward: ForwardPass, x: Tensor) -> Signed | None:
    """A path residual of x, of as many octaves as its elements take; `None` if not all of them are finite.

    On a GPU this waits for three numbers.
    """
    if not x.numel():
        return None
    low, high = x.aminmax()
    magnitude = x.abs()
    least = torch.where(magnitude > 0, magnitude, torch.inf).amin()
    low, high, least = torch.stack((low, high, least)).tolist()
    largest = max(-low, high)
    if not math.isfinite(low + high):
        return None  # one pole would spoil the block it lies in
    octaves = octaves_of(math.log2(largest) - math.log2(least) if largest else 0.0)
    config = relative(running_config(forward), geometric(octaves))
    if low >= 0 or high <= 0:
        return Signed(forward.keep_factor(magnitude, config, fixed=True), None, 1.0 if low >= 0 else -1.0)
    return _with_signs(forward, x, magnitude, config)


def keep_signed(forward: ForwardPass, x: Tensor) -> Signed:
    """The same with `full_range_levels()` and a sign for each element, whatever x is: a GPU is not waited for."""
    return _with_signs(forward, x, x.abs(), relative(running_config(forward)))


def _with_signs(forward: ForwardPass, x: Tensor, magnitude: Tensor, config: Config) -> Signed:
    signs = ops.pack_mask(x.contiguous())
    forward.kept(signs)
    return Signed(forward.keep_factor(magnitude, config, fixed=True), signs)
