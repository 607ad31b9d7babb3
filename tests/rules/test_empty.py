"""Tensors without rows, columns or elements: what comes out, and what goes wrong, is torch's own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dibit

SHAPES = [(100, 0), (0, 64), (0, 0), (10, 10, 0), (10, 0, 10), (0, 10, 10), (4, 0, 4, 5)]
FORMS: dict[str, Callable[[tuple[int, ...]], nn.Module]] = {
    "linear": lambda s: nn.Linear(s[-1], 8),
    "to nothing": lambda s: nn.Linear(s[-1], 0),
    "by way of nothing": lambda s: nn.Sequential(nn.Linear(s[-1], 0), nn.ReLU(), nn.Linear(0, 4)),
    "layers": lambda s: nn.Sequential(nn.Linear(s[-1], 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 3)),
    "prelu": lambda s: nn.PReLU(s[1]),
    "batch norm": lambda s: nn.BatchNorm1d(s[1]),
    "layer norm": lambda s: nn.LayerNorm(s[-1]),
    "mse": lambda s: Applied(lambda h: F.mse_loss(h, torch.ones_like(h))),
    "bce": lambda s: Applied(lambda h: F.binary_cross_entropy_with_logits(h, torch.ones_like(h))),
    "product": lambda s: Applied(lambda h: h.mT @ h),
    "matmul": lambda s: Multiplied(s[-1], 6),
    "matmul to nothing": lambda s: Multiplied(s[-1], 0),
}


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, h: Tensor) -> Tensor:
        return self.function(h * 1.0)


class Multiplied(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, out))

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.weight


def outcome(model: nn.Module, shape: tuple[int, ...]) -> str | list[Tensor | None]:
    x = torch.ones(shape, requires_grad=True)
    try:
        out = model(x)
        out.sum().backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return [out, x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("recipe", dibit.recipes.RECIPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore")
def test_nothing_is_as_in_the_plain_model(form: str, recipe: str) -> None:
    for shape in SHAPES:
        torch.manual_seed(0)
        plain = FORMS[form](shape).train()
        model = dibit.compress(copy.deepcopy(plain), recipe)
        expected, found = outcome(plain, shape), outcome(model, shape)
        if isinstance(expected, str) or isinstance(found, str):
            assert found == expected, shape
            continue
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None), shape
            assert a is None or b is None or torch.allclose(a, b, equal_nan=True), shape
