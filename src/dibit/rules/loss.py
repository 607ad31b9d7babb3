"""Log-softmax and losses inside the model: cross-entropy, NLL, MSE, binary cross-entropy with logits.

The gradients of log-softmax and of both cross-entropies are linear in the probabilities p, that of MSE in the
difference. An unbiased code of p, never of log p, gives an unbiased gradient. p has 8 bits whatever the recipe: it lies
in [0, 1], and the gradient p - y of a trained model is small. NLL needs the targets alone. If the model returns the
result of a log-softmax, p is computed from that, exactly.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dibit._torch.autocast import HALF, at_least_single, full_precision
from dibit._torch.storage_identity import storage_key
from dibit.engine.forward_pass import ForwardPass
from dibit.residuals.base import Residual, load, save
from dibit.residuals.exact import Exact, exact
from dibit.rules.common import eight_bit, first_order, is_plain_float, running_config
from dibit.rules.registry import rule
from dibit.rules.returned import KeptApart


class Probabilities(KeptApart):
    """exp(y) of a log-softmax's result y: by a reference to y if the model returns that, else by their codes."""

    def __init__(self, forward: ForwardPass, y: Tensor) -> None:
        self.exact: Exact | None = exact(y.detach())  # y itself will hold the graph, and with it this object
        self.residual: Residual | None = None
        self.config = eight_bit(running_config(forward))
        forward.settle_later(self)

    def settle(self, forward: ForwardPass, returned: set[int]) -> None:
        assert self.exact is not None
        if storage_key(self.exact.x) in returned:
            forward.kept(self.exact.x, how="reference (returned)")
        else:
            self.residual = forward.keep(self.exact.restore().exp(), leaf=False, config=self.config)
            self.exact = None

    def value(self) -> Tensor:
        self.use()
        if self.residual is not None:
            p = self.residual.value()
        else:
            assert self.exact is not None
            p = self.exact.restore().exp()
        self.used()
        return p

    def drop(self) -> None:
        self.exact = self.residual = None


class LogSoftmax(torch.autograd.Function):
    """dx = dy - p sum(dy), linear in p."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, dtype: torch.dtype | None, forward: ForwardPass) -> Tensor:
        y = F.log_softmax(x, dim, dtype=dtype)
        ctx.p, ctx.dim, ctx.dtype = Probabilities(forward, y), dim, x.dtype
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        p = ctx.p.value().to(dy.dtype)
        return (dy - p * dy.sum(ctx.dim, keepdim=True)).to(ctx.dtype), None, None, None


class CrossEntropy(torch.autograd.Function):
    """Class indices (N,) against scores (N, C): dx = w_target (p - onehot) / normaliser."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, target: Tensor, weight: Any, ignore: int, reduction: str, forward: ForwardPass
    ) -> Tensor:
        loss = F.cross_entropy(x, target, weight, ignore_index=ignore, reduction=reduction)
        probabilities = torch.softmax(at_least_single(x.detach()), 1)
        p = forward.keep(probabilities, leaf=False, config=eight_bit(running_config(forward)))
        scale = _target_scale(target, weight, ignore, reduction, probabilities.dtype)
        ctx.dtype = x.dtype
        kept = forward.pack_index(target)
        save(ctx, p, kept.x, scale)
        ctx.target = kept.with_tensor(torch.empty(0))
        if scale is not None:
            forward.kept(scale)
        return loss

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        p, target, scale = load(ctx)
        target = ctx.target.with_tensor(target).restore()
        per_row = scale * dy
        dx = p.value() * per_row[:, None]
        # an ignored target has scale 0; its index may lie outside
        dx.scatter_add_(1, target.clamp(0, dx.shape[1] - 1)[:, None], -per_row[:, None])
        return dx.to(ctx.dtype), None, None, None, None, None


class NLL(torch.autograd.Function):
    """dx = -w_target / normaliser at the target: nothing of x is needed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, target: Tensor, weight: Any, ignore: int, reduction: str, forward: ForwardPass
    ) -> Tensor:
        scale = _target_scale(target, weight, ignore, reduction, torch.float32 if x.dtype in HALF else x.dtype)
        kept = forward.pack_index(target)
        save(ctx, kept.x, scale)
        ctx.target, ctx.shape = kept.with_tensor(torch.empty(0)), x.shape
        forward.kept(scale, how="target")
        return F.nll_loss(x, target, weight, ignore_index=ignore, reduction=reduction)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        target, scale = load(ctx)
        target = ctx.target.with_tensor(target).restore()
        dx = dy.new_zeros(ctx.shape)
        dx.scatter_(1, target.clamp(0, dx.shape[1] - 1)[:, None], -(scale * dy)[:, None].to(dx.dtype))
        return dx, None, None, None, None, None


class SquaredError(torch.autograd.Function):
    """dx = 2 (x - t) dy (/ n for the mean): the difference enters once on either side."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, reduction: str, kept: Any) -> Tensor:
        save(ctx, kept)
        ctx.scale = 2 / x.numel() if reduction == "mean" else 2
        return F.mse_loss(x, target, reduction=reduction)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (kept,) = load(ctx)
        dx = kept.value() * (dy * ctx.scale)
        return dx, -dx if ctx.needs_input_grad[1] else None, None, None


class BinaryCrossEntropy(torch.autograd.Function):
    """With logits: dx = (sigmoid(x) - t) dy, linear in the probability; the target is kept by reference."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, weight: Any, reduction: str, forward: ForwardPass) -> Tensor:
        loss = F.binary_cross_entropy_with_logits(x, target, weight, reduction=reduction)
        kept = forward.keep_factor(torch.sigmoid(x.detach()) - target, eight_bit(running_config(forward)), fixed=True)
        save(ctx, kept, weight)
        ctx.scale = 1 / x.numel() if reduction == "mean" else 1
        return loss

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        kept, weight = load(ctx)
        dx = kept.value() * (dy * ctx.scale)
        return dx if weight is None else dx * weight, None, None, None, None


def _target_scale(target: Tensor, weight: Any, ignore: int, reduction: str, dtype: torch.dtype) -> Tensor:
    """w_target over the normaliser: (N,), 0 where the target is ignored."""
    used = target != ignore
    scale = used.to(dtype) if weight is None else weight[target.clamp(0, len(weight) - 1)].to(dtype) * used
    return scale / scale.sum() if reduction == "mean" else scale


@rule(autocast=full_precision(lambda x: F.log_softmax(x, 1)))
def log_softmax(
    forward: ForwardPass, input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Any:
    if dim is None or not is_plain_float(input) or not input.requires_grad or input.dim() == 0:
        return NotImplemented
    y = LogSoftmax.apply(input, dim, dtype, forward)
    forward.plain(y)
    return y


def _indexed(input: Tensor, target: Tensor, reductions: tuple[Any, Any], reduction: str) -> bool:
    return (
        is_plain_float(input)
        and input.requires_grad
        and input.dim() == 2
        and target.dtype == torch.int64
        and target.dim() == 1
        and target.numel() > 0
        and reductions == (None, None)
        and reduction in ("mean", "sum", "none")
    )


def _whole_cross_entropy(x: Tensor) -> Tensor:
    """In float32 if autocast runs all of it there, and not the part behind the log-softmax alone."""
    x = torch.arange(8, device=x.device).view(2, 4).sin().to(x.dtype)
    target = torch.zeros(2, dtype=torch.int64, device=x.device)
    loss = F.cross_entropy(x, target)
    return loss if torch.equal(loss, F.cross_entropy(x.float(), target)) else x


@rule(autocast=full_precision(_whole_cross_entropy))
def cross_entropy(
    forward: ForwardPass,
    input: Tensor,
    target: Tensor,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if label_smoothing or not _indexed(input, target, (size_average, reduce), reduction):
        return NotImplemented
    forward.plain(input.nbytes, target, weight, input.element_size())  # the last: the sum of weights
    return CrossEntropy.apply(input, target, weight, ignore_index, reduction, forward)


@rule(autocast=full_precision(lambda x: F.nll_loss(x, torch.zeros(2, dtype=torch.int64, device=x.device))))
def nll_loss(
    forward: ForwardPass,
    input: Tensor,
    target: Tensor,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    if not _indexed(input, target, (size_average, reduce), reduction):
        return NotImplemented
    forward.plain(input, target, weight, input.element_size())  # the last: the sum of weights
    return NLL.apply(input, target, weight, ignore_index, reduction, forward)


@rule(autocast=full_precision(lambda x: F.mse_loss(x, x)))
def mse_loss(
    forward: ForwardPass,
    input: Tensor,
    target: Tensor,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    weight: Any = None,
) -> Any:
    config = forward.config
    if config is None or (size_average, reduce, weight) != (None, None, None) or input.shape != target.shape:
        return NotImplemented
    if not is_plain_float(input, target) or not (input.requires_grad or target.requires_grad):
        return NotImplemented
    forward.plain(input, target)
    kept = forward.keep_factor(input.detach() - target.detach(), replace(config, reduce=None))
    return SquaredError.apply(input, target, reduction, kept)


@rule(autocast=full_precision(lambda x: F.binary_cross_entropy_with_logits(x, x)))
def binary_cross_entropy_with_logits(
    forward: ForwardPass,
    input: Tensor,
    target: Tensor,
    weight: Any = None,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    pos_weight: Any = None,
) -> Any:
    if (size_average, reduce, pos_weight) != (None, None, None) or input.shape != target.shape:
        return NotImplemented
    if not is_plain_float(input, target) or not input.requires_grad or target.requires_grad:
        return NotImplemented
    if weight is not None and (weight.requires_grad or weight.shape != input.shape):
        return NotImplemented
    forward.plain(input, target, weight)
    return BinaryCrossEntropy.apply(input, target, weight, reduction, forward)
