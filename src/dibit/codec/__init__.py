"""Numbers to bytes and back: `encode(x, config, seed) -> Packed`, `decode(packed)`. Knows nothing of autograd."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dibit.buffers import empty
from dibit.codec import ops, reference
from dibit.codec.levels import normal_levels
from dibit.codec.reduce import projection, sampled_rows
from dibit.codec.rng import UNIT, mix, seed_tensor, uniform_range
from dibit.config import Config, Project, Sample

__all__ = ["Affine", "Packed", "decode", "encode", "encoded_bytes", "mix", "reduced", "seed_tensor"]

_BLOW_UP = 1.5  # above this, ranges rounded to bfloat16 are so much wider than the true ones that float32 pays


@dataclass(frozen=True)
class Affine:
    """(x - shift) * scale, encoded in the place of x; computed for the rows alone that are kept.

    Attributes:
        shift, scale: (D,), of the dtype in which the result is computed.
        watches: they are statistics of x, so that they are not finite where x is not.
    """

    shift: Tensor
    scale: Tensor
    watches: bool

    def __call__(self, x: Tensor) -> Tensor:
        """The rows of x (N, D), moved and scaled, in a tensor of their own."""
        if x.dtype != self.shift.dtype:
            x = x.to(self.shift.dtype)
        return torch.sub(x, self.shift, out=empty(x.shape, x.dtype, x.device)).mul_(self.scale)

    def finite(self, x: Tensor) -> Tensor:
        """`ops.finite` of the result."""
        own = ops.finite(self.shift) + ops.finite(self.scale)
        return own if self.watches else own + ops.finite(x)


@dataclass(frozen=True)
class Packed:
    """A tensor, reduced, quantised and packed.

    Attributes:
        codes: uint8 (bytes,).
        ranges: (blocks, 2), low and high of each block.
        seed: int64 0-d; rounding, projection and rows are drawn from it.
        poison: float32 0-d, NaN where a row that was not kept is not finite, else 0; `None` where every row is kept.
        shape, dtype: of the tensor.
        config: what was done to it.
    """

    codes: Tensor
    ranges: Tensor
    seed: Tensor
    poison: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    config: Config

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What takes memory."""
        return (self.codes, self.ranges, self.seed, *(() if self.poison is None else (self.poison,)))

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> "Packed":
        """The same with its tensors put back, in the order of `tensors`."""
        codes, ranges, seed, *poison = tensors
        return replace(self, codes=codes, ranges=ranges, seed=seed, poison=poison[0] if poison else None)

    def without_tensors(self) -> "Packed":
        """Its description alone, for whoever keeps the tensors elsewhere."""
        none = torch.empty(0)
        return replace(self, codes=none, ranges=none, seed=none, poison=None if self.poison is None else none)

    @property
    def block(self) -> int:
        """Elements that share one range."""
        return self.config.elements(*_reduced_shape(self.rows, self.width, self.config))

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    @property
    def rows(self) -> int:
        return self.shape[:-1].numel()

    @property
    def width(self) -> int:
        return self.shape[-1] if self.shape else 1

    def projection(self, dtype: torch.dtype) -> Tensor | None:
        """P (D, R) where columns were projected."""
        reduce = self.config.reduce
        return projection(self.width, reduce.ratio, self.seed, dtype) if isinstance(reduce, Project) else None

    def sample(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Index int64 (m,) and weight (m,) of the rows kept, where rows were sampled. The weight carries the poison."""
        if not isinstance(self.config.reduce, Sample):
            return None
        index, weight = sampled_rows(self.rows, self.config.reduce.ratio, self.seed)
        return index, (weight if self.poison is None else weight + self.poison).to(dtype)

    def reduced(self, dither: float | None = None) -> Tensor:
        """The reduced tensor (rows kept, columns kept), unpacked, in `dtype`; `dither` as in `ops.dequantize`."""
        rows, width = _reduced_shape(self.rows, self.width, self.config)
        block, levels = _blocks(self.config, rows, width)
        if dither is None:
            dither = float(self.config.rounding == "dither")
        flat = ops.dequantize(
            self.codes,
            self.ranges,
            self.seed,
            rows * width,
            self.config.bits,
            block,
            levels,
            dither,
            self.dtype,
        )
        return flat.view(rows, width)

    def variance(self) -> Tensor:
        r"""An unbiased estimate of each reduced element's rounding variance :math:`(h - a_{i-1})(a_i - h)`.

        Given the number u that rounded it to level c, :math:`(1 - 2u) \sum_{i \le c} d_i^2` has that mean: with it, one
        draw of x gives an unbiased x^2. Plain torch; uniform levels have a cheaper way (`dither` 0 times 2).
        """
        rows, width = _reduced_shape(self.rows, self.width, self.config)
        block, levels = _blocks(self.config, rows, width)
        top = 2**self.config.bits - 1
        gaps = torch.tensor(levels or range(top + 1), dtype=torch.float32, device=self.codes.device).diff()
        squares = torch.cat((gaps.new_zeros(1), (gaps**2).cumsum(0)))
        codes = reference.unpack_all(self.codes, rows * width, block, self.config.bits)
        step = (self.ranges[:, 1].float() - self.ranges[:, 0].float()) / top
        u = uniform_range(0, rows * width, self.seed) + UNIT / 2
        per_element = step.square().repeat_interleave(block)[: rows * width]
        return (squares[codes.int()] * (1 - 2 * u) * per_element).view(rows, width).to(self.dtype)


def encode(x: Tensor, config: Config, seed: Tensor | int, affine: Affine | None = None) -> Packed:
    """Reduce, quantise and pack a tensor.

    Args:
        x: floating point (..., D); leading dimensions are rows. 0-d and 1-d tensors are one row.
        config: bits, block, reduce, levels, stats and rounding are used. A `Project` needs D > ratio to help and is
            left out at ratio 1.
        seed: 0-d int64 tensor on the device of x, or an int.
        affine: encode this function of the rows instead.

    Returns:
        A `Packed`; `decode` gives an unbiased estimate of x (exact in expectation over seeds; not for "nearest").

    Raises:
        TypeError: x is not floating point.
    """
    if not x.is_floating_point():
        raise TypeError(f"encode got a tensor of {x.dtype}; expected a floating-point one (integers are kept exactly).")
    if not isinstance(seed, Tensor):
        seed = seed_tensor(seed, x.device)
    shape, dtype = x.shape, x.dtype
    if config.reduce is not None and config.reduce.ratio == 1:
        config = replace(config, reduce=None)
    x = x.detach().reshape(shape[:-1].numel(), shape[-1] if shape else 1)
    sampled = isinstance(config.reduce, Sample)
    poison = (ops.finite(x) if affine is None else affine.finite(x)) if sampled else None
    if affine is not None and not sampled:
        x = affine(x)
    x = reduced(x, config, seed)
    if affine is not None:
        dtype = affine.shift.dtype
        if sampled:
            x = affine(x)
    block, levels = _blocks(config, *x.shape)
    rounding = reference.NEAREST if config.rounding == "nearest" else reference.STOCHASTIC
    work = x.reshape(-1).contiguous()
    if work.dtype not in (torch.float32, torch.float64):
        work = work.float()
    stats = torch.float64 if work.dtype == torch.float64 else config.stats
    codes, ranges, widths = ops.quantize(work, seed, config.bits, block, levels, stats, rounding)
    if stats == torch.bfloat16 and x.device.type == "cpu" and _blown_up(ranges, widths):
        codes, ranges, _ = ops.quantize(work, seed, config.bits, block, levels, torch.float32, rounding)
    return Packed(codes, ranges, seed, poison, shape, dtype, config)


def reduced(x: Tensor, config: Config, seed: Tensor) -> Tensor:
    """What is quantised of a matrix x (N, D): its projection (N, R), its sampled rows (m, D), or x itself."""
    match config.reduce:
        case Project(ratio):
            return x @ projection(x.shape[1], ratio, seed, x.dtype)
        case Sample(ratio):
            return x.index_select(0, sampled_rows(x.shape[0], ratio, seed)[0])
    return x


def decode(packed: Packed) -> Tensor:
    """An estimate of the tensor that was encoded, of its shape and dtype."""
    reduced = packed.reduced()
    if (p := packed.projection(packed.dtype)) is not None:
        reduced = reduced @ p.T
    elif (sample := packed.sample(packed.dtype)) is not None:
        index, weight = sample
        full = reduced.new_zeros(packed.rows, packed.width)
        if packed.poison is not None:
            full += packed.poison.to(full.dtype)
        reduced = full.index_copy_(0, index, reduced * weight[:, None])
    return reduced.view(packed.shape)


def encoded_bytes(shape: torch.Size, config: Config) -> int:
    """Bytes of the codes and ranges that `encode` makes of a tensor of this shape, ranges being kept in `stats`."""
    rows, width = _reduced_shape(shape[:-1].numel(), shape[-1] if shape else 1, config)
    block = config.elements(rows, width)
    full, tail = divmod(rows * width, block)
    codes = full * reference.packed_bytes(block, config.bits) + reference.packed_bytes(tail, config.bits)
    return codes + 2 * config.stats.itemsize * (full + bool(tail))


def _reduced_shape(rows: int, width: int, config: Config) -> tuple[int, int]:
    match config.reduce:
        case Project(ratio) if ratio > 1:
            return rows, max(1, width // ratio)
        case Sample(ratio):
            return -(-rows // ratio), width
    return rows, width


def _blocks(config: Config, rows: int, width: int) -> tuple[int, list[float]]:
    """Block and levels (empty: uniform) as the operators take them, for a reduced matrix of this size."""
    block = config.elements(rows, width)
    levels: tuple[float, ...] = ()
    if config.levels == "normal":
        if config.bits > 1 and block > 2:
            levels = normal_levels(config.bits, block)
    elif config.levels != "uniform":
        levels = config.levels
    return block, list(levels)


def _blown_up(ranges: Tensor, widths: Tensor) -> bool:
    """Blocks with NaN aside; an infinite end is one of float32's largest numbers, rounded up."""
    spans = (ranges[:, 1].double() - ranges[:, 0].double()).nan_to_num(0.0, posinf=float("inf"))
    return bool(spans.sum() > _BLOW_UP * widths.double().nansum()) or bool(spans.isinf().any())
