"""A typical draw is near the gradient, not the mean alone: where small derivatives meet large factors.

With an error that is a part of each element (at most d of it, its standard deviation), the error of a gradient that is
linear in the derivative is at most d of its norm. Geometric levels at 8 bits over 40 octaves have d < 0.06; the linear
ones of 4 bits, of a range that a row has to itself, d < 0.2 or so. A range that is shared with larger elements has no
such bound: there the relative error was in the hundreds.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dibit
from tests.unbiased import bias_of

N, D, EPS = 300, 16, 1e-12
LABELS = (torch.arange(N * D) % 2).view(N, D).float()


class Net(nn.Module):
    """A layer whose gradient by its input is exact, then the function: what it gives cannot be computed again."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D, bias=False)
        nn.init.eye_(self.layer.weight)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


def likelihood(p: Tensor) -> Tensor:
    return torch.log(p + 1e-15) * LABELS[: len(p)] + torch.log(1 - p + 1e-7) * (1 - LABELS[: len(p)])


def unit(x: Tensor) -> Tensor:
    return x / ((x * x).sum(-1, keepdim=True) + EPS).sqrt()


# name -> (function within the model, loss outside of it, bound of the relative error, whether it is exact)
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], float]] = {
    "sigmoid, log": (lambda x: likelihood(torch.sigmoid(x)), lambda y: y, 0.1),
    "sigmoid returned, log": (torch.sigmoid, likelihood, 0.0),
    "sigmoid returned, binary_cross_entropy": (torch.sigmoid, lambda p: F.binary_cross_entropy(p, LABELS), 0.0),
    "sigmoid returned in place": (lambda x: torch.sigmoid_(x * 1), likelihood, 0.0),
    "a view of a sigmoid returned": (
        lambda x: torch.sigmoid(x).view(D, N).T.unsqueeze(0),
        lambda y: (y + EPS).log(),
        0.0,
    ),
    "a part of a sigmoid returned": (lambda x: torch.sigmoid(x)[: N // 2], likelihood, 0.0),
    "a gather of a sigmoid": (lambda x: torch.sigmoid(x)[torch.arange(N)], likelihood, 0.1),
    "sigmoid, changed, returned": (lambda x: torch.sigmoid(x) * 0.9 + 0.05, lambda y: (y - 0.05 + EPS).log(), 0.1),
    "softmax, log": (lambda x: torch.log(F.softmax(x, 1) + 1e-14), lambda y: y * LABELS, 0.1),
    "softmax returned, log": (lambda x: F.softmax(x, 1), lambda y: torch.log(y + 1e-14) * LABELS, 0.0),
    "exp, sum, division, log": (
        lambda x: ((e := x.exp()) / (e.sum(1, keepdim=True) + EPS) + EPS).log(),
        lambda y: y,
        0.2,
    ),
    "exp returned, log": (torch.exp, torch.log, 0.0),
    "tanh, log": (lambda x: torch.log(1 + 1e-7 + torch.tanh(x)), lambda y: y, 1.0),
    "tanh returned, log": (torch.tanh, lambda y: torch.log(1 + 1e-7 + y), 0.0),
    "softplus, log": (lambda x: F.softplus(x).log(), lambda y: y, 0.1),
    "abs, log": (lambda x: (x.abs() + 1e-6).log(), lambda y: y, 0.1),
    "division by a root": (unit, lambda y: y, 0.3),
    "times an inverse root": (lambda x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + EPS), lambda y: y, 0.3),
    "division by a norm": (lambda x: x / (x.norm(dim=-1, keepdim=True) + EPS), lambda y: y, 0.2),
    "times 1 / norm": (lambda x: x * (1 / (x.norm(dim=-1, keepdim=True) + EPS)), lambda y: y, 0.3),
    "normalize": (lambda x: F.normalize(x), lambda y: y, 0.0),
    "square, root": (lambda x: (x.square().sum(-1) + EPS).sqrt(), lambda y: y, 0.2),
    "power, power": (lambda x: (x.pow(2).sum(-1) + EPS).pow(0.5), lambda y: y, 0.2),
    "square returned's root": (lambda x: x.square().sum(-1) + EPS, lambda y: y.sqrt(), 0.1),
    "distance": (lambda x: ((x - x.roll(1, 0)).square().sum(-1) + EPS).sqrt(), lambda y: y, 0.2),
    "cdist": (lambda x: torch.cdist(x[:50], x[50:80]), lambda y: y, 0.0),
    "pairwise_distance": (lambda x: F.pairwise_distance(x, x.roll(1, 0)), lambda y: y, 0.0),
    "cosine": (lambda x: (unit(x) * unit(x.flip(0))).sum(-1), lambda y: y, 0.4),
    "mean over the rows of a square": (lambda x: x / (x.pow(2).mean(0) + EPS).sqrt(), lambda y: y, 0.2),
}


def logits() -> Tensor:
    return torch.randn(N, D) * 6


def with_zeros() -> Tensor:
    return torch.randn(N, D) * (torch.rand(N, 1) > 0.1)


def scales() -> Tensor:
    return torch.randn(N, D) * 10 ** torch.empty(N, 1).uniform_(-3, 2)


INPUTS = {"logits to 20": logits, "rows of zeros": with_zeros, "rows of all scales": scales}


@pytest.mark.parametrize("recipe", ["default", "iexact"])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_typical_draw(name: str, kind: str, recipe: str) -> None:
    torch.manual_seed(0)
    function, loss, bound = FUNCTIONS[name]
    x, net = INPUTS[kind](), Net(function)
    readout = torch.rand(loss(net(x)).shape) + 0.5

    def draw(i: int) -> Tensor:
        torch.manual_seed(i)
        own = x.clone().requires_grad_()
        (loss(net(own)) * readout).mean().backward()
        assert own.grad is not None
        return own.grad.flatten().double()

    truth = draw(0)
    if not truth.isfinite().all():
        pytest.skip("the plain gradient is not finite")
    dibit.compress(net, recipe)
    draws = torch.stack([draw(i) for i in range(40)])
    error = (draws - truth).norm(dim=1) / truth.norm()
    part = draws @ truth / truth.square().sum()
    assert error.median() <= bound + 1e-4, (error.median(), part.median())
    assert error.quantile(0.95) <= 1.5 * bound + 1e-4, error.quantile(0.95)
    assert (part.median() - 1).abs() <= 0.5 * bound + 1e-4, part.median()
    bias = bias_of(lambda i: draws[i], truth, 40)
    assert bias.unbiased or bias.relative < 1e-6, bias
