"""A norm's result, also after ReLU and dropout, from what the norm keeps of its normalised input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dibit.codec import Packed, ops
from dibit.residuals.base import Residual, outer
from dibit.residuals.compressed import Compressed
from dibit.residuals.masks import Mask, SeededMask, Stages


@dataclass(frozen=True)
class Normed(Residual):
    """The result of a norm, estimated from what it keeps of its normalised input: x_hat * weight + bias.

    For leaves alone: the norm's own backward pass uses the same draw, but all that multiplies a leaf comes from later
    operations, so the product is unbiased.
    """

    source: Compressed
    weight: Tensor | None
    bias: Tensor | None
    key: str = ""
    how = "codes of the norm"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.source.tensors, *(x for x in (self.weight, self.bias) if x is not None))

    def with_tensors(self, tensors: Sequence[Tensor]) -> Normed:
        rest = list(tensors[len(self.source.tensors) :])
        weight, bias = (
            None if x is None else rest.pop(0) if rest else torch.empty(0) for x in (self.weight, self.bias)
        )
        return Normed(self.source.with_tensors(tensors[: len(self.source.tensors)]), weight, bias, self.key)

    def value(self) -> Tensor:
        y = self.source.value()
        if self.weight is not None:
            y *= self.weight
        return y if self.bias is None else y.add_(self.bias)

    def rounded(self) -> tuple[Packed | None, Any]:
        return self.source.encoded, 1.0 if self.weight is None else self.weight.float().square().mean()

    @property
    def stages(self) -> Stages:
        return Stages(self)

    def outer(self, dy: Tensor) -> Tensor:
        return _outer_by_parts(self, dy)


@dataclass(frozen=True)
class Passed(Residual):
    """The result of ReLU or dropout, from the residual of its argument and its mask: linear, so unbiased."""

    source: Normed | Passed
    mask: Mask | SeededMask
    scale: float = 1.0
    key: str = ""
    how = "codes of the norm"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.source.tensors, *self.mask.tensors)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Passed:
        count = len(self.source.tensors)
        return replace(
            self, source=self.source.with_tensors(tensors[:count]), mask=self.mask.with_tensors(tensors[count:])
        )

    def value(self) -> Tensor:
        y = self.mask.result(self.source)
        return y if self.scale == 1 else y.mul_(self.scale)

    def rounded(self) -> tuple[Packed | None, Any]:
        packed, gain = self.source.rounded()
        return packed, gain * (self.mask.gain * self.scale) ** 2

    @property
    def relu(self) -> tuple[Residual, Tensor] | None:
        bits = self.mask.relu_bits
        return None if bits is None or self.scale != 1 else (self.source, bits)

    @property
    def stages(self) -> Stages | None:
        before = self.source.stages
        return None if before is None or self.scale != 1 else self.mask.following(before)

    def outer(self, dy: Tensor) -> Tensor:
        return _outer_by_parts(self, dy)


def row_chunks(kept: Residual) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of rows of a residual's value, (..., D) as (N, D): on a CPU no tensor of full size is made."""
    stages = kept.stages
    if stages is None or not stages.source.source.packed.plain_rows:
        x = kept.value()
        x = x.reshape(-1, x.shape[-1])
        yield slice(0, x.shape[0]), x
        return
    norm, relu, drop = stages.source, stages.relu, stages.dropout
    packed, source = norm.source.packed, norm.source
    if source.drawn is not None:
        source.drawn.used()
    width, dtype = packed.width, packed.dtype
    weight, bias = (
        packed.codes.new_full((width,), fill, dtype=dtype) if given is None else given.detach().to(dtype).reshape(-1)
        for given, fill in ((norm.weight, 1.0), (norm.bias, 0.0))
    )
    bits, slope = (None, 0.0) if relu is None else (relu.bits, relu.slope)
    seed, p = (None, 0.0) if drop is None else (drop.seed, drop.p)
    for start, stop in packed.parts():
        yield (
            slice(start, stop),
            ops.passed_rows(
                packed.codes,
                packed.ranges,
                packed.seed,
                weight,
                bias,
                bits,
                slope,
                seed,
                p,
                start,
                stop,
                packed.rows,
                packed.config.bits,
                packed.block,
                packed.dither,
            ),
        )


def _outer_by_parts(kept: Residual, dy: Tensor) -> Tensor:
    """dY^T X, (O, D), for dy (N, O)."""
    grad: Tensor | None = None
    for rows, x in row_chunks(kept):
        if grad is None:
            grad = outer(x, dy[rows])
        else:
            grad.addmm_(dy[rows].T, x.to(dy.dtype))
    assert grad is not None
    return grad
