"""Roots, powers, exponentials and logarithms: their derivative is kept, computed exactly, at 8 bits.

From a rounded input no unbiased derivative exists; of the derivative itself the estimate enters dX once. These have
long tails (1/x, x^3), and what follows multiplies the small ones by large numbers (a root after a square): they get 8
bits whatever the recipe, with an error that is a part of each element. A result that the model returns tells the
derivative itself. Where the input is had again for less, torch's own operation runs and stays exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dibit._torch.autocast import at_least_single, full
from dibit.engine.forward_pass import Step
from dibit.rules.activation import Elementwise
from dibit.rules.common import MIN_ELEMENTS, eight_bit, is_plain_float
from dibit.rules.relative import keep_relative
from dibit.rules.returned import Slope


def rule(
    plain: Callable[..., Tensor], derivative: Callable[..., Tensor], saves: str, bounded: bool = False, uses: int = 1
) -> Callable[..., Any]:
    """A rule for an element-wise function.

    Args:
        derivative: of (x, y, *args); of y alone if plain torch saves the output.
        saves: what plain torch keeps, "input" or "output".
        bounded: the derivative is of the size of 1, and no reciprocal belongs to it.
        uses: residuals in all that will go where the input is had again, those of later operations included.
    """

    def apply(step: Step, input: Tensor, *args: Any, out: Any = None) -> Any:
        if out is not None or not isinstance(input, Tensor) or not is_plain_float(input) or not input.requires_grad:
            return NotImplemented
        if step.config is None or input.numel() < MIN_ELEMENTS or step.cheap(input, eight_bit(step.config), uses=uses):
            return NotImplemented
        y = plain(input.detach(), *args)
        if y.dtype != input.dtype:
            return NotImplemented
        slope = derivative(at_least_single(input.detach()), at_least_single(y), *args)
        if bounded:
            kept: Any = step.keep(slope, leaf=False, config=eight_bit(step.config)) if slope.isfinite().all() else None
        else:
            kept = keep_relative(step, slope)
        if kept is None:
            return NotImplemented
        if saves == "input":
            step.plain(input)
            return Elementwise.apply(input, lambda x: y, kept, False)
        cell = Slope(step, kept, lambda y: derivative(None, at_least_single(y), *args))
        result = Elementwise.apply(input, lambda x: y, cell, False)
        cell.watch(result)
        step.plain(result)
        return result

    return apply


# What is exponentiated is a softmax, as a rule, which needs it twice more: in both factors of its quotient.
exp = full(torch.exp)(rule(torch.exp, lambda x, y: y, "output", uses=3))
sqrt = rule(torch.sqrt, lambda x, y: 0.5 / y, "output")
rsqrt = full(torch.rsqrt)(rule(torch.rsqrt, lambda x, y: -0.5 * y**3, "output"))
reciprocal = full(torch.reciprocal)(rule(torch.reciprocal, lambda x, y: -(y**2), "output"))
log = full(torch.log)(rule(torch.log, lambda x, y: 1 / x, "input"))
square = rule(torch.square, lambda x, y: 2 * x, "input")
absolute = rule(torch.abs, lambda x, y: torch.sign(x), "input")
sine = rule(torch.sin, lambda x, y: torch.cos(x), "input", bounded=True)
cosine = rule(torch.cos, lambda x, y: -torch.sin(x), "input", bounded=True)
_power = rule(torch.pow, lambda x, y, p: p * torch.pow(x, p - 1), "input")
_softplus = rule(F.softplus, lambda x, y, beta, threshold: _softplus_slope(x, beta, threshold), "input")


@full(lambda x: torch.pow(x, 1.5))
def power(step: Step, input: Tensor, exponent: Any, *, out: Any = None) -> Any:
    return NotImplemented if isinstance(exponent, Tensor | complex) else _power(step, input, exponent, out=out)


def _softplus_slope(x: Tensor, beta: float, threshold: float) -> Tensor:
    return torch.where(x * beta > threshold, 1.0, torch.sigmoid(x * beta)).to(x.dtype)


@full(F.softplus)
def softplus(step: Step, input: Tensor, beta: float = 1, threshold: float = 20) -> Any:
    return _softplus(step, input, beta, threshold)
