"""A typical draw is near the gradient, not the mean alone: where small derivatives or factors meet large numbers.

With an error that is a part of each element (at most d of it, its standard deviation), the error of a gradient that is
linear in the derivative is at most d of its norm. Geometric levels at 8 bits over 40 octaves have d < 0.06; the linear
ones of 4 bits, of a range that a row has to itself, d < 0.2 or so. A range that is shared with larger elements has no
such bound: there the relative error was in the hundreds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dibit
from dibit.rules import positive
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

ELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "elu of 0.9": lambda x: F.elu(x, 0.9) + 0.1,
    "elu_": lambda x: F.elu_(x * 1),
    "nn.ELU in place": lambda x: nn.ELU(inplace=True)(x * 1),
}

ELU_ERROR = 0.75  # midway between two of the 9 levels that are 5.2 times apart a draw is 0.68 off
SMALL = 1e-4  # so that the largest factor is far below 2^24, where the levels of an ELU's derivative end
RECIPROCALS: dict[str, Callable[[Tensor], Tensor]] = {
    "log": lambda y: (y + SMALL).log(),
    "reciprocal": lambda y: (y + SMALL).reciprocal(),
    "1 /": lambda y: 1 / (y + SMALL),
    "division": lambda y: y.detach() / (y + SMALL),
    "rsqrt": lambda y: (y + SMALL).rsqrt(),
    "power": lambda y: (y + SMALL).pow(-0.5),
}

# Both factors positive, of a wide range.
POSITIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: F.softmax(x, 1),
    "sigmoid": lambda x: torch.sigmoid(2 * x),
    "exp": torch.exp,
    "rbf": lambda x: torch.exp(-x * x / 4),
    "elu": lambda x: F.elu(x) + 1.001,
}
TOLD = [name for name in POSITIVES if name != "elu"]  # by the tape


def logits() -> Tensor:
    return torch.randn(N, D) * 6


def with_zeros() -> Tensor:
    return torch.randn(N, D) * (torch.rand(N, 1) > 0.1)


def scales() -> Tensor:
    return torch.randn(N, D) * 10 ** torch.empty(N, 1).uniform_(-3, 2)


INPUTS = {"logits to 20": logits, "rows of zeros": with_zeros, "rows of all scales": scales}


class Pair(nn.Module):
    """Two layers, and a function of what they give."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        nn.init.eye_(self.first.weight)
        nn.init.orthogonal_(self.second.weight)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x), self.second(x))


def errors(net: nn.Module, x: Tensor, recipe: str | dibit.Config, draws: int = 24) -> tuple[Tensor, Tensor]:
    """Of each row's gradient: the typical relative error, and the largest draw's part of it. The mean has no bias.

    The loss takes one element of each row, as the likelihood of a class or of a component does.
    """
    readout = F.one_hot(torch.arange(len(x)) % D, D).to(x.dtype)

    def draw(i: int) -> Tensor:
        torch.manual_seed(i)
        own = x.clone().requires_grad_()
        (net(own) * readout).sum().backward()
        assert own.grad is not None
        return own.grad.double()

    truth = draw(0)
    dibit.compress(net, recipe)
    found = torch.stack([draw(i) for i in range(draws)])
    norms = truth.norm(dim=1)
    assert norms.isfinite().all()
    seen = norms > 0.1 * norms.median()
    error = ((found - truth).norm(dim=2) / norms)[:, seen]
    bias = bias_of(lambda i: found[i] / norms[:, None].clamp_min(1e-9), truth / norms[:, None].clamp_min(1e-9), draws)
    assert bias.unbiased or bias.relative < 1e-6, bias
    return error.median(0).values, (found.norm(dim=2) / norms)[:, seen].amax(0)


@pytest.mark.parametrize("recipe", ["default", dibit.Config(bits=8)], ids=["default", "8 bits"])
@pytest.mark.parametrize("after", RECIPROCALS)
@pytest.mark.parametrize("pair", [*itertools.combinations_with_replacement(POSITIVES, 2)], ids=" * ".join)
@pytest.mark.statistics
def test_products_of_positive_factors(pair: tuple[str, str], after: str, recipe: str | dibit.Config) -> None:
    torch.manual_seed(0)
    f, g, then = POSITIVES[pair[0]], POSITIVES[pair[1]], RECIPROCALS[after]
    error, largest = errors(Pair(lambda p, q: then(f(p) * g(q))), torch.randn(N, D) * 5, recipe)
    assert error.quantile(0.95) < (ELU_ERROR if "elu" in pair else 0.6)
    assert largest.max() < 8


@pytest.mark.parametrize("pair", [*itertools.combinations_with_replacement(TOLD, 2)], ids=" * ".join)
def test_where_the_numbers_are_not_at_hand_the_tape_tells(pair: tuple[str, str]) -> None:
    with positive.without_looking():
        test_products_of_positive_factors(pair, "log", "default")


class Gate(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.last(self.first(x)), self.last(self.second(x))))


@pytest.mark.parametrize("looking", [nullcontext, positive.without_looking])
@pytest.mark.parametrize(
    "function",
    [
        lambda p, q: F.relu(p) * F.relu(q),
        lambda p, q: F.relu(p) * q,
        lambda p, q: F.softmax(p, 1) * q,
        lambda p, q: (F.relu(p) + 1e-7) * F.relu(q),
    ],
    ids=["ReLUs", "ReLU and sign", "softmax and sign", "ReLU and a floor"],
)
def test_other_products_keep_4_bits(
    function: Callable[[Tensor, Tensor], Tensor], looking: Callable[[], AbstractContextManager[None]]
) -> None:
    torch.manual_seed(0)
    net, x = Gate(function), torch.randn(N, D)
    dibit.compress(net, "default")
    with looking(), dibit.track(net) as memory:
        net(x)
    products = [row for row in memory.rows if "mul" in row.operation]
    assert products
    assert all("4 bit" in row.how and "8 bit" not in row.how for row in products), [row.how for row in products]


@pytest.mark.parametrize("after", RECIPROCALS)
@pytest.mark.parametrize("name", ELUS)
def test_elu(name: str, after: str) -> None:
    torch.manual_seed(0)
    f, then = ELUS[name], RECIPROCALS[after]
    error, largest = errors(Net(lambda x: then(f(x) + 1)), torch.randn(N, D) * 4, "default")
    assert error.quantile(0.95) < ELU_ERROR
    assert largest.max() < 8


def test_bmm_of_two_softmaxes() -> None:
    torch.manual_seed(0)

    def mixture(p: Tensor, q: Tensor) -> Tensor:
        y = torch.bmm(p.view(-1, 4, 4).softmax(-1), q.view(-1, 4, 4).softmax(-1))
        return (y + 1e-20).log().view(-1, D)

    error, largest = errors(Pair(mixture), torch.randn(N, D) * 8, "default")
    assert error.quantile(0.95) < 0.6
    assert largest.max() < 8


@pytest.mark.parametrize("recipe", ["default", "iexact"])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.statistics
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
