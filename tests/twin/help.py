"""What programs call."""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dibit._torch.private.autograd import top_hooks


@functools.cache
def _filler() -> Any:
    @numba.njit
    def fill(out: Any, values: Any) -> None:
        for i in range(out.shape[0]):
            for j in range(out.shape[1]):
                out[i, j] += 2 * values[i, j]

    return fill


def fill_by_numba(out: np.ndarray, values: np.ndarray) -> None:
    """Add twice the values, outside of torch's sight."""
    _filler()(out, values)


def step(optimizer: Any, *parameters: Tensor) -> None:
    """A step of an optimiser with gradients of ones, whatever was compressed; the gradients there were stay."""
    leaves = [p for p in parameters if p.is_leaf and p.is_floating_point()]
    before = [(p, p.grad, p.requires_grad) for p in leaves]
    for p in leaves:
        p.requires_grad_().grad = torch.ones_like(p)
    if leaves:
        optimizer(leaves, lr=0.1).step()
    for p, grad, needed in before:
        p.grad = grad
        p.requires_grad_(needed)


def left() -> tuple[int, bool]:
    """Function modes and saved-tensor hooks of this thread."""
    return (
        len(torch.overrides._get_current_function_mode_stack()),
        top_hooks() is not None,
    )


def plain_step() -> Tensor:
    """Gradients of a model that was never compressed: whatever ran before must not touch them."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 3))
        x, y = torch.randn(50, 8), torch.arange(50) % 3
        for _ in range(2):
            F.cross_entropy(model(x), y).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
