r"""BatchNorm, InstanceNorm and LayerNorm keep the normalised input :math:`\hat x`, never x.

.. math:: dx = \gamma / \sigma \, (dy - \mathrm{mean}(dy) - \hat x \, \mathrm{mean}(dy \, \hat x))

has :math:`\hat x` twice. With a reduction (`Project`, `Sample`) the two uses take two independent draws, and the
product is unbiased. Without, one draw serves both, and the error of an element would meet itself, so that is corrected:

- With dither, the variance of the error is known: a twelfth of a bin's square, which is subtracted.
- With stochastic rounding, the codes are decoded twice, with dither 0 and 2. The errors of the two are uncorrelated.
- With other levels than uniform ones, an estimate of the variance is subtracted.

In the code below, `inner` is the residual from which the sum in mean(dy x_hat) is made, and `outer` the one that serves
the element's own term, the x_hat in front of that mean. The gradient of gamma is a sum, too: BatchNorm takes `inner`
for it, LayerNorm `outer`. If one draw serves both uses, BatchNorm's two are the same object, and LayerNorm's `inner` is
`None`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dibit._torch.autocast import at_least_single, full_precision
from dibit._torch.huge_pages import empty_like
from dibit._torch.private import operations
from dibit.codec import Affine, ops
from dibit.config import Config, Project, Sample
from dibit.engine.forward_pass import ForwardPass
from dibit.engine.noise.meter import Meter
from dibit.residuals.base import load, save
from dibit.rules import large_outputs
from dibit.rules.common import first_order, is_plain_float, own, running_config, without_reduction
from dibit.rules.registry import rule


def norm_config(forward: ForwardPass, shape: torch.Size, columns: bool, place: str) -> Config:
    """The codec of a norm's normalised input (..., D), with statistics of its columns or of its rows.

    Args:
        place: the norm's name, see `Measuring.operation`.
    """
    config = running_config(forward)
    own = config.norm or without_reduction(config)
    if config.noise is not None:
        own = forward.measuring.norm_config(place, own, shape, columns)
    return own.resolve(shape[:-1].numel())


FEW_POSITIONS = 8  # instances of fewer positions stay with torch


class BatchNorm(torch.autograd.Function):
    """Statistics over all dimensions but 1, of the batch (training) or given (evaluation)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Any,
        bias: Any,
        running: tuple[Any, Any],
        training: bool,
        momentum: float,
        eps: float,
        forward: ForwardPass,
    ) -> Tensor:
        y, mean, inverse = large_outputs.batch_norm(x, weight, bias, *running, training, momentum, eps)
        forward.plain(mean.nbytes + inverse.nbytes if training else 0)
        mean, inverse = at_least_single(mean), at_least_single(inverse)
        outer = inner = None
        place = ""
        if training or ctx.needs_input_grad[1]:
            rows = x.detach().movedim(1, -1)
            rows = rows[0] if rows_of_one(x) else rows
            normalised = Affine(mean, inverse, from_statistics=training)
            place = forward.measuring.operation("norm")
            outer, inner = keep_normalised(forward, rows, normalised, training and ctx.needs_input_grad[0], place)
        ctx.shared = outer is inner
        ctx.meter = forward.measuring.meter(place) if outer is not None else None
        ctx.measured = ctx.meter.key if ctx.meter else ""
        save(ctx, None if ctx.shared else outer, inner, inverse, weight)
        ctx.training, ctx.dtypes = training, (x.dtype, weight.dtype if weight is not None else None)
        ctx.format = _format(x)
        ctx.hops, ctx.fresh_result = None if training else 0, True
        y = own(y)
        if x.dim() == 2 or rows_of_one(x):  # of others the channels are moved to the end
            forward.sources.normed(y if x.dim() == 2 else y[0].t(), inner, weight, bias)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        outer, inner, inverse, weight = load(ctx)
        g = dy.movedim(1, -1)
        shape = g.shape
        g = g.reshape(-1, shape[-1]).to(inverse.dtype)
        needed = ctx.needs_input_grad[0]
        dx: Tensor | None
        product: Tensor | None
        if ctx.training and needed:
            assert inner is not None
            dx, product, total = batch_norm_gradient(
                g, None if ctx.shared else outer, inner, inverse, weight, ctx.meter
            )
        else:
            total = g.sum(0)
            product = column_sums(inner, g) if inner is not None else None
            dx = g * (inverse if weight is None else inverse * weight) if needed else None
        if dx is not None:
            dx = dx.view(shape).movedim(-1, 1).to(ctx.dtypes[0]).contiguous(memory_format=ctx.format)
        dw = None if product is None or not ctx.needs_input_grad[1] else product.to(ctx.dtypes[1])
        db = total.to(ctx.dtypes[1]) if ctx.needs_input_grad[2] else None
        return dx, dw, db, None, None, None, None, None


def rows_of_one(x: Tensor) -> bool:
    """Whether x (1, D, N) holds the rows of one matrix, as InstanceNorm's and BatchNorm's users transpose them."""
    return x.dim() == 3 and x.shape[0] == 1


def _format(x: Tensor) -> torch.memory_format:
    """The layout that torch gives the gradient of x."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def keep_normalised(forward: ForwardPass, rows: Tensor, normalised: Affine, both: bool, place: str) -> tuple[Any, Any]:
    """Draws of the normalised input (..., D), for its element's own term (where `both`) and for the sums over rows."""
    config = norm_config(forward, rows.shape, True, place)
    inner = forward.keep_affine(rows, normalised, config, watched=config.reduce is not None)
    if not both:
        return None, inner
    # a draw that serves both uses needs all rows
    return (forward.keep_affine(rows, normalised, config, watched=False) if config.reduce else inner), inner


class LayerNorm(torch.autograd.Function):
    """Statistics over the last dimensions, for each row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: list[int], weight: Any, bias: Any, eps: float, forward: ForwardPass
    ) -> Tensor:
        y, mean, inverse = operations.layer_norm(x, shape, weight, bias, eps)
        width = int(torch.Size(shape).numel())
        forward.plain(mean.nbytes + inverse.nbytes)
        mean, inverse = at_least_single(mean), at_least_single(inverse)
        rows = ((x.detach() - mean) * inverse).reshape(-1, width)
        place = forward.measuring.operation("norm")
        config = norm_config(forward, rows.shape, False, place)
        outer = forward.keep(rows, leaf=False, config=config)
        inner = forward.keep(rows, leaf=False, config=config) if isinstance(config.reduce, Project) else None
        inverse = inverse.reshape(-1, 1)
        forward.kept(inverse)
        save(ctx, outer, inner, inverse, weight)
        ctx.meter = forward.measuring.meter(place)
        ctx.measured = ctx.meter.key if ctx.meter else ""
        ctx.shape, ctx.dtypes = shape, (x.dtype, y.dtype if weight is None else weight.dtype)
        ctx.hops = 0 if len(shape) == 1 else None
        forward.sources.normed(y, outer, weight, bias)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        outer, inner, inverse, weight = load(ctx)
        rows = dy.reshape(inverse.shape[0], -1).to(inverse.dtype)
        dx, dw, db = layer_norm_gradient(
            rows, outer, inner, inverse, weight, tuple(ctx.needs_input_grad[i] for i in (0, 2, 3)), ctx.meter
        )
        dx = None if dx is None else dx.view(dy.shape).to(ctx.dtypes[0])
        dw, db = (None if part is None else part.view(ctx.shape).to(ctx.dtypes[1]) for part in (dw, db))
        return dx, None, dw, db, None, None


def batch_norm_gradient(
    g: Tensor, outer: Any, inner: Any, inverse: Tensor, weight: Tensor | None, meter: Meter | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (N, D), dw and db (D,) of a BatchNorm in training, for dY g (N, D); `outer` is `None` where `inner` serves."""
    count = g.shape[0]
    total = g.sum(0)
    product = column_sums(inner, g)
    gain = inverse if weight is None else inverse * weight
    shared = outer is None
    dx = norm_gradient(g, total / count, inner if shared else outer, product / count, gain, shared)
    if meter is not None:
        kept = inner.encoded.reduced() if inner.encoded is not None else inner.value().reshape(g.shape)
        meter.norm((gain * product).square().sum() / count, dx, relative_variance(inner if shared else outer), kept)
    return dx, product, total


def layer_norm_gradient(
    rows: Tensor,
    outer: Any,
    inner: Any,
    inverse: Tensor,
    weight: Tensor | None,
    needed: tuple[bool, ...] = (True, True, True),
    meter: Meter | None = None,
) -> tuple[Any, Any, Any]:
    """dx (N, D), dw and db (D,) of a norm over rows, for dY (N, D); `inner` may be `None`: one draw."""
    dx = None
    if needed[0]:
        g = rows if weight is None else rows * weight.reshape(-1)
        dx = g - g.mean(1, keepdim=True)
        if inner is not None:
            dx -= outer.value() * (g * inner.value()).mean(1, keepdim=True)
        else:  # both uses lie in one row: one draw, sampled rows take their weight once
            packed = outer.encoded
            sample = packed.sample(g.dtype)
            part = g if sample is None else g.index_select(0, sample[0])
            first, second = two_decodings(outer)
            share = (part * second).mean(1, keepdim=True)
            term = first * share
            if needs_variance_correction(outer):
                term -= part * packed.variance() / part.shape[1]
            if sample is None:
                dx -= term
            else:
                dx.index_add_(0, sample[0], term * sample[1][:, None], alpha=-1)
            if meter is not None:
                gain = inverse if sample is None else inverse.index_select(0, sample[0]) * sample[1][:, None].sqrt()
                along = (gain * share).square().sum() * part.shape[1]
        dx = dx * inverse
        if meter is not None and inner is None:
            meter.norm(along, dx, relative_variance(outer))
    dw = column_sums(outer, rows) if needed[1] else None
    return dx, dw, rows.sum(0) if needed[2] else None


def relative_variance(kept: Any) -> float:
    """The variance of what is kept of a normalised input over its square, by rows that are left out and by rounding."""
    if kept.encoded is None:
        return 0.0
    sample = kept.encoded.config.reduce
    return float(sample.ratio - 1) if isinstance(sample, Sample) else 0.2 * 4.0 ** (2 - kept.encoded.config.bits)


def needs_variance_correction(kept: Any) -> bool:
    """Whether one draw used twice needs the rounding variance taken off."""
    if kept.encoded is None:
        return False
    config = kept.encoded.config
    return config.rounding == "dither" or (config.levels != "uniform" and _random(config))


def two_decodings(kept: Any) -> tuple[Tensor, Tensor]:
    """Two estimates of one draw (reduced rows), whose errors are uncorrelated but for `needs_variance_correction`."""
    if kept.encoded is None:
        return kept.value(), kept.value()
    packed = kept.encoded
    if needs_variance_correction(kept) or not _random(packed.config):
        value = packed.reduced()
        return value, value
    return packed.reduced(0.0), packed.reduced(2.0)


def _random(config: Config) -> bool:
    return config.rounding != "nearest"


def column_sums(kept: Any, g: Tensor) -> Tensor:
    """sum over rows of g * x_hat: (D,) for g (N, D)."""
    kept.observe(g)
    if kept.encoded is None or isinstance(kept.encoded.config.reduce, Project):
        return (g * kept.value().reshape(g.shape)).sum(0)
    packed = kept.encoded
    if (sample := packed.sample(g.dtype)) is not None:
        index, weight = sample
        return (g.index_select(0, index) * weight[:, None] * packed.reduced()).sum(0)
    if packed.config.levels != "uniform":
        return (g * two_decodings(kept)[1]).sum(0)
    dither = {"dither": 1.0, "stochastic": 2.0, "nearest": 0.0}[packed.config.rounding]
    return ops.column_sums(
        packed.codes, packed.ranges, packed.seed, g.contiguous(), packed.config.bits, packed.block, dither
    )


def norm_gradient(g: Tensor, mean: Tensor, kept: Any, product: Tensor, gain: Tensor, shared: bool) -> Tensor:
    """(g - mean - x_hat * product) * gain; `shared`: the same draw made `product`, the mean of g * x_hat."""
    if kept.encoded is None or isinstance(kept.encoded.config.reduce, Project):
        return (g - mean - kept.value().reshape(g.shape) * product) * gain
    packed = kept.encoded
    if (sample := packed.sample(g.dtype)) is not None:
        index, weight = sample
        dx = torch.addcmul(-mean * gain, g, gain, out=empty_like(g))
        return dx.index_add_(0, index, packed.reduced() * weight[:, None] * (product * gain), alpha=-1)
    if packed.config.levels == "uniform" and (shared or packed.config.rounding != "dither"):
        return ops.norm_gradient(
            packed.codes,
            packed.ranges,
            packed.seed,
            g.contiguous(),
            mean,
            product,
            gain,
            packed.config.bits,
            packed.block,
            float(packed.config.rounding == "dither"),
        )
    dx = g - mean
    if shared and needs_variance_correction(kept):
        dx += g / g.shape[0] * packed.variance()
    dx -= packed.reduced() * product
    return dx.mul_(gain)


@rule(kind="norm inputs")
def batch_norm(
    forward: ForwardPass,
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    needs = any(t is not None and t.requires_grad for t in (input, weight, bias))
    if not needs or not is_plain_float(input) or input.dim() < 2 or (not training and running_mean is None):
        return NotImplemented
    if training and input.numel() <= input.shape[1]:
        return NotImplemented  # torch's own error, or an empty batch
    forward.plain(input)
    return BatchNorm.apply(input, weight, bias, (running_mean, running_var), training, momentum, eps, forward)


@rule(kind="norm inputs")
def instance_norm(
    forward: ForwardPass,
    input: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """InstanceNorm of one matrix (1, D, N), as PyTorch Geometric gives a graph: torch's own BatchNorm of it.

    Of several instances, or of few positions, whose x_hat is nearly the same whatever x is, it stays exact.
    """
    needs = any(t is not None and t.requires_grad for t in (input, weight, bias))
    if not needs or not is_plain_float(input) or not rows_of_one(input) or forward.low is not None:
        return NotImplemented
    if weight is None and running_mean is not None and running_mean.dtype != input.dtype:
        return NotImplemented  # torch's own result then is that of no running statistics
    if input.shape[2] < FEW_POSITIONS or not input.numel() or (not use_input_stats and running_mean is None):
        return NotImplemented
    x = input.contiguous()
    given = running_mean, running_var
    running = tuple(None if t is None else t.detach().clone() for t in given)
    weight, bias = (None if t is None else t.repeat(1) for t in (weight, bias))
    forward.plain(x, weight, *running)
    y = BatchNorm.apply(x, weight, bias, running, use_input_stats, momentum, eps, forward)
    with torch.no_grad():
        for own, repeated in zip(given, running, strict=True):
            if own is not None and repeated is not None:
                own.copy_(repeated)
    return y


@rule(kind="norm inputs", autocast=full_precision(lambda x: F.layer_norm(x, (2,))))
def layer_norm(
    forward: ForwardPass,
    input: Tensor,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Any:
    needs = any(t is not None and t.requires_grad for t in (input, weight, bias))
    if not needs or not is_plain_float(input) or input.numel() == 0:
        return NotImplemented
    forward.plain(input)
    return LayerNorm.apply(input, list(normalized_shape), weight, bias, eps, forward)
