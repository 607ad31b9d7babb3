"""Bit masks, dropout, signs, whether all is finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dibit.codec.backends import reference
from dibit.codec.backends.triton.kernels import elementwise as kernels
from dibit.codec.backends.triton.launch import SINGLE, launch, parts
from dibit.codec.layout import mask_bytes

_MASK = 512  # bytes of a mask that a program takes: four a thread, and four elements of each slot
_RUN = 1024  # elements that a program takes


def _masked(kernel: Any, mask: Tensor, *args: Any, **meta: Any) -> None:
    """Over the bytes of a mask; with as few registers as the assembler likes, one would be spilled."""
    launch(kernel, (parts(mask.numel(), _MASK),), mask.device, *args, **meta, T=_MASK, registers=96)


def _result(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _mask_of(x: Tensor) -> Tensor:
    return x.new_empty(mask_bytes(x.numel()), dtype=torch.uint8)


def pack_mask(x: Tensor) -> Tensor:
    if x.dtype not in SINGLE:
        return reference.pack_mask(x)
    mask, x = _mask_of(x), x.contiguous()
    _masked(kernels.pack_mask, mask, x, x, mask, x.numel(), mask.numel(), RELU=False)
    return mask


def relu(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.dtype not in SINGLE:
        return reference.relu(x)
    y, mask = _result(x), _mask_of(x)
    _masked(kernels.pack_mask, mask, x.contiguous(), y, mask, x.numel(), mask.numel(), RELU=True)
    return y, mask


def apply_mask(grad: Tensor, mask: Tensor, slope: float) -> Tensor:
    if grad.dtype not in SINGLE:
        return reference.apply_mask(grad, mask, slope)
    out, sizes = _result(grad), (grad.numel(), mask.numel())
    _masked(kernels.apply_mask, mask, grad.contiguous(), mask, out, *sizes, float(slope), SLOPED=slope != 0)
    return out


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    if x.dtype not in SINGLE:
        return reference.dropout(x, seed, p)
    out, n, scale = _result(x), x.numel(), reference.dropout_scale(p, x.dtype)
    launch(kernels.dropout, (parts(n, _RUN),), x.device, x.contiguous(), out, seed, n, float(p), scale, T=_RUN)
    return out


def norm_relu_dropout(
    x: Tensor, mean: Tensor, gain: Tensor, bias: Tensor, seed: Tensor, p: float
) -> tuple[Tensor, Tensor]:
    if x.dtype not in SINGLE or mean.dtype != torch.float32:
        return reference.norm_relu_dropout(x, mean, gain, bias, seed, p)
    y, mask = _result(x), _mask_of(x)
    tensors = x.contiguous(), mean.contiguous(), gain.contiguous(), bias.contiguous(), seed, y, mask
    numbers = x.numel(), mask.numel(), float(p), reference.dropout_scale(p, x.dtype)
    width = x.shape[-1]
    aligned = width % 4 == 0 and mask.numel() % 4 == 0
    _masked(kernels.norm_relu_dropout, mask, *tensors, *numbers, WIDTH=width, ALIGNED=aligned, DROPS=p > 0)
    return y, mask


def relu_dropout_gradient(grad: Tensor, mask: Tensor, seed: Tensor, p: float) -> Tensor:
    if grad.dtype not in SINGLE:
        return reference.relu_dropout_gradient(grad, mask, seed, p)
    out = _result(grad)
    numbers = grad.numel(), mask.numel(), float(p), reference.dropout_scale(p, grad.dtype)
    _masked(kernels.relu_dropout_gradient, mask, grad.contiguous(), mask, seed, out, *numbers, DROPS=p > 0)
    return out


def signs(seed: Tensor, count: int) -> Tensor:
    out = seed.new_empty(count, dtype=torch.float32)
    launch(kernels.signs, (parts(count, _RUN),), seed.device, out, seed, count, T=_RUN)
    return out


def finite(x: Tensor) -> Tensor:
    if x.dtype not in SINGLE or not x.is_contiguous():
        return reference.finite(x)
    out = x.new_zeros((), dtype=torch.float32)
    launch(kernels.finite, (parts(x.numel(), 4 * _RUN),), x.device, x, out, x.numel(), T=4 * _RUN)
    return out
