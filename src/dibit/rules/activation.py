"""Element-wise activations.

Piecewise linear ones keep one exact bit an element. Smooth ones keep their *derivative*, computed exactly in the
forward pass: its estimate enters dX once, so dX is unbiased; from a quantised input it would not be.

The derivatives of sigmoid, tanh and ELU fall towards 0 where these saturate, and that is where a logarithm that follows
has a large one: they are kept with an error that is a part of each element (`dibit.rules.relative`), or by
reference to the result where plain torch keeps it too and the model returns it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dibit._torch.autocast import at_least_single, copies, lower
from dibit.codec import ops
from dibit.config import Config
from dibit.engine.forward_pass import Step
from dibit.residuals.base import Residual, load, save
from dibit.residuals.masks import Mask
from dibit.rules.common import MIN_ELEMENTS, first_order, is_plain_float, without_reduction
from dibit.rules.relative import relative, saturating, whole
from dibit.rules.returned import Slope

aten = torch.ops.aten


class Elementwise(torch.autograd.Function):
    """dx = dy * f'(x), from an exact mask of a piecewise linear f or from the kept derivative of a smooth one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, plain: Callable[[Tensor], Tensor], slope: Mask | Residual | Slope, inplace: bool
    ) -> Tensor:
        ctx.hops = 0
        ctx.cell = None
        if isinstance(slope, Slope):
            ctx.cell = slope
        else:
            save(ctx, slope)
        if inplace:
            ctx.mark_dirty(x)
        return plain(x)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        slope = ctx.cell or load(ctx)[0]
        return slope.apply(dy), None, None, None


class PReLU(torch.autograd.Function):
    """y = max(x, 0) + w min(x, 0); dw sums dy * min(x, 0), which enters no other gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: Mask, negative: Any, low: torch.dtype | None) -> Tensor:
        save(ctx, mask, negative, weight)
        ctx.dtypes = x.dtype, weight.dtype
        return F.prelu(*copies(low, x, weight))

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        mask, negative, weight = load(ctx)
        shape = [1] * dy.dim()
        if weight.numel() > 1:
            shape[1] = -1
        dx = None
        if ctx.needs_input_grad[0]:
            dx = mask.apply(dy) + (dy - mask.apply(dy)) * weight.to(dy.dtype).view(shape)
            dx = dx.to(ctx.dtypes[0])
        dw = None
        if negative is not None:
            dw = (dy * negative.value()).sum_to_size(weight.view(shape).shape).view(weight.shape).to(ctx.dtypes[1])
        return dx, dw, None, None, None


def masked(plain: Callable[..., Tensor], slope_at: float, saves: str) -> Callable[..., Any]:
    """A rule for a piecewise linear activation; `saves`: what plain torch keeps, "input" or "output"."""

    def rule(step: Step, input: Tensor, negative_slope: float = slope_at, inplace: bool = False) -> Any:
        if not is_plain_float(input) or not input.requires_grad or negative_slope < 0:
            return NotImplemented
        mask = step.note(Mask(ops.pack_mask(input.detach().contiguous()), float(negative_slope)))
        if saves == "input" and not inplace:
            step.plain(input)
        source = step.estimate_before_change(input) if inplace else step.estimate(input)
        y = Elementwise.apply(input, lambda x: plain(x, negative_slope, inplace), mask, inplace)
        step.passed(source, y, mask)
        if saves == "output" or inplace:
            step.plain(y)
        return y

    return rule


_relu_in_place = masked(lambda x, _, inplace: torch.relu_(x), 0.0, "output")
leaky_relu = masked(lambda x, slope, inplace: F.leaky_relu(x, slope, inplace), 0.01, "input")


def relu(step: Step, input: Tensor, inplace: bool = False) -> Any:
    if inplace:
        return _relu_in_place(step, input, 0.0, True)
    if not is_plain_float(input) or not input.requires_grad:
        return NotImplemented
    x = input.detach()
    if x.is_contiguous():
        result, bits = ops.relu(x)
    else:  # torch's own layout
        result, bits = torch.relu(x), ops.pack_mask(x.contiguous())
    mask = step.note(Mask(bits, 0.0))
    y = Elementwise.apply(input, lambda _: result, mask, False)
    step.plain(y)
    step.passed(step.estimate(input), y, mask)
    return y


def relu_(step: Step, input: Tensor) -> Any:
    return relu(step, input, True)


def leaky_relu_(step: Step, input: Tensor, negative_slope: float = 0.01) -> Any:
    return leaky_relu(step, input, negative_slope, True)


@lower
def prelu(step: Step, input: Tensor, weight: Tensor) -> Any:
    if not is_plain_float(input, weight) or not (input.requires_grad or weight.requires_grad) or input.dim() < 2:
        return NotImplemented
    step.plain(input, weight)
    x = copies(step.low, input.detach())[0]
    # torch's rule here is x > 0, so NaN takes the weight: the 0/1 tensor packs just that
    mask = step.note(Mask(ops.pack_mask((x > 0).to(torch.float32)), 0.0))
    negative = step.keep(x.clamp(max=0), leaf=False) if weight.requires_grad else None
    return PReLU.apply(input, weight, mask, negative, step.low)


def smooth(plain: Callable[..., Tensor], derivative: Callable[..., Tensor], saves: str = "input") -> Callable[..., Any]:
    """A rule for a smooth activation. `plain(x, inplace, *args)`, `derivative(x, *args)`, as exact as plain or more."""

    def rule(step: Step, input: Tensor, *args: Any, inplace: bool = False) -> Any:
        config = step.config
        if config is None or not is_plain_float(input) or not input.requires_grad or input.numel() < MIN_ELEMENTS:
            return NotImplemented
        kept = step.keep_factor(derivative(input.detach(), *args), without_reduction(config))
        if saves == "input":
            step.plain(input)
        elif saves == "copy in place":
            step.plain(input.nbytes if inplace else input)
        return Elementwise.apply(input, lambda x: plain(x, inplace, *args), kept, inplace)

    return rule


def saturating_rule(
    plain: Callable[..., Tensor],
    of_result: Callable[..., Tensor],
    levels: Callable[[Config], tuple[float, ...]],
    of_input: Callable[..., Tensor] | None = None,
) -> Callable[..., Any]:
    """A rule for an activation that saturates, whose derivative is kept by these levels.

    Args:
        plain: of (x, inplace, *args).
        of_result: the derivative as a function of (result, *args).
        of_input: of (x, *args), where plain torch keeps x; but in place it keeps the result.
    """

    def rule(step: Step, input: Tensor, *args: Any, inplace: bool = False) -> Any:
        config = step.config
        if config is None or not is_plain_float(input) or not input.requires_grad or input.numel() < MIN_ELEMENTS:
            return NotImplemented
        codec = relative(config, levels(config))
        if not inplace and step.cheap(input, codec):
            return NotImplemented  # torch's own, kept exactly
        x = input.detach()
        slope = None if of_input is None else of_input(x, *args)  # before x is overwritten
        if slope is not None and not inplace:  # the caller may change the result
            step.plain(input)
            kept = step.keep_factor(slope, codec)
            return Elementwise.apply(input, lambda x: plain(x, False, *args), kept, False)
        y = plain(x, False, *args)
        kept = step.keep_factor(of_result(y, *args) if slope is None else slope, codec)
        cell = Slope(step, kept, lambda y: of_result(y, *args))
        y = Elementwise.apply(input, (lambda x: plain(x, True, *args)) if inplace else (lambda _: y), cell, inplace)
        cell.watch(y)
        step.plain(y)
        return y

    return rule


def sigmoid_slope(y: Tensor) -> Tensor:
    """Of a sigmoid's result, in single precision at least."""
    y = at_least_single(y)
    return y * (1 - y)


def tanh_slope(y: Tensor) -> Tensor:
    """Of a tanh's result, in single precision at least."""
    return 1 - at_least_single(y) ** 2


def silu_slope(x: Tensor) -> Tensor:
    return aten.silu_backward(torch.ones_like(x), x)


def gelu_slope(x: Tensor, approximate: str) -> Tensor:
    return aten.gelu_backward(torch.ones_like(x), x, approximate=approximate)


def elu_slope(x: Tensor, alpha: float) -> Tensor:
    return aten.elu_backward(torch.ones_like(x), alpha, 1, 1, False, x)


def _elu_slope_of_result(y: Tensor, alpha: float) -> Tensor:
    return aten.elu_backward(torch.ones_like(y), alpha, 1, 1, True, y)


_sigmoid = saturating_rule(
    lambda x, inplace: x.sigmoid_() if inplace else torch.sigmoid(x), sigmoid_slope, lambda _: whole()
)
_tanh = saturating_rule(lambda x, inplace: x.tanh_() if inplace else torch.tanh(x), tanh_slope, saturating)
_silu = smooth(lambda x, inplace: F.silu(x, inplace), silu_slope, "copy in place")
_gelu = smooth(lambda x, _, approximate: F.gelu(x, approximate=approximate), gelu_slope)
_elu = saturating_rule(
    lambda x, inplace, alpha: F.elu(x, alpha, inplace), _elu_slope_of_result, saturating, of_input=elu_slope
)


def sigmoid(step: Step, input: Tensor, *, out: Any = None) -> Any:
    return _sigmoid(step, input) if out is None else NotImplemented


def tanh(step: Step, input: Tensor, *, out: Any = None) -> Any:
    return _tanh(step, input) if out is None else NotImplemented


def sigmoid_(step: Step, input: Tensor) -> Any:
    return _sigmoid(step, input, inplace=True)


def tanh_(step: Step, input: Tensor) -> Any:
    return _tanh(step, input, inplace=True)


def silu(step: Step, input: Tensor, inplace: bool = False) -> Any:
    return _silu(step, input, inplace=inplace)


def gelu(step: Step, input: Tensor, *, approximate: str = "none") -> Any:
    return _gelu(step, input, approximate)


def elu(step: Step, input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Any:
    return _elu(step, input, alpha, inplace=inplace)


def elu_(step: Step, input: Tensor, alpha: float = 1.0) -> Any:
    return _elu(step, input, alpha, inplace=True)
