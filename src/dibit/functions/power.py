"""Roots, powers, exponentials and logarithms: their derivative is kept, computed exactly, at 8 bits.

From a rounded input no unbiased derivative exists; of the derivative itself the estimate enters dX once. These have
long tails (1/x, x^3), so they get 8 bits whatever the recipe. Where the input is had again for less, torch's own
operation runs and stays exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dibit.functions.activation import Elementwise
from dibit.functions.common import dense, fine
from dibit.intercept import Step


def rule(plain: Callable[..., Tensor], derivative: Callable[..., Tensor], saves: str) -> Callable[..., Any]:
    """A rule for an element-wise function; `derivative(x, y, *args)`, `saves`: "input", "output" or "both"."""

    def apply(step: Step, input: Tensor, *args: Any, out: Any = None) -> Any:
        if out is not None or not isinstance(input, Tensor) or not dense(input) or not input.requires_grad:
            return NotImplemented
        if step.config is None or input.numel() < _FEW or step.cheap(input, fine(step)):
            return NotImplemented
        y = plain(input.detach(), *args)
        if y.dtype != input.dtype:
            return NotImplemented
        kept = step.keep(derivative(input.detach(), y, *args), leaf=False, config=fine(step))
        if saves != "output":
            step.plain(input)
        result = Elementwise.apply(input, lambda x: y, kept, False)
        if saves != "input":
            step.plain(result)
        return result

    return apply


_FEW = 64  # elements; below this nothing is won


def _power_rule() -> Callable[..., Any]:
    inner = rule(torch.pow, lambda x, y, p: p * torch.pow(x, p - 1), "input")

    def power(step: Step, input: Any, exponent: Any, *, out: Any = None) -> Any:
        if isinstance(exponent, Tensor | complex):
            return NotImplemented
        return inner(step, input, exponent, out=out)

    return power


exp = rule(torch.exp, lambda x, y: y, "output")
sqrt = rule(torch.sqrt, lambda x, y: 0.5 / y, "output")
rsqrt = rule(torch.rsqrt, lambda x, y: -0.5 * y**3, "output")
reciprocal = rule(torch.reciprocal, lambda x, y: -(y**2), "output")
log = rule(torch.log, lambda x, y: 1 / x, "input")
square = rule(torch.square, lambda x, y: 2 * x, "input")
absolute = rule(torch.abs, lambda x, y: torch.sign(x), "input")
sine = rule(torch.sin, lambda x, y: torch.cos(x), "input")
cosine = rule(torch.cos, lambda x, y: -torch.sin(x), "input")
power = _power_rule()
_softplus = rule(F.softplus, lambda x, y, beta, threshold: _softplus_slope(x, beta, threshold), "input")


def _softplus_slope(x: Tensor, beta: float, threshold: float) -> Tensor:
    return torch.where(x * beta > threshold, 1.0, torch.sigmoid(x * beta)).to(x.dtype)


def softplus(step: Step, input: Tensor, beta: float = 1, threshold: float = 20) -> Any:
    return _softplus(step, input, beta, threshold)
