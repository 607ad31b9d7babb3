"""Element-wise activations.

Piecewise linear ones keep one exact bit an element. Smooth ones keep their *derivative*, computed exactly in the
forward pass: its estimate enters dX once, so dX is unbiased; from a quantised input it would not be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dibit.codec import ops
from dibit.functions.common import dense, first_order, unreduced
from dibit.precision import at_least_single, copies, lower
from dibit.residual import Compressed, Mask, load, save
from dibit.step import Step

aten = torch.ops.aten


class Elementwise(torch.autograd.Function):
    """dx = dy * f'(x), from an exact mask of a piecewise linear f or from the kept derivative of a smooth one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, plain: Callable[[Tensor], Tensor], slope: Mask | Compressed, inplace: bool
    ) -> Tensor:
        save(ctx, slope)
        if inplace:
            ctx.mark_dirty(x)
        return plain(x)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (slope,) = load(ctx)
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
        if not dense(input) or not input.requires_grad or negative_slope < 0:
            return NotImplemented
        mask = step.note(Mask(ops.pack_mask(input.detach().contiguous()), float(negative_slope)))
        if saves == "input" and not inplace:
            step.plain(input)
        y = Elementwise.apply(input, lambda x: plain(x, negative_slope, inplace), mask, inplace)
        if saves == "output" or inplace:
            step.plain(y)
        return y

    return rule


_relu_in_place = masked(lambda x, _, inplace: torch.relu_(x), 0.0, "output")
leaky_relu = masked(lambda x, slope, inplace: F.leaky_relu(x, slope, inplace), 0.01, "input")


def relu(step: Step, input: Tensor, inplace: bool = False) -> Any:
    if inplace:
        return _relu_in_place(step, input, 0.0, True)
    if not dense(input) or not input.requires_grad:
        return NotImplemented
    result, bits = ops.relu(input.detach().contiguous())
    mask = step.note(Mask(bits, 0.0))
    y = Elementwise.apply(input, lambda _: result, mask, False)
    step.plain(y)
    return y


def relu_(step: Step, input: Tensor) -> Any:
    return relu(step, input, True)


def leaky_relu_(step: Step, input: Tensor, negative_slope: float = 0.01) -> Any:
    return leaky_relu(step, input, negative_slope, True)


@lower
def prelu(step: Step, input: Tensor, weight: Tensor) -> Any:
    if not dense(input, weight) or not (input.requires_grad or weight.requires_grad) or input.dim() < 2:
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
        if config is None or not dense(input) or not input.requires_grad:
            return NotImplemented
        kept = step.keep(derivative(input.detach(), *args), leaf=False, config=unreduced(config))
        if saves == "input":
            step.plain(input)
        elif saves == "copy in place":
            step.plain(input.nbytes if inplace else input)
        y = Elementwise.apply(input, lambda x: plain(x, inplace, *args), kept, inplace)
        if saves == "output":
            step.plain(y)
        return y

    return rule


def sigmoid_slope(x: Tensor) -> Tensor:
    y = at_least_single(torch.sigmoid(x))
    return y * (1 - y)


def tanh_slope(x: Tensor) -> Tensor:
    return 1 - at_least_single(torch.tanh(x)) ** 2


def silu_slope(x: Tensor) -> Tensor:
    return aten.silu_backward(torch.ones_like(x), x)


def gelu_slope(x: Tensor, approximate: str) -> Tensor:
    return aten.gelu_backward(torch.ones_like(x), x, approximate=approximate)


def elu_slope(x: Tensor, alpha: float) -> Tensor:
    return aten.elu_backward(torch.ones_like(x), alpha, 1, 1, False, x)


_sigmoid = smooth(lambda x, inplace: x.sigmoid_() if inplace else torch.sigmoid(x), sigmoid_slope, "output")
_tanh = smooth(lambda x, inplace: x.tanh_() if inplace else torch.tanh(x), tanh_slope, "output")
_silu = smooth(lambda x, inplace: F.silu(x, inplace), silu_slope, "copy in place")
_gelu = smooth(lambda x, _, approximate: F.gelu(x, approximate=approximate), gelu_slope)
_elu = smooth(lambda x, inplace, alpha: F.elu(x, alpha, inplace), elu_slope)


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
