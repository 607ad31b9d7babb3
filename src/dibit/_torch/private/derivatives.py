"""Derivatives of activations: torch's own operations for their backward passes, or the same formulas spelled out.

torch's operation takes one pass and needs no memory for what lies between. It computes in single precision at least
and rounds once, and so do the formulas.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dibit._torch.private.registry import find

_SLOWER = "time and passing memory: the derivative takes several operations"
_gelu: Any = find("torch.ops.aten.gelu_backward", "compute the derivative of GELU", _SLOWER)
_silu: Any = find("torch.ops.aten.silu_backward", "compute the derivative of SiLU", _SLOWER)
_mish: Any = find("torch.ops.aten.mish_backward", "compute the derivative of Mish", _SLOWER)
_hardswish: Any = find("torch.ops.aten.hardswish_backward", "compute the derivative of Hardswish", _SLOWER)
_elu: Any = find("torch.ops.aten.elu_backward", "compute the derivative of ELU", _SLOWER)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    if _gelu is not None:
        return _gelu(torch.ones_like(x), x, approximate=approximate)  # type: ignore[no-any-return]
    z = _single(x)
    if approximate == "none":
        density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        return (torch.erf(z * math.sqrt(0.5)).add(1) / 2 + z * density).to(x.dtype)
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(scale * (z + cubic * z * z * z))
    return ((1 + t) / 2 + z / 2 * (1 - t * t) * scale * (1 + 3 * cubic * z * z)).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    if _silu is not None:
        return _silu(torch.ones_like(x), x)  # type: ignore[no-any-return]
    z = _single(x)
    s = torch.sigmoid(z)
    return (s * (1 + z * (1 - s))).to(x.dtype)


def mish(x: Tensor) -> Tensor:
    if _mish is not None:
        return _mish(torch.ones_like(x), x)  # type: ignore[no-any-return]
    z = _single(x)
    t = torch.tanh(F.softplus(z))
    return (t + z * torch.sigmoid(z) * (1 - t * t)).to(x.dtype)


def hardswish(x: Tensor) -> Tensor:
    if _hardswish is not None:
        return _hardswish(torch.ones_like(x), x)  # type: ignore[no-any-return]
    z = _single(x)
    return torch.where(z <= -3, 0.0, torch.where(z < 3, z / 3 + 0.5, 1.0)).to(x.dtype)


def elu(x: Tensor, alpha: float = 1.0) -> Tensor:
    if _elu is not None:
        return _elu(torch.ones_like(x), alpha, 1, 1, False, x)  # type: ignore[no-any-return]
    z = _single(x)
    return torch.where(z <= 0, alpha * torch.exp(z), 1.0).to(x.dtype)


def elu_of_result(y: Tensor, alpha: float = 1.0) -> Tensor:
    """From the result of ELU.

    Raises:
        RuntimeError: alpha is negative, so the result does not tell where x was.
    """
    if _elu is not None:
        return _elu(torch.ones_like(y), alpha, 1, 1, True, y)  # type: ignore[no-any-return]
    if alpha < 0:
        raise RuntimeError(f"ELU was computed in place with alpha={alpha}; expected 0 or more, or not in place.")
    z = _single(y)
    return torch.where(z <= 0, z + alpha, 1.0).to(y.dtype)


def _single(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
