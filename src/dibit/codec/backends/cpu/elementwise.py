"""Operators that take element by element, on a CPU: masks, dropout, signs, whether all is finite, a fingerprint."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dibit._torch.autocast import HALF
from dibit._torch.huge_pages import empty, empty_like
from dibit.codec.backends.cpu.arguments import float32_ranges, keys
from dibit.codec.backends.cpu.kernels import elementwise as kernels
from dibit.codec.backends.cpu.kernels.fingerprint import fingerprint as fingerprint_kernel
from dibit.codec.backends.reference import dropout_scale
from dibit.codec.dispatch import kernel
from dibit.codec.layout import mask_bytes
from dibit.codec.numpy_views import array

_NOTHING = np.empty(0, np.uint8)


def _mask_of(x: Tensor) -> Tensor:
    return torch.empty(mask_bytes(x.numel()), dtype=torch.uint8)


def pack_mask(x: Tensor) -> Tensor:
    if x.dtype in HALF:  # Numba has no such numbers; as integers their signs are the same
        x = ((x.view(torch.int16) > 0) | x.isnan()).view(torch.uint8)
    out = _mask_of(x)
    if x.numel():
        kernels.pack_mask(x.numel(), array(x).reshape(-1), array(out))
    return out


def relu(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.dtype != torch.float32:
        return F.relu(x), pack_mask(x)
    y, out = empty_like(x), _mask_of(x)
    if x.numel():
        kernels.relu(x.numel(), array(x).reshape(-1), array(y).reshape(-1), array(out))
    return y, out


@kernel(grad=torch.float32)
def apply_mask(grad: Tensor, mask: Tensor, slope: float) -> Tensor:
    out = empty_like(grad)
    if grad.numel():
        kernels.apply_mask(
            grad.numel(), array(grad).reshape(-1), array(mask), array(out).reshape(-1), np.float32(slope)
        )
    return out


@kernel(x=torch.float32)
def scale_masked(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    out = empty_like(x)
    if x.numel():
        kernels.scale_masked(x.numel(), array(x).reshape(-1), array(mask), array(out).reshape(-1), np.float32(scale))
    return out


@kernel(x=torch.float32)
def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    out = empty_like(x)
    if x.numel():
        scale = np.float32(dropout_scale(p, x.dtype))
        kernels.dropout(x.numel(), array(x).reshape(-1), array(out).reshape(-1), *keys(seed), np.float32(p), scale)
    return out


@kernel(x=torch.float32, mean=torch.float32)
def norm_relu_dropout(
    x: Tensor, mean: Tensor, gain: Tensor, bias: Tensor, seed: Tensor, p: float
) -> tuple[Tensor, Tensor]:
    y, mask = empty_like(x), _mask_of(x)
    if x.numel():
        vectors = (array(part.contiguous()) for part in (mean, gain, bias))
        scale = np.float32(dropout_scale(p, x.dtype))
        kernels.norm_relu_dropout(
            x.numel(),
            array(x).reshape(-1),
            *vectors,
            array(y).reshape(-1),
            array(mask),
            *keys(seed),
            np.float32(p),
            scale,
        )
    return y, mask


@kernel(grad=torch.float32)
def relu_dropout_gradient(grad: Tensor, mask: Tensor, seed: Tensor, p: float) -> Tensor:
    out = empty_like(grad)
    if grad.numel():
        scale = np.float32(dropout_scale(p, grad.dtype))
        kernels.relu_dropout_gradient(
            grad.numel(),
            array(grad).reshape(-1),
            array(mask),
            array(out).reshape(-1),
            *keys(seed),
            np.float32(p),
            scale,
        )
    return out


@kernel(weight=torch.float32)
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
    width = weight.shape[0]
    out = empty((stop - start, width), torch.float32)
    if out.numel():
        kernels.passed_rows(
            out.numel(),
            array(codes),
            float32_ranges(ranges),
            array(out).reshape(-1),
            array(weight.contiguous()),
            array(bias.contiguous()),
            _NOTHING if mask is None else array(mask),
            np.float32(slope),
            *keys(seed),
            *((np.uint32(0), np.uint32(0)) if drop is None else keys(drop)),
            drop is not None,
            np.float32(p),
            np.float32(1 if drop is None else dropout_scale(p, weight.dtype)),
            start * width,
            rows * width,
            bits,
            block,
            np.float32(dither),
        )
    return out


def signs(seed: Tensor, count: int) -> Tensor:
    out = torch.empty(count)
    if count:
        kernels.signs(count, array(out), *keys(seed))
    return out


@kernel(x=torch.float32)
def finite(x: Tensor) -> Tensor:
    if not x.is_contiguous():
        return NotImplemented
    return torch.tensor(0.0 if kernels.finite(x.numel(), array(x).view(np.int32).reshape(-1)) else float("nan"))


def fingerprint(content: Tensor) -> Tensor:
    raw = array(content)
    if raw.ctypes.data % 8:  # a view that begins between two words
        raw = raw.copy()
    whole = raw.size // 8 * 8
    return torch.tensor(fingerprint_kernel(whole // 8, raw[:whole].view(np.uint64), raw[whole:]), device="cpu")
