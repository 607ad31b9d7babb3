"""Operators that take element by element: masks, dropout, random signs, whether all is finite, a fingerprint."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dibit.codec import rng
from dibit.codec.backends.reference.blocks import dequantize, pack, unpack

_PART = 1 << 20  # words of a fingerprint that are read at a time, so that temporary memory stays small


def pack_mask(x: Tensor) -> Tensor:
    """1 bit an element: not (x <= 0), torch's own rule for ReLU's gradient.

    Returns:
        uint8 (ceil(n / 8),) for x of n elements, any shape; laid out as one block.
    """
    return pack((x <= 0).logical_not_().view(1, -1).to(torch.uint8), 1).view(-1)


def relu(x: Tensor) -> tuple[Tensor, Tensor]:
    """ReLU, torch's own bits, and `pack_mask(x)`, for a contiguous x."""
    return F.relu(x), pack_mask(x)


def apply_mask(grad: Tensor, mask: Tensor, slope: float) -> Tensor:
    """`grad` where the bit is set, `slope * grad` elsewhere (0 for slope 0, whatever `grad` is)."""
    bits = unpack(mask.view(1, -1), grad.numel(), 1).view(grad.shape).bool()
    return torch.where(bits, grad, grad * slope if slope else torch.zeros_like(grad))


def scale_masked(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """`x * (scale * bit)`: what dropout passes, where the mask is known. 0 x is not 0 for an infinite x."""
    bits = unpack(mask.view(1, -1), x.numel(), 1).view(x.shape).to(x.dtype)
    return x * (bits * scale)


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Inverted dropout whose mask is a function of (seed, element): the same call gives dx from dy.

    Element i is kept, and divided by 1 - p, where the random number of (seed, i) is at least p.
    """
    keep = rng.uniform_range(0, x.numel(), seed).view(x.shape) >= p
    return x * torch.where(keep, dropout_scale(p, x.dtype), 0.0).to(x.dtype)


def norm_relu_dropout(
    x: Tensor, mean: Tensor, gain: Tensor, bias: Tensor, seed: Tensor, p: float
) -> tuple[Tensor, Tensor]:
    """`dropout(relu((x - mean) * gain + bias), seed, p)` and the ReLU's mask (`pack_mask`).

    Args:
        x: contiguous (N, D).
        mean, gain, bias: (D,), float32 or, for such an x, float64.
        seed: int64 0-d, of the dropout.
        p: in [0, 1); 0 drops nothing.
    """
    h = (x.to(mean.dtype) - mean) * gain + bias
    y = torch.where(h <= 0, 0, h)
    scale = dropout_scale(p, x.dtype)
    if p > 0:
        y = y * torch.where(rng.uniform_range(0, x.numel(), seed).view(x.shape) >= p, scale, 0.0)
    return y.to(x.dtype), pack_mask(h)


def relu_dropout_gradient(grad: Tensor, mask: Tensor, seed: Tensor, p: float) -> Tensor:
    """`apply_mask(dropout(grad, seed, p), mask, 0)`: back through dropout, then through the ReLU before it."""
    return apply_mask(dropout(grad, seed, p) if p > 0 else grad, mask, 0.0)


def passed_rows(
    codes: Tensor,
    ranges: Tensor,
    seed: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    slope: float,
    drop: Tensor | None,
    p: float,
    start: int,
    stop: int,
    rows: int,
    bits: int,
    block: int,
    dither: float,
) -> Tensor:
    """Rows start ... stop of dropout(relu(x_hat * weight + bias)), (stop - start, D), x_hat (N, D) as it was encoded.

    Args:
        codes, ranges, seed, bits, block, dither: as in `dequantize`, with uniform levels.
        weight, bias: (D,), of the result's dtype.
        mask: of the ReLU (`pack_mask`), with the `slope` of what it does not pass; `None`: no ReLU.
        drop, p: seed and probability of dropout; `None`: none.
        start, stop: start is 0 or begins a block.
        rows: N.
    """
    width = weight.shape[0]
    x = dequantize(codes, ranges, seed, rows * width, bits, block, [], dither, weight.dtype).view(rows, width)
    y = x * weight + bias
    if mask is not None:
        y = apply_mask(y, mask, slope)
    return (y if drop is None else dropout(y, drop, p))[start:stop].clone()


def dropout_scale(p: float, dtype: torch.dtype) -> float:
    """1 / (1 - p) rounded as torch's CPU dropout rounds it."""
    return float(torch.ones((), dtype=dtype).div_(1 - p))


def signs(seed: Tensor, count: int) -> Tensor:
    """1 or -1 with equal probability, a function of (seed, element): float32 (count,).

    1 where the topmost of the element's 32 random bits is clear.
    """
    top = rng.hash32(torch.arange(count, device=seed.device), seed) >> 31
    return (1 - 2 * top).to(torch.float32)


def finite(x: Tensor) -> Tensor:
    """float32 0-d: 0 where all of `x` is finite, else NaN; to be added to whatever stands for `x`."""
    return torch.where(x.isfinite().all(), 0.0, float("nan")).to(torch.float32)


def fingerprint(content: Tensor) -> Tensor:
    """64 bits of the content of a contiguous uint8 (n,): int64 0-d.

    The bytes are read as words of 8, the last one filled up with zeros. The fingerprint is the sum over i of
    mix(word_i + (i + 1) * GOLDEN) modulo 2^64, where mix is SplitMix64's finaliser. The sum may be taken in any order,
    by any number of threads. A word that changes or moves changes the sum, but for a chance of 2^-64.
    """
    if content.numel() % 8 or content.storage_offset() % 8:
        content = torch.nn.functional.pad(content, (0, -content.numel() % 8))
    words = content.view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=content.device)
    for start in range(0, words.numel(), _PART):
        part = words[start : start + _PART]
        number = torch.arange(start + 1, start + 1 + part.numel(), dtype=torch.int64, device=content.device)
        total += rng.splitmix64(part + number * (rng.GOLDEN - 2**64)).sum()
    return total
