"""Dropout keeps a seed, from which the mask is drawn again; or one bit an element of the mask that torch has drawn.

Either way the backward pass has the mask of the forward pass, and the gradient is exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dibit._torch.autocast import HALF
from dibit._torch.private import operations
from dibit.codec import ops
from dibit.codec.seed_stream import dropout_seed
from dibit.codec.torch_masks import bernoulli_bits
from dibit.engine.forward_pass import ForwardPass
from dibit.residuals.base import load, save
from dibit.residuals.masks import Mask, SeededMask
from dibit.rules.common import copy_or_return, first_order, is_plain_float
from dibit.rules.registry import rule


class SeededDropout(torch.autograd.Function):
    """y = x * m, m a function of (seed, element)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: SeededMask, inplace: bool) -> Tensor:
        ctx.hops = 0
        save(ctx, residual)
        if inplace:
            ctx.mark_dirty(x)
        return copy_or_return(x, ops.dropout(x.contiguous(), residual.seed, residual.p), inplace)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (residual,) = load(ctx)
        return residual.apply(dy), None, None


class ExactDropout(torch.autograd.Function):
    """The same where nothing is compressed; it can be differentiated any number of times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor, p: float, inplace: bool) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.p = p
        if inplace:
            ctx.mark_dirty(x)
        return copy_or_return(x, ops.dropout(x.contiguous(), seed, p), inplace)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return ExactDropout.apply(dy, ctx.saved_tensors[0], ctx.p, False), None, None, None


class MaskedDropout(torch.autograd.Function):
    """The mask and the product are torch's own, draw for draw; one bit an element of the mask stays."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: ForwardPass, p: float, inplace: bool, made: list[Mask]) -> Tensor:
        bits = None
        if x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous():
            bits = bernoulli_bits(x.numel(), 1 - p)
        if bits is not None:
            mask = Mask(bits, 0.0)
            y = copy_or_return(x, ops.scale_masked(x, bits, _scale(x, 1 - p)), inplace)
            forward.plain(x.nbytes)
        elif x.device.type == "cpu":
            noise = torch.empty_like(x).bernoulli_(1 - p)
            mask = Mask(ops.pack_mask(noise.detach().contiguous()), 0.0)
            noise.div_(1 - p)
            y = x.mul_(noise) if inplace else x * noise
            forward.plain(noise.nbytes)
        else:
            y, kept = operations.dropout(x, p)
            mask = Mask(ops.pack_mask(kept.to(torch.float32).contiguous()), 0.0)
            y = x.copy_(y) if inplace else y
            forward.plain(kept.nbytes)
        made.append(forward.note(mask))
        ctx.hops = 0
        save(ctx, mask)
        ctx.keep = 1 - p
        if inplace:
            ctx.mark_dirty(x)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (mask,) = load(ctx)
        return ops.scale_masked(dy.contiguous(), mask.bits, _scale(dy, ctx.keep)), None, None, None, None


def _scale(x: Tensor, keep: float) -> float:
    """What is kept is multiplied by this, rounded as torch rounds it: on a GPU in float32, whatever x has."""
    dtype = x.dtype if x.device.type == "cpu" or x.dtype not in HALF else torch.float32
    return float(torch.ones((), dtype=dtype).div_(keep))


def dropped(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """What `SeededDropout` gives, once more."""
    return copy_or_return(x, ops.dropout(x.contiguous(), seed, p), False)


def drops(x: Any, p: float) -> bool:
    """Whether Dibit can draw the mask: of (..., D) floating point, strided; p neither 0 nor 1.

    It may depend on nothing that differs when the forward pass is run again, such as whether x requires a gradient.
    """
    return 0 < p < 1 and is_plain_float(x) and bool(x.numel())


def seeded(x: Tensor, p: float, inplace: bool = False) -> Any:
    """Dropout with Dibit's mask, exact; `NotImplemented` where torch draws it."""
    return ExactDropout.apply(x, dropout_seed(x.device), float(p), inplace) if drops(x, p) else NotImplemented


@rule(kind="dropout", exact=True)
def dropout(forward: ForwardPass, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    config = forward.config
    if config is None or not training or not drops(input, p):
        return NotImplemented
    source = forward.sources.changing(input) if inplace else forward.sources.estimate(input)
    if config.dropout == "mask":
        if not input.requires_grad or (input.device.type != "cpu" and not operations.SHOWS_MASK):
            return NotImplemented
        masks: list[Mask] = []
        y = MaskedDropout.apply(input, forward, p, inplace, masks)
        forward.sources.passed(source, y, masks[0], 1 / (1 - p))
        return y
    residual = SeededMask(dropout_seed(input.device), float(p))
    if input.requires_grad:
        forward.plain(input.numel() * (input.element_size() if input.device.type == "cpu" else 1))
        forward.note(residual)
    y = SeededDropout.apply(input, residual, inplace)
    if not inplace:
        forward.lossless.tape.made(dropped, (input, residual.seed, residual.p), y)
    if not inplace and forward.held(input) and forward.lossless.steady(input):
        forward.sources.derived(y, SeededMask(residual.seed, residual.p, input))
    forward.sources.passed(source, y, residual)
    return y
