"""What the rules share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dibit.config import Config


def dense(*tensors: Any) -> bool:
    """Whether all are plain strided floating-point tensors: subclasses and other layouts stay with torch."""
    return all(
        type(x) in (Tensor, torch.nn.Parameter) and x.layout == torch.strided and x.is_floating_point() for x in tensors
    )


def flat(x: Tensor) -> Tensor:
    """(..., D) as rows (N, D)."""
    return x.reshape(-1, x.shape[-1])


def unreduced(config: Config) -> Config:
    """For a factor that differs from element to element: every element is kept."""
    return replace(config, reduce=None) if config.reduce else config


def write(x: Tensor, value: Tensor, inplace: bool) -> Tensor:
    return x.copy_(value) if inplace else value
