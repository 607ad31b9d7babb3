"""Masks of ReLU and dropout: one bit an element, or a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dibit.codec import ops
from dibit.residuals.base import GradientMap, Residual


@dataclass(frozen=True)
class Stages:
    """How a tensor was computed: from a source, then perhaps by a ReLU, then perhaps by dropout."""

    source: Any
    relu: Mask | None = None
    dropout: SeededMask | None = None


@dataclass(frozen=True)
class Mask(GradientMap):
    """One bit an element, exact: where a gradient passes, and by how much it is scaled where it does not."""

    bits: Tensor
    slope: float
    how = "1-bit mask"
    gain = 1.0  # what passes is multiplied by this

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.bits,)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Mask:
        return Mask(tensors[0] if tensors else torch.empty(0), self.slope)

    def apply(self, grad: Tensor) -> Tensor:
        return ops.apply_mask(grad.contiguous(), self.bits, self.slope)

    @property
    def relu_bits(self) -> Tensor | None:
        """The bits, where this is the mask of a ReLU: nothing passes where a bit is not set."""
        return self.bits if self.slope == 0 else None

    def result(self, source: Residual) -> Tensor:
        """What the masked operation makes of the tensor that is kept as `source`."""
        return self.apply(source.value())

    def following(self, stages: Stages) -> Stages | None:
        """The stages with this one behind them; `None` where a stage is there twice, or they come in another order."""
        return replace(stages, relu=self) if stages.relu is None and stages.dropout is None else None


@dataclass(frozen=True)
class SeededMask(Residual, GradientMap):
    """Dropout: only the seed is kept, int64 (), and the source if the dropped tensor itself is needed."""

    seed: Tensor
    p: float
    source: Tensor | None = None
    how = "seed"
    relu_bits = None  # this is not the mask of a ReLU

    @property
    def gain(self) -> float:
        """What passes is multiplied by this."""
        return 1 / (1 - self.p)

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

    def result(self, source: Residual) -> Tensor:
        """What the masked operation makes of the tensor that is kept as `source`; of a ReLU's result in one pass."""
        if (relu := source.relu) is None:
            return self.apply(source.value())
        return ops.relu_dropout_gradient(relu[0].value(), relu[1], self.seed, self.p)

    def following(self, stages: Stages) -> Stages | None:
        """The stages with this one behind them; `None` where a stage is there twice."""
        return replace(stages, dropout=self) if stages.dropout is None else None
