"""Numbers to bytes and back: `encode(x, config, seed)` gives a `Packed`, and `decode(packed)` an estimate of x.

Encoding first reduces (columns are projected, or rows sampled), then quantises block by block, and packs the codes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dibit._torch.autocast import HALF, at_least_single, exact_dtypes
from dibit.codec import ops
from dibit.codec.backends import reference
from dibit.codec.layout import Layout, reduced_shape
from dibit.codec.packed import Packed, levels_of
from dibit.codec.projection import projection, sampled_rows
from dibit.codec.rng import seed_tensor
from dibit.codec.row_sampling import LEFT_OUT, row_scores
from dibit.config import Config, Project, Sample

_ROWS = 1 << 13  # this many rows of half precision are converted to float32 at a time
_BLOW_UP = 1.5  # where rounding to bfloat16 widens the ranges by more than this factor, they are kept in float32


@dataclass(frozen=True)
class Affine:
    """A function (x - shift) * scale that is encoded in the place of x; it is computed only for rows that are kept.

    Attributes:
        shift, scale: (D,), of the dtype in which the result is computed.
        from_statistics: whether both are statistics of x itself, so that they are not finite where x is not.
    """

    shift: Tensor
    scale: Tensor
    from_statistics: bool

    def __call__(self, x: Tensor) -> Tensor:
        """The function's value for x (N, D), in a tensor of its own."""
        return reference.affine(x, self.shift, self.scale)

    def finite(self, x: Tensor) -> Tensor:
        """float32 0-d: 0 where the function's value for x is finite, else NaN; the value itself is not computed."""
        own: Tensor = ops.finite(self.shift) + ops.finite(self.scale)
        return own if self.from_statistics else own + ops.finite(x)


def encode(
    x: Tensor,
    config: Config,
    seed: Tensor | int,
    affine: Affine | None = None,
    scores: Tensor | None = None,
    candidates: int | None = None,
) -> Packed:
    """Reduce, quantise and pack a tensor.

    Args:
        x: floating point (..., D); leading dimensions are rows. 0-d and 1-d tensors are one row.
        config: bits, block, reduce, levels, stats and rounding are used. A `Project` needs D > ratio to help and is
            left out at ratio 1.
        seed: 0-d int64 tensor on the device of x, or an int.
        affine: a function of the rows that is encoded in their place.
        scores: uint8 (N,), the scores by which `Sample` chooses rows (`dibit.codec.row_sampling`). Without them,
            `by="norm"` uses the norms of the rows, and `by="gradient"` chooses rows uniformly.
        candidates: how many of the scores are not `LEFT_OUT`; default N.

    Returns:
        A `Packed`; `decode` gives an unbiased estimate of x (exact in expectation over seeds; not for "nearest").

    Raises:
        TypeError: x is not floating point.
    """
    if not x.is_floating_point():
        raise TypeError(f"encode got a tensor of {x.dtype}; expected a floating-point one (integers are kept exactly).")
    if not isinstance(seed, Tensor):
        seed = seed_tensor(seed, x.device)
    if candidates is None:
        config = config.resolve(x.shape[:-1].numel())
    elif isinstance(config.reduce, Sample):
        config = replace(config, reduce=config.reduce.resolve(candidates))
    with exact_dtypes(x.device):
        return _encode(x.detach(), config, seed, affine, scores, candidates)


def _encode(
    x: Tensor, config: Config, seed: Tensor, affine: Affine | None, scores: Tensor | None, candidates: int | None
) -> Packed:
    """`encode` of checked arguments."""
    shape, dtype = x.shape, x.dtype
    x = x.reshape(shape[:-1].numel(), shape[-1] if shape else 1)
    if affine is not None:
        dtype = affine.shift.dtype
    index = flag = None
    count = 0
    if isinstance(config.reduce, Sample):
        flag = ops.finite(x) if affine is None else affine.finite(x)
        if scores is None and config.reduce.by == "norm":
            scores = norm_scores(x)
        if scores is None:
            index = sampled_rows(x.shape[0], config.reduce.ratio, seed)[0]
        else:
            count = -(-(x.shape[0] if candidates is None else candidates) // config.reduce.ratio)
            index = ops.pick_rows(scores, seed, count)[0]
    else:
        scores = None
        if affine is not None and isinstance(config.reduce, Project):
            x, affine = affine(x), None
    stats = torch.float64 if dtype == torch.float64 else config.stats
    codes, ranges, widths = _quantize(x, config, seed, affine, index, stats)
    if stats == torch.bfloat16 and x.device.type == "cpu" and _blown_up(ranges, widths):
        codes, ranges, _ = _quantize(x, config, seed, affine, index, torch.float32)
    return Packed(codes, ranges, seed, flag, shape, dtype, config, scores, count)


def norm_scores(x: Tensor) -> Tensor:
    """Scores uint8 (N,) by the norms of the rows of x (N, D); where a squared norm is not finite, the largest score."""
    return row_scores(x).clamp_(max=LEFT_OUT - 1)


def _quantize(
    x: Tensor, config: Config, seed: Tensor, affine: Affine | None, index: Tensor | None, stats: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, ranges and true widths (`ops.quantize`) of a matrix, of its projection, or of its rows `index`."""
    x = reduced(x, config, seed)
    rows = x.shape[0] if index is None else index.shape[0]
    block = config.block_size(rows, x.shape[1])
    rounding = reference.NEAREST if config.rounding == "nearest" else reference.STOCHASTIC
    shift, scale = (None, None) if affine is None else (affine.shift, affine.scale)
    found: tuple[Tensor, Tensor, Tensor] = ops.quantize_rows(
        x.contiguous(), index, shift, scale, seed, config.bits, block, levels_of(config, block), stats, rounding
    )
    return found


def reduced(x: Tensor, config: Config, seed: Tensor) -> Tensor:
    """The matrix that is quantised for x (N, D) where all rows are kept: its projection (N, R), or x itself."""
    if isinstance(config.reduce, Project):
        p = projection(x.shape[1], config.reduce.ratio, seed, at_least_single(x[:0]).dtype)
        if x.dtype in HALF:  # in parts: no copy of x in float32 at once
            return torch.cat([part.to(p.dtype) @ p for part in torch.split(x, _ROWS)])
        return x @ p
    return x


def decode(packed: Packed) -> Tensor:
    """An estimate of the tensor that was encoded, in its shape and dtype; unbiased, but for "nearest" rounding."""
    if packed.config.reduce is None:
        return packed.reduced().view(packed.shape)
    dtype = torch.float32 if packed.dtype in HALF else packed.dtype
    with exact_dtypes(packed.codes.device):
        reduced = packed.reduced(dtype=dtype)
        if (p := packed.projection(dtype)) is not None:
            reduced = reduced @ p.T
        elif (sample := packed.sample(dtype)) is not None:
            index, weight = sample
            full = reduced.new_zeros(packed.rows, packed.width)
            if packed.nonfinite_flag is not None:
                full += packed.nonfinite_flag.to(full.dtype)
            reduced = full.index_copy_(0, index, reduced * weight[:, None])  # no row twice
        return reference.cast_clamped(reduced, packed.dtype).view(packed.shape)


def encoded_bytes(shape: torch.Size, config: Config) -> int:
    """Bytes of the codes and ranges that `encode` makes of a tensor of this shape, with ranges in `config.stats`."""
    layout = Layout.of(*reduced_shape(shape[:-1].numel(), shape[-1] if shape else 1, config), config)
    return layout.code_bytes + 2 * config.stats.itemsize * layout.blocks


def _blown_up(ranges: Tensor, widths: Tensor) -> bool:
    """Whether stored ranges (blocks, 2) are much wider than the true widths (blocks,). Blocks with NaN do not count.

    An end that became infinite, one of float32's largest numbers rounded up, counts as too wide.
    """
    spans = (ranges[:, 1].double() - ranges[:, 0].double()).nan_to_num(0.0, posinf=float("inf"))
    return bool(spans.sum() > _BLOW_UP * widths.double().nansum()) or bool(spans.isinf().any())
