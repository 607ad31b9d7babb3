"""The `autograd.Function`s of compiled code: plain forward, codes by `dibit.compile.ops`, all of it traceable.

`key`, `draw` and `text` identify a residual: which pass, which residual in the pass, which config.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dibit._torch.private import operations
from dibit.codec import ops as codec
from dibit.compile import ops
from dibit.compile.config_text import LEAF, NORM
from dibit.rules.common import as_rows


class Linear(torch.autograd.Function):
    """y = x W^T + b, W (O, D), or y = x W, W (D, O), for `product`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, product: bool, key: Tensor, draw: int, text: str
    ) -> Tensor:
        kept = ops.keep(as_rows(x), None, None, key, draw, text, LEAF)
        ctx.save_for_backward(weight, key, *kept)
        ctx.product, ctx.draw, ctx.text = product, draw, text
        ctx.width, ctx.dtypes = x.shape[-1], (x.dtype, None if bias is None else bias.dtype)
        return torch.matmul(x, weight) if product else F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        weight, key, *kept = ctx.saved_tensors
        rows = as_rows(dy)
        dw = ops.outer(rows, kept, key, ctx.draw, ctx.width, ctx.dtypes[0], ctx.text).to(weight.dtype)
        return *_rest(ctx, dy, rows, weight, dw, ctx.dtypes), None, None, None, None


class DroppedLinear(torch.autograd.Function):
    """The same for y = dropout(x) W^T + b of an x that the caller holds: nothing is kept but the key."""

    @staticmethod
    def forward(
        ctx: Any, dropped: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, key: Tensor, draw: int, p: float
    ) -> Tensor:
        ctx.save_for_backward(weight, key, x)
        ctx.product, ctx.draw, ctx.p = False, draw, p
        ctx.dtypes = dropped.dtype, None if bias is None else bias.dtype
        return F.linear(dropped, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        weight, key, x = ctx.saved_tensors
        rows = as_rows(dy)
        dw = ops.dropped_outer(rows, x, key, ctx.draw, ctx.p).to(weight.dtype)
        return *_rest(ctx, dy, rows, weight, dw, ctx.dtypes), None, None, None, None


def _rest(ctx: Any, dy: Tensor, rows: Tensor, weight: Tensor, dw: Tensor, dtypes: Any) -> tuple[Any, ...]:
    """dx, dw, db of a linear layer."""
    dx = db = None
    if ctx.needs_input_grad[0]:
        dx = (dy @ (weight.T if ctx.product else weight).to(dy.dtype)).to(dtypes[0])
    if ctx.needs_input_grad[2]:
        db = rows.sum(0).to(dtypes[1])
    return dx, dw.T if ctx.product else dw, db


class AddMM(torch.autograd.Function):
    """y = alpha x W + beta c, W (D, O)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, c: Tensor, beta: float, alpha: float, key: Tensor, draw: int, text: str
    ) -> Tensor:
        kept = ops.keep(as_rows(x), None, None, key, draw, text, LEAF)
        ctx.save_for_backward(weight, key, *kept)
        ctx.beta, ctx.alpha, ctx.draw, ctx.text = beta, alpha, draw, text
        ctx.width, ctx.dtype, ctx.of = x.shape[-1], x.dtype, (c.shape, c.dtype)
        return torch.addmm(c, x, weight, beta=beta, alpha=alpha)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        weight, key, *kept = ctx.saved_tensors
        scaled = dy * ctx.alpha
        dx = dc = None
        if ctx.needs_input_grad[0]:
            dx = (scaled @ weight.T.to(dy.dtype)).to(ctx.dtype)
        dw = ops.outer(scaled, kept, key, ctx.draw, ctx.width, ctx.dtype, ctx.text).T.to(weight.dtype)
        if ctx.needs_input_grad[2]:
            dc = (dy * ctx.beta).sum_to_size(ctx.of[0]).to(ctx.of[1])
        return dx, dw, dc, None, None, None, None, None


class ReLU(torch.autograd.Function):
    """One bit an element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y, bits = codec.relu(x.contiguous())
        ctx.save_for_backward(bits)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return codec.apply_mask(dy.contiguous(), ctx.saved_tensors[0], 0.0)


class LeakyReLU(torch.autograd.Function):
    """One bit an element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(codec.pack_mask(x.contiguous()))
        ctx.slope = slope
        return F.leaky_relu(x, slope)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return codec.apply_mask(dy.contiguous(), ctx.saved_tensors[0], ctx.slope), None


class PReLU(torch.autograd.Function):
    """One bit an element for dx, and min(x, 0) through the codec for dw."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, key: Tensor, draw: int, text: str) -> Tensor:
        bits = codec.pack_mask((x > 0).to(torch.float32).contiguous())
        kept = ops.keep(as_rows(x.clamp(max=0)), None, None, key, draw, text, LEAF)
        ctx.save_for_backward(weight, bits, key, *kept)
        ctx.draw, ctx.text, ctx.dtype = draw, text, x.dtype
        return F.prelu(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        weight, bits, key, *kept = ctx.saved_tensors
        shape = [1] * dy.dim()
        if weight.numel() > 1:
            shape[1] = -1
        slopes = weight.view(shape)
        positive = codec.apply_mask(dy.contiguous(), bits, 0.0)
        dx = positive + (dy - positive) * slopes.to(dy.dtype)
        dw = ops.slope(dy, kept, key, ctx.draw, ctx.dtype, ctx.text, LEAF).sum_to_size(slopes.shape)
        return dx.to(ctx.dtype), dw.view(weight.shape).to(weight.dtype), None, None, None


class Elementwise(torch.autograd.Function):
    """y = f(x), its exact derivative kept through the codec."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        plain: Callable[..., Tensor],
        slope: Callable[..., Tensor],
        of_result: bool,
        options: Any,
        key: Tensor,
        draw: int,
        text: str,
        use: str,
    ) -> Tensor:
        y = plain(x, *options)
        kept = ops.keep(as_rows(slope(y if of_result else x, options, of_result)), None, None, key, draw, text, use)
        ctx.save_for_backward(key, *kept)
        ctx.draw, ctx.text, ctx.use, ctx.dtype = draw, text, use, x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        key, *kept = ctx.saved_tensors
        return ops.slope(dy, kept, key, ctx.draw, ctx.dtype, ctx.text, ctx.use), *[None] * 8


class SeededDropout(torch.autograd.Function):
    """Nothing but the key of the pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, key: Tensor, draw: int, p: float) -> Tensor:
        ctx.save_for_backward(key)
        ctx.draw, ctx.p = draw, p
        return ops.seeded_dropout(x, key, draw, p)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return ops.seeded_dropout(dy, ctx.saved_tensors[0], ctx.draw, ctx.p), None, None, None


class MaskedDropout(torch.autograd.Function):
    """torch's own draw; one bit an element of its mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        y, mask = operations.dropout(x, p)
        ctx.save_for_backward(codec.pack_mask(mask.to(torch.float32).contiguous()))
        ctx.scale = 1 / (1 - p)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return codec.apply_mask(dy.contiguous(), ctx.saved_tensors[0], 0.0) * ctx.scale, None


def _statistics(x: Tensor) -> Tensor:
    """Statistics of a half-precision input in float32, their own dtype, though a trace shows them in half precision."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


class BatchNorm(torch.autograd.Function):
    """Statistics of the batch, over all dimensions but 1."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Any,
        bias: Any,
        running_mean: Any,
        running_var: Any,
        momentum: float,
        eps: float,
        two: bool,
        key: Tensor,
        draw: int,
        text: str,
    ) -> Tensor:
        y, mean, inverse = operations.compiled_batch_norm(x, weight, bias, running_mean, running_var, momentum, eps)
        mean, inverse = _statistics(mean), _statistics(inverse)
        rows = as_rows(x.movedim(1, -1))
        inner = ops.keep(rows, mean, inverse, key, draw, text, NORM)
        outer = ops.keep(rows, mean, inverse, key, draw + 1, text, NORM) if two else []
        ctx.save_for_backward(weight, inverse, key, *inner, *outer)
        ctx.draw, ctx.text, ctx.dtypes = draw, text, (x.dtype, None if weight is None else weight.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        weight, inverse, key, *kept = ctx.saved_tensors
        g = dy.movedim(1, -1)
        rows = as_rows(g).to(inverse.dtype)
        dx, dw, db = ops.batch_norm_backward(rows, inverse, weight, kept[:4], kept[4:], key, ctx.draw, ctx.text)
        dx = dx.view(g.shape).movedim(-1, 1).to(ctx.dtypes[0])
        affine = ctx.dtypes[1] is not None
        grads = (dw.to(ctx.dtypes[1]), db.to(ctx.dtypes[1])) if affine else (None, None)
        return dx, *grads, None, None, None, None, None, None, None, None


class LayerNorm(torch.autograd.Function):
    """Statistics over the last dimensions, for each row."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shape: list[int],
        weight: Any,
        bias: Any,
        eps: float,
        two: bool,
        key: Tensor,
        draw: int,
        text: str,
    ) -> Tensor:
        y, mean, inverse = operations.layer_norm(x, shape, weight, bias, eps)
        mean, inverse = _statistics(mean), _statistics(inverse)
        width = 1
        for size in shape:
            width *= size
        rows = ((x - mean) * inverse).reshape(-1, width)
        outer = ops.keep(rows, None, None, key, draw, text, NORM)
        inner = ops.keep(rows, None, None, key, draw + 1, text, NORM) if two else []
        ctx.save_for_backward(weight, inverse, key, *outer, *inner)
        ctx.draw, ctx.text, ctx.shape, ctx.width, ctx.bias = draw, text, shape, width, bias is not None
        ctx.dtypes = x.dtype, None if weight is None else weight.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        weight, inverse, key, *kept = ctx.saved_tensors
        rows = dy.reshape(-1, ctx.width).to(inverse.dtype)
        gain = None if weight is None else weight.reshape(-1)
        dx, dw, db = ops.layer_norm_backward(
            rows, inverse.reshape(-1, 1), gain, kept[:4], kept[4:], key, ctx.draw, ctx.text
        )
        dx = dx.view(dy.shape).to(ctx.dtypes[0])
        dw = None if weight is None else dw.view(ctx.shape).to(ctx.dtypes[1])
        db = db.view(ctx.shape).to(ctx.dtypes[1]) if ctx.bias and weight is not None else None
        return dx, None, dw, db, None, None, None, None, None
