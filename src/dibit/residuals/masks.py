"""Masks: where a gradient passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dibit.codec import ops
from dibit.residuals.base import GradientMap, Residual


@dataclass(frozen=True)
class Mask(GradientMap):
    """One bit an element, exact: where a gradient passes, and by how much it is scaled where it does not."""

    bits: Tensor
    slope: float
    how = "1-bit mask"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.bits,)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Mask:
        return Mask(tensors[0] if tensors else torch.empty(0), self.slope)

    def apply(self, grad: Tensor) -> Tensor:
        return ops.apply_mask(grad.contiguous(), self.bits, self.slope)


@dataclass(frozen=True)
class SeededMask(Residual, GradientMap):
    """Dropout: nothing but the seed, and the source where the dropped tensor itself is asked for."""

    seed: Tensor
    p: float
    source: Tensor | None = None
    how = "seed"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.seed,) if self.source is None else (self.seed, self.source)

    def with_tensors(self, tensors: Sequence[Tensor]) -> SeededMask:
        seed, *source = tensors or (torch.empty(0),)
        return SeededMask(seed, self.p, source[0] if source else None)

    def apply(self, grad: Tensor) -> Tensor:
        """The gradient of dropout: the mask is drawn again."""
        return ops.dropout(grad.contiguous(), self.seed, self.p)

    def value(self) -> Tensor:
        assert self.source is not None
        return ops.dropout(self.source.contiguous(), self.seed, self.p)
