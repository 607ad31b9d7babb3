"""Measures, in the backward pass, what `dibit.row_plan` decides by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dibit.codec import Packed
from dibit.config import Project
from dibit.residual import Aggregated, Compressed, Normed, Passed, Residual
from dibit.row_plan import RowPlan


class Meter:
    """Measures in the backward pass of one operation, in passes that are to be measured."""

    def __init__(self, plan: RowPlan, key: str) -> None:
        self.plan, self.key = plan, key

    def leaf(self, residual: Residual, dy: Tensor, dw: Tensor) -> None:
        """Of dW (O, D), the product of dY (N, O) and an input."""
        while isinstance(residual, Aggregated):
            dy, residual = residual.graph.transposed_product(dy), residual.source
        weight = None
        ratio = 1.0
        if isinstance(residual, Compressed) and (sample := residual.packed.sample(torch.float32)) is not None:
            x, dy, weight = residual.packed.reduced(), dy.index_select(0, sample[0]), sample[1]
            ratio = max(1.0, residual.packed.rows / max(1, len(weight)))
        else:
            x = residual.value()
        x = x.reshape(-1, x.shape[-1])
        gradient = _squares(dy)
        terms = _squares(x) * gradient
        rounding = _rounding(residual, x) * gradient
        left_out = terms.new_zeros(())
        if weight is not None:
            left_out = (terms * weight * (weight - 1)).sum()
            terms, rounding = terms * weight, rounding * weight * weight
        square = torch.linalg.vector_norm(dw, dtype=torch.float32).square()
        s, v, r, g = torch.stack((terms.sum(), left_out, rounding.sum(), square)).tolist()
        self.plan.measured(self.key, (v / (ratio - 1) if ratio > 1 else s, s, r / ratio, g - v - r))

    def norm(self, along: Tensor, dx: Tensor, variance: float) -> None:
        """Of a norm: the square of what it subtracts along x_hat, 0-d, and dX, to which so much of it was added."""
        total = torch.linalg.vector_norm(dx, dtype=torch.float32).square()
        part, whole = torch.stack((along.float(), total)).tolist()
        self.plan.measured(self.key, (part, max(whole - variance * part, 1e-3 * whole)))


def _rounding(residual: Residual, x: Tensor) -> Tensor:
    """The variance by rounding of each row of what is kept (rows, D), summed over its elements, about."""
    norm: Any = residual
    while isinstance(norm, Passed):
        norm = norm.source
    if isinstance(norm, Normed):
        step = _steps(norm.source.packed).view(-1, x.shape[1])
        gain = x.new_ones(()) if norm.weight is None else norm.weight.float()
        return (step * gain * (x != 0)).square().sum(1) / 12
    if isinstance(residual, Compressed) and not isinstance(residual.packed.config.reduce, Project):
        packed = residual.packed
        step = _steps(packed).view(-1, x.shape[1])
        return (step * (x != 0)).square().sum(1) / (12 if packed.config.rounding == "dither" else 6)
    return x.new_zeros(())


def _steps(packed: Packed) -> Tensor:
    """Of each element: how far its levels lie apart."""
    steps = (packed.ranges[:, 1].float() - packed.ranges[:, 0].float()) / (2**packed.config.bits - 1)
    rows, width = packed.reduced_shape
    return steps.repeat_interleave(packed.block)[: rows * width]


def _squares(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).square()
