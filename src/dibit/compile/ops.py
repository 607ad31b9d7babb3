"""The operators of a compiled pass: what is kept in the forward pass, and what the backward pass makes of it.

Opaque to the compiler, so that it neither computes the codes twice nor decodes them early: every operator that decodes
takes the gradient, and so runs in the backward pass and at its own place there. Inside they are the code of an
uncompiled pass. A residual is four tensors, `[codes, ranges, nonfinite_flag, scores]`, empty where there is none.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from dibit._torch.signatures import with_typing
from dibit.codec import Affine, Packed, encode, mix, ops, seed_tensor
from dibit.codec.layout import Layout, reduced_shape
from dibit.codec.seed_stream import Key, capturing, draw, replayed_key
from dibit.compile.config_text import LEAF, NORM, settings
from dibit.config import Config, Sample
from dibit.residuals.compressed import Compressed
from dibit.rules.norm import batch_norm_gradient, layer_norm_gradient

_GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64's step: seeds of one pass are the numbers of its stream


def fresh(like: Tensor, moves: bool = True) -> Tensor:
    """The key of a pass: int64 0-d on the device of `like`, one number of torch's default generator.

    Where that may not be moved (`moves` is false), a function of its state, and of how many keys that has given.

    In a CUDA graph that is captured, of the device's generator instead: another at each replay.
    """
    if capturing(like.device):
        return replayed_key(like.device)
    return seed_tensor(mix(int(draw()) if moves else Key(moves=False).value, "compiled"), like.device)


@custom_op("dibit::fresh_key", mutates_args=("passes",))
@with_typing
def draw_key(passes: Tensor, like: Tensor, moves: bool) -> Tensor:
    """`fresh` in a graph. `passes` counts up, so that no compiler takes two calls for one."""
    passes += 1
    return fresh(like, moves)


@draw_key.register_fake
def _(passes, like, moves):  # type: ignore[no-untyped-def]
    return like.new_empty((), dtype=torch.int64)


def seed(key: Tensor, draw: int) -> Tensor:
    """The seed of one residual: int64 0-d."""
    step = (draw * _GOLDEN) % 2**64
    return key + (step - 2**64 if step >= 2**63 else step)


@custom_op("dibit::keep", mutates_args=())
@with_typing
def keep(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, key: Tensor, draw: int, text: str, use: str
) -> list[Tensor]:
    """A residual of the rows of x (N, D), or of (x - shift) * scale.

    Args:
        x: floating point (N, D).
        shift, scale: (D,), statistics of x.
        key: of the pass, int64 0-d.
        draw: the number of this residual within the pass.
        text, use: see `dibit.compile.config_text`.
    """
    affine = None if shift is None or scale is None else Affine(shift, scale, from_statistics=True)
    packed = encode(x, settings(text, use), seed(key, draw), affine)
    none = x.new_empty(0)
    flag = none if packed.nonfinite_flag is None else packed.nonfinite_flag
    return [packed.codes, packed.ranges, flag, none.to(torch.uint8) if packed.scores is None else packed.scores]


@keep.register_fake
def _(x, shift, scale, key, draw, text, use):  # type: ignore[no-untyped-def]
    config = settings(text, use).resolve(x.shape[0])
    layout = Layout.of(*reduced_shape(x.shape[0], x.shape[1], config), config)
    dtype = torch.float64 if (x if shift is None else shift).dtype == torch.float64 else torch.float32
    sample = config.reduce if isinstance(config.reduce, Sample) else None
    return [
        x.new_empty(layout.code_bytes, dtype=torch.uint8),
        x.new_empty((layout.blocks, 2), dtype=dtype),
        x.new_empty((), dtype=torch.float32) if sample is not None else x.new_empty(0),
        x.new_empty(x.shape[0] if sample is not None and sample.by == "norm" else 0, dtype=torch.uint8),
    ]


def residual(
    kept: list[Tensor], key: Tensor, draw: int, rows: int, width: int, dtype: torch.dtype, config: Config
) -> Compressed:
    """What `keep` returned, as the residual that it is."""
    codes, ranges, flag, scores = kept
    config = config.resolve(rows)
    sample = config.reduce if isinstance(config.reduce, Sample) else None
    by_scores = sample is not None and sample.by == "norm"
    count = -(-rows // sample.ratio) if sample is not None and by_scores else 0
    return Compressed(
        Packed(
            codes,
            ranges,
            seed(key, draw),
            flag if sample is not None else None,
            torch.Size((rows, width)),
            dtype,
            config,
            scores if by_scores else None,
            count,
        )
    )


@custom_op("dibit::outer", mutates_args=())
@with_typing
def outer(dy: Tensor, kept: list[Tensor], key: Tensor, draw: int, width: int, dtype: torch.dtype, text: str) -> Tensor:
    """dY^T X from what is kept of the input of a linear layer: (O, D) for dy (N, O) and x (N, D) of `dtype`."""
    own = residual(kept, key, draw, dy.shape[0], width, dtype, settings(text, LEAF))
    return own.outer(dy)


@outer.register_fake
def _(dy, kept, key, draw, width, dtype, text):  # type: ignore[no-untyped-def]
    return dy.new_empty(dy.shape[1], width)


@custom_op("dibit::dropped_outer", mutates_args=())
@with_typing
def dropped_outer(dy: Tensor, x: Tensor, key: Tensor, draw: int, p: float) -> Tensor:
    """dY^T X for the dropout of an x (..., D) that the caller holds: the mask is drawn again."""
    dropped = ops.dropout(x.contiguous(), seed(key, draw), p)
    return dy.T @ dropped.reshape(-1, x.shape[-1]).to(dy.dtype)


@dropped_outer.register_fake
def _(dy, x, key, draw, p):  # type: ignore[no-untyped-def]
    return dy.new_empty(dy.shape[1], x.shape[-1])


@custom_op("dibit::slope", mutates_args=())
@with_typing
def slope(dy: Tensor, kept: list[Tensor], key: Tensor, draw: int, dtype: torch.dtype, text: str, use: str) -> Tensor:
    """dY times the derivative that is kept, element by element: contiguous, of the shape and dtype of dy (..., D)."""
    width = dy.shape[-1]
    own = residual(kept, key, draw, dy.shape[:-1].numel(), width, dtype, settings(text, use))
    return dy.contiguous() * own.value().view(dy.shape).to(dy.dtype)


@slope.register_fake
def _(dy, kept, key, draw, dtype, text, use):  # type: ignore[no-untyped-def]
    return torch.empty_like(dy, memory_format=torch.contiguous_format)


@custom_op("dibit::seeded_dropout", mutates_args=())
@with_typing
def seeded_dropout(x: Tensor, key: Tensor, draw: int, p: float) -> Tensor:
    """Inverted dropout whose mask is a function of (key, draw, element): contiguous; dx from dy is the same call."""
    return ops.dropout(x.contiguous(), seed(key, draw), p)


@seeded_dropout.register_fake
def _(x, key, draw, p):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@custom_op("dibit::zeros", mutates_args=())
@with_typing
def zeros(like: Tensor, size: list[int]) -> Tensor:
    """Zeros of the dtype and device of `like`, which a compiler does not take for those of the backward pass."""
    return like.new_zeros(size)


@zeros.register_fake
def _(like, size):  # type: ignore[no-untyped-def]
    return like.new_empty(size)


@custom_op("dibit::batch_norm_backward", mutates_args=())
@with_typing
def batch_norm_backward(
    dy: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    inner: list[Tensor],
    outer: list[Tensor],
    key: Tensor,
    draw: int,
    text: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dw, db of a BatchNorm in training.

    Args:
        dy: (N, D) in the dtype of `inverse`.
        inverse: (D,), 1 / standard deviation.
        weight: (D,) or `None`.
        inner, outer: two draws of the normalised input, the second by `draw` + 1; `outer` empty: one for both.
    """
    config = settings(text, NORM)
    rows, width = dy.shape
    second = residual(inner, key, draw, rows, width, inverse.dtype, config)
    first = residual(outer, key, draw + 1, rows, width, inverse.dtype, config) if outer else None
    dx, product, total = batch_norm_gradient(dy, first, second, inverse, weight)
    return dx, product, total


@batch_norm_backward.register_fake
def _(dy, inverse, weight, inner, outer, key, draw, text):  # type: ignore[no-untyped-def]
    return dy.new_empty(dy.shape), dy.new_empty(dy.shape[1]), dy.new_empty(dy.shape[1])


@custom_op("dibit::layer_norm_backward", mutates_args=())
@with_typing
def layer_norm_backward(
    dy: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    outer: list[Tensor],
    inner: list[Tensor],
    key: Tensor,
    draw: int,
    text: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dw, db of a LayerNorm over rows.

    Args:
        dy: (N, D) in the dtype of `inverse`.
        inverse: (N, 1), 1 / standard deviation.
        weight: (D,) or `None`.
        outer, inner: as in `batch_norm_backward`; `inner` is the second draw here, empty without a projection.
    """
    config = settings(text, NORM)
    rows, width = dy.shape
    first = residual(outer, key, draw, rows, width, inverse.dtype, config)
    second = residual(inner, key, draw + 1, rows, width, inverse.dtype, config) if inner else None
    return layer_norm_gradient(dy, first, second, inverse, weight)


@layer_norm_backward.register_fake
def _(dy, inverse, weight, outer, inner, key, draw, text):  # type: ignore[no-untyped-def]
    return dy.new_empty(dy.shape), dy.new_empty(dy.shape[1]), dy.new_empty(dy.shape[1])
