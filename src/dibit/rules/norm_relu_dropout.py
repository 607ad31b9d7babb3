"""BatchNorm, ReLU and dropout in one pass over the data: `dibit.nn.norm_relu_dropout`.

Kept are the normalised input, one bit an element for ReLU, and a seed for dropout, as the three rules keep them. The
gradient is unbiased for the reasons given in `dibit.rules.norm`; masks are exact.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dibit._torch.autocast import at_least_single
from dibit.codec import Affine, ops, seed_tensor
from dibit.codec.seed_stream import dropout_seed
from dibit.engine.forward_pass import ForwardPass
from dibit.residuals.base import load, save
from dibit.residuals.masks import Mask, SeededMask
from dibit.rules.activation import relu
from dibit.rules.common import first_order, is_plain_float
from dibit.rules.dropout import dropout
from dibit.rules.norm import batch_norm_gradient, keep_normalised
from dibit.rules.registry import rule


class NormReLUDropout(torch.autograd.Function):
    """y = m * max(0, gain * x_hat + bias), statistics of the batch; m of a seed, or 1 where p is 0."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Any,
        bias: Any,
        running: tuple[Any, Any],
        momentum: float,
        eps: float,
        p: float,
        forward: ForwardPass,
    ) -> Tensor:
        mean, inverse = _statistics(x, running, momentum, eps)
        gain = inverse if weight is None else inverse * weight
        shift = torch.zeros_like(mean) if bias is None else bias.detach().to(mean.dtype)
        seed = dropout_seed(x.device) if p else seed_tensor(0, x.device)
        y, bits = ops.norm_relu_dropout(x, mean, gain, shift, seed, p)
        mask = forward.note(Mask(bits, 0.0))
        if p:
            forward.note(SeededMask(seed, p))
        # plain torch keeps the statistics, the ReLU's output and dropout's mask
        noise = x.numel() * (x.element_size() if x.device.type == "cpu" else 1)
        forward.plain(mean.nbytes + inverse.nbytes, y.nbytes, noise if p else 0)
        place = forward.measuring.operation("norm")
        normalised = Affine(mean, inverse, from_statistics=True)
        outer, inner = keep_normalised(forward, x, normalised, ctx.needs_input_grad[0], place)
        ctx.meter = forward.measuring.meter(place) if outer is not None else None
        ctx.measured = ctx.meter.key if ctx.meter else ""
        ctx.shared, ctx.p = outer is inner, p
        ctx.dtypes = x.dtype, None if weight is None else weight.dtype
        save(ctx, None if ctx.shared else outer, inner, inverse, weight, mask, seed if p else None)
        forward.sources.normed(y, inner, weight, bias, (mask, SeededMask(seed, p)) if p else (mask,))
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        outer, inner, inverse, weight, mask, seed = load(ctx)
        seed = seed_tensor(0, dy.device) if seed is None else seed
        g = ops.relu_dropout_gradient(dy.contiguous(), mask.bits, seed, ctx.p).to(inverse.dtype)
        dx, dw, db = batch_norm_gradient(g, None if ctx.shared else outer, inner, inverse, weight, ctx.meter)
        needs = ctx.needs_input_grad
        x_dtype, w_dtype = ctx.dtypes
        return (
            dx.to(x_dtype) if needs[0] else None,
            dw.to(w_dtype) if needs[1] else None,
            db.to(w_dtype) if needs[2] else None,
            None,
            None,
            None,
            None,
            None,
        )


def _statistics(x: Tensor, running: tuple[Any, Any], momentum: float, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation (D,) of the rows of x, of single precision at least; running ones follow."""
    var, mean = torch.var_mean(at_least_single(x), 0, correction=0)
    if running[0] is not None:
        n = x.shape[0]
        running[0].lerp_(mean.to(running[0].dtype), momentum)
        running[1].lerp_((var * (n / (n - 1))).to(running[1].dtype), momentum)
    return mean, torch.rsqrt(var + eps)


@rule(kind="norm inputs", exact=True)
def norm_relu_dropout(
    forward: ForwardPass,
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    p: float,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    config, given = forward.config, [t for t in (weight, bias) if t is not None]
    if config is None or not is_plain_float(input, *given):
        return NotImplemented
    if input.dim() != 2 or input.shape[0] < 2 or not input.numel():
        return NotImplemented
    if not training or not 0 <= p < 1 or not any(t.requires_grad for t in (input, *given)):
        return NotImplemented
    forward.plain(input)
    running = running_mean, running_var
    if config.lossless:  # torch's own BatchNorm, and masks of 1 bit
        forward.plain(2 * input.shape[1] * input.element_size())  # its statistics
        own, y = 0.0, relu(forward, F.batch_norm(input, *running, weight, bias, True, momentum, eps))
    else:
        own = float(p) if config.dropout == "seed" else 0.0
        y = NormReLUDropout.apply(input.contiguous(), weight, bias, running, momentum, eps, own, forward)
    if own == p:
        return y
    masked = dropout(forward, y, p, training)
    return y if masked is NotImplemented else masked
