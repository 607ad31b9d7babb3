"""Activations: ReLU, LeakyReLU and PReLU; GELU, SiLU, Mish and Hardswish; ELU, sigmoid, tanh and erf.

*ReLU, LeakyReLU, PReLU* keep one bit an element, which of the two slopes the gradient is multiplied by: dX is exact.
PReLU's weight has the gradient sum(dy min(x, 0)). A code of min(x, 0) enters that gradient and no other, so it is
unbiased.

*The others* keep their derivative, and dX has one estimate of it (`dibit.rules.elementwise`).

The derivatives of ELU, sigmoid, tanh and erf fall towards 0 where these functions saturate. A logarithm that follows
has a large derivative just there, so their error is a part of each element, not of the range of a block
(`dibit.rules.relative`). If the model returns the result of a sigmoid or tanh, the derivative is computed from that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dibit._torch.autocast import copies, low_precision
from dibit._torch.private import derivatives
from dibit.codec import ops
from dibit.engine.forward_pass import ForwardPass
from dibit.engine.model_state import Rule
from dibit.residuals.base import load, save
from dibit.residuals.masks import Mask
from dibit.rules.common import first_order, is_plain_float
from dibit.rules.elementwise import (
    RECIPE,
    RELATIVE,
    SATURATING,
    Elementwise,
    Pointwise,
    elementwise,
    elementwise_rule,
)
from dibit.rules.registry import rule


@rule(kind="ReLU", in_place=True, runs_again=True, saves_result=True, exact=True, in_its_row=True)
def relu(forward: ForwardPass, input: Tensor, inplace: bool = False) -> Any:
    if not is_plain_float(input) or not input.requires_grad:
        return NotImplemented
    x = input.detach()
    if inplace:
        return _masked(forward, input, ops.pack_mask(x.contiguous()), 0.0, F.relu_, True)
    if x.is_contiguous():
        result, bits = ops.relu(x)
    else:  # torch's own layout
        result, bits = F.relu(x), ops.pack_mask(x.contiguous())
    return _masked(forward, input, bits, 0.0, lambda _: result, False)


@rule(in_place=True, runs_again=True, exact=True, in_its_row=True)
def leaky_relu(forward: ForwardPass, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    if not is_plain_float(input) or not input.requires_grad or negative_slope < 0:
        return NotImplemented
    if not inplace:
        forward.plain(input)
    bits = ops.pack_mask(input.detach().contiguous())
    compute = functools.partial(F.leaky_relu, negative_slope=negative_slope, inplace=inplace)
    return _masked(forward, input, bits, float(negative_slope), compute, inplace, saves_result=inplace)


def _masked(
    forward: ForwardPass,
    input: Tensor,
    bits: Tensor,
    slope: float,
    compute: Callable[[Tensor], Tensor],
    inplace: bool,
    saves_result: bool = True,
) -> Any:
    """The result of a piecewise linear function whose derivative is 1 where `bits` says x > 0, else `slope`."""
    mask = forward.note(Mask(bits, slope))
    source = forward.sources.changing(input) if inplace else forward.sources.estimate(input)
    y = Elementwise.apply(input, compute, mask, inplace)
    forward.sources.passed(source, y, mask)
    if saves_result:
        forward.plain(y)
    return y


class PReLU(torch.autograd.Function):
    """y = max(x, 0) + w min(x, 0); dw sums dy * min(x, 0), which enters no other gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: Mask, negative: Any, low: torch.dtype | None) -> Tensor:
        ctx.hops = 0
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


@rule(autocast=low_precision, in_its_row="PreluKernel")
def prelu(forward: ForwardPass, input: Tensor, weight: Tensor) -> Any:
    if not is_plain_float(input, weight) or not (input.requires_grad or weight.requires_grad) or input.dim() < 2:
        return NotImplemented
    forward.plain(input, weight)
    x = copies(forward.low, input.detach())[0]
    # torch's rule here is x > 0, so NaN takes the weight: the 0/1 tensor packs just that
    mask = forward.note(Mask(ops.pack_mask((x > 0).to(torch.float32)), 0.0))
    negative = forward.keep(x.clamp(max=0), leaf=False) if weight.requires_grad else None
    return PReLU.apply(input, weight, mask, negative, forward.low)


def smooth(plain: Callable[..., Tensor], derivative: Callable[..., Tensor]) -> Rule:
    """A rule of your own for a smooth element-wise function, for `dibit.compress(model, rules={function: rule})`.

    Args:
        plain: the function of (x, inplace, *options).
        derivative: of (x, *options), bounded, at least as exact as the function; it is kept at the recipe's bits.
    """
    return elementwise_rule(
        Pointwise(
            lambda x, *options: plain(x, False, *options),
            derivative,
            None,
            RECIPE,
            lambda x, *options: plain(x, True, *options),
        )
    )


def _gelu(x: Tensor, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate)


gelu = elementwise("gelu", _gelu, derivatives.gelu, codec=RECIPE)
silu = elementwise("silu", F.silu, derivatives.silu, codec=RECIPE)
mish = elementwise("mish", F.mish, derivatives.mish, codec=RECIPE)
hardswish = elementwise("hardswish", F.hardswish, derivatives.hardswish, codec=RECIPE, in_vectors=False)
elu = elementwise("elu", F.elu, derivatives.elu, derivatives.elu_of_result, codec=SATURATING)
sigmoid = elementwise(
    "sigmoid", torch.sigmoid, of_result=lambda y: y * (1 - y), codec=RELATIVE, runs_again=True, positive=True
)
erf = elementwise("erf", torch.erf, lambda x: 2 / math.pi**0.5 * torch.exp(-x * x), codec=SATURATING)
softsign = elementwise(
    "softsign",
    F.softsign,
    lambda x: (1 + x.abs()).square().reciprocal(),
    codec=SATURATING,
    beside=lambda x: x.nbytes,
    in_vectors=False,
)
tanh = elementwise(
    "tanh", torch.tanh, of_result=lambda y: 1 - y**2, codec=SATURATING, in_vectors=False, runs_again=True
)
