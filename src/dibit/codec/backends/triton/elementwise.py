"""Operators that take element by element, on a GPU: masks, dropout, random signs, whether all is finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dibit.codec.backends.reference import dropout_scale
from dibit.codec.backends.triton.blocks import dequantize
from dibit.codec.backends.triton.kernels import elementwise as kernels
from dibit.codec.backends.triton.launch import SINGLE, launch, parts
from dibit.codec.dispatch import kernel
from dibit.codec.layout import mask_bytes

_MASK = 512  # bytes of a mask that a program takes: four a thread, and four elements of each slot
_RUN = 1024  # elements that a program takes


def _masked(kernel: Any, mask: Tensor, *args: Any, **meta: Any) -> None:
    """Run a kernel over the bytes of a mask. It may use 96 registers: with fewer the assembler would spill one."""
    launch(kernel, (parts(mask.numel(), _MASK),), mask.device, *args, **meta, T=_MASK, registers=96)


def _result(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _mask_of(x: Tensor) -> Tensor:
    return x.new_empty(mask_bytes(x.numel()), dtype=torch.uint8)


@kernel(x=SINGLE)
def pack_mask(x: Tensor) -> Tensor:
    mask, x = _mask_of(x), x.contiguous()
    _masked(kernels.pack_mask, mask, x, x, mask, x.numel(), mask.numel(), RELU=False)
    return mask


@kernel(x=SINGLE)
def relu(x: Tensor) -> tuple[Tensor, Tensor]:
    y, mask = _result(x), _mask_of(x)
    _masked(kernels.pack_mask, mask, x.contiguous(), y, mask, x.numel(), mask.numel(), RELU=True)
    return y, mask


@kernel(grad=SINGLE)
def apply_mask(grad: Tensor, mask: Tensor, slope: float) -> Tensor:
    out, sizes = _result(grad), (grad.numel(), mask.numel())
    _masked(kernels.apply_mask, mask, grad.contiguous(), mask, out, *sizes, float(slope), SLOPED=slope != 0)
    return out


@kernel(x=SINGLE)
def scale_masked(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    out = _result(x)
    _masked(kernels.scale_masked, mask, x.contiguous(), mask, out, x.numel(), mask.numel(), float(scale))
    return out


@kernel(x=SINGLE)
def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    out, n, scale = _result(x), x.numel(), dropout_scale(p, x.dtype)
    launch(kernels.dropout, (parts(n, _RUN),), x.device, x.contiguous(), out, seed, n, float(p), scale, T=_RUN)
    return out


@kernel(x=SINGLE, mean=torch.float32)
def norm_relu_dropout(
    x: Tensor, mean: Tensor, gain: Tensor, bias: Tensor, seed: Tensor, p: float
) -> tuple[Tensor, Tensor]:
    y, mask = _result(x), _mask_of(x)
    tensors = x.contiguous(), mean.contiguous(), gain.contiguous(), bias.contiguous(), seed, y, mask
    numbers = x.numel(), mask.numel(), float(p), dropout_scale(p, x.dtype)
    width = x.shape[-1]
    aligned = width % 4 == 0 and mask.numel() % 4 == 0
    _masked(kernels.norm_relu_dropout, mask, *tensors, *numbers, WIDTH=width, ALIGNED=aligned, DROPS=p > 0)
    return y, mask


@kernel(grad=SINGLE)
def relu_dropout_gradient(grad: Tensor, mask: Tensor, seed: Tensor, p: float) -> Tensor:
    out = _result(grad)
    numbers = grad.numel(), mask.numel(), float(p), dropout_scale(p, grad.dtype)
    _masked(kernels.relu_dropout_gradient, mask, grad.contiguous(), mask, seed, out, *numbers, DROPS=p > 0)
    return out


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
    """By the kernels above, all rows at once."""
    width = weight.shape[0]
    x = dequantize(codes, ranges, seed, rows * width, bits, block, [], dither, weight.dtype).view(rows, width)
    x = x.mul_(weight).add_(bias)
    if mask is not None and drop is not None and not slope:
        return relu_dropout_gradient(x, mask, drop, p)[start:stop]
    x = x if mask is None else apply_mask(x, mask, slope)
    return (x if drop is None else dropout(x, drop, p))[start:stop]


def signs(seed: Tensor, count: int) -> Tensor:
    out = seed.new_empty(count, dtype=torch.float32)
    launch(kernels.signs, (parts(count, _RUN),), seed.device, out, seed, count, T=_RUN)
    return out


@kernel(x=SINGLE)
def finite(x: Tensor) -> Tensor:
    if not x.is_contiguous():
        return NotImplemented
    out = x.new_zeros((), dtype=torch.float32)
    launch(kernels.finite, (parts(x.numel(), 4 * _RUN),), x.device, x, out, x.numel(), T=4 * _RUN)
    return out
