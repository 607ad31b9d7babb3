"""A tensor by its codes: reduced, quantised and packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dibit._torch.autocast import HALF
from dibit.codec import Packed, decode
from dibit.codec.seed_stream import Key
from dibit.config import Sample
from dibit.residuals.base import GradientMap, Residual
from dibit.residuals.gradient_norms import GradientNormObserver


@dataclass(frozen=True)
class Compressed(Residual, GradientMap):
    """Reduced, quantised and packed by the codec.

    Attributes:
        watch: measures the gradients that it is multiplied with, where the next step's rows depend on them.
        key: its name among the residuals of a pass, the same in every pass.
        module: name of the module whose operation keeps it.
        drawn: key of the pass, whose `used` is called in the backward pass.
    """

    packed: Packed
    watch: GradientNormObserver | None = None
    key: str = ""
    module: str = ""
    drawn: Key | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.packed.tensors

    @property
    def how(self) -> str:
        config = self.packed.config
        reduce = f", {type(config.reduce).__name__.lower()} 1/{config.reduce.ratio}" if config.reduce else ""
        if isinstance(config.reduce, Sample):
            if self.packed.scores is not None:
                reduce += f" by {config.reduce.by}" if config.reduce.ratio > 1 else " of the loss's"
            if config.reduce.ratio > self.packed.rows:
                reduce += f" (one row of {self.packed.rows})"
        return f"{config.bits} bit, block {config.block}{reduce}"

    def with_tensors(self, tensors: Sequence[Tensor]) -> Compressed:
        packed = self.packed.with_tensors(tuple(tensors)) if tensors else self.packed.without_tensors()
        return replace(self, packed=packed)

    def loaded(self) -> None:
        if self.drawn is not None:
            self.drawn.used()

    @property
    def encoded(self) -> Packed:
        return self.packed

    def observe(self, dy: Tensor) -> None:
        if self.watch is not None:
            self.watch.observe(dy)

    def value(self) -> Tensor:
        self.loaded()
        return decode(self.packed)

    def outer(self, dy: Tensor) -> Tensor:
        packed = self.packed
        self.loaded()
        self.observe(dy)
        # sums, and weights that may go beyond float16's largest number
        dtype = torch.float32 if dy.dtype in HALF else dy.dtype
        grad = packed.outer(dy, packed.sample(dtype))
        p = packed.projection(dtype)
        return grad if p is None else grad @ p.T

    def apply(self, grad: Tensor) -> Tensor:
        """The gradient of an element-wise operation whose derivative this is."""
        return grad * self.value().to(grad.dtype)
