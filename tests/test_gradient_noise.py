"""`dibit.noise`: the error that is estimated from draws is the one that a plain gradient shows."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dibit
from dibit.gradient_noise import estimate
from dibit.study import gradient_error

D = 24


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(F.relu(self.norm(self.first(x))), 0.3, self.training))


def problem(config: Any = "default") -> tuple[nn.Module, Any]:
    x, y = torch.randn(3000, D), torch.randint(4, (3000,))
    model = Net()
    if config is not None:
        dibit.compress(model, config)
    return model, lambda: F.cross_entropy(model(x), y).backward()


def test_known_gradients() -> None:
    drawn = [{"a.w": torch.tensor([3.0, 0.0]), "b": torch.tensor([5.0])}] * 1
    drawn.append({"a.w": torch.tensor([5.0, 0.0]), "b": torch.tensor([5.0])})
    found = estimate([{name: x.double() for name, x in each.items()} for each in drawn])
    # of a: V = 2, |mean|^2 - V / 2 = 15; of b: 0 and 25
    assert found.total == pytest.approx(2 / 40)
    assert found.modules["a"].error == pytest.approx(2 / 15)
    assert found.modules["a"].share == pytest.approx(2 / 40)
    assert (found.modules[""].error, found.modules[""].share) == (0, 0)
    assert "0.05" in str(found)
    assert math.isinf(estimate([{"w": torch.tensor([1.0])}, {"w": torch.tensor([-1.0])}]).total)
    assert estimate([{"w": torch.zeros(2)}] * 2).total == 0


@pytest.mark.parametrize("recipe", ["default", "iexact"])
def test_it_is_the_error_of_the_gradient(recipe: str) -> None:
    torch.manual_seed(3)
    model, step = problem(None)
    true = gradient_error(model, step, recipe, 40)
    dibit.compress(model, recipe)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(dibit.noise(model, step, draws=4).total)
    whole = dibit.noise(model, step, draws=60)
    assert abs(whole.total - true.mean) < 0.25 * true.mean + 5 * true.error
    assert sum(part.share for part in whole.modules.values()) == pytest.approx(whole.total)
    assert found[0] == found[1] > 0, "the same seed, the same draws"


def test_nothing_is_changed() -> None:
    model, step = problem()
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(5):
        optimizer.zero_grad()
        step()
        optimizer.step()
    twin = copy.deepcopy(model.state_dict())
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    learnt = {key: value.clone() for key, value in dibit.scores(model).state_dict().items()}
    random = torch.get_rng_state()
    first = dibit.noise(model, step)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, twin[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))  # type: ignore[arg-type]
    after = dibit.scores(model).state_dict()
    assert after.keys() == learnt.keys()
    assert all(torch.equal(after[key], learnt[key]) for key in learnt)
    assert dibit.noise(model, step).total == first.total
    step()
    after_it = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert len(after_it) == len(grads)


class Odd(nn.Module):
    """A sparse gradient, one that comes in some draws only, a complex one, an expanded buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear, self.other = nn.Embedding(50, D, sparse=True), nn.Linear(D, 4), nn.Linear(D, 4)
        self.turn = nn.Parameter(torch.randn(4, dtype=torch.complex64))
        self.register_buffer("scale", torch.ones(1).expand(4))
        self.calls = 0

    def forward(self, index: Tensor) -> Tensor:
        self.calls += 1
        h = F.relu(self.table(index))
        y = self.linear(h) + (self.other(h) if self.calls % 2 else 0)
        return (y * self.scale * self.turn).real


def test_odd_gradients() -> None:
    model, index = Odd(), torch.randint(50, (3000,))
    dibit.compress(model, dibit.Config(bits=2))
    found = dibit.noise(model, lambda: model(index).square().sum().backward(), draws=4)
    assert 0 < found.modules["linear"].share < math.inf
    assert found.modules["other"].share > 0
    assert set(found.modules) == {"", "table", "linear", "other"}


def test_compiled_models_are_measured_uncompiled() -> None:
    model, _ = problem()
    x, y = torch.randn(3000, D), torch.randint(4, (3000,))
    compiled = torch.compile(model, backend="eager")
    plain = dibit.noise(model, lambda: F.cross_entropy(model(x), y).backward()).total
    found = dibit.noise(model, lambda: F.cross_entropy(compiled(x), y).backward()).total
    assert 0.2 * plain < found < 5 * plain


def test_bad_input() -> None:
    model, step = problem(None)
    with pytest.raises(ValueError, match="nothing is compressed; call dibit"):
        dibit.noise(model, step)
    dibit.compress(model)
    with pytest.raises(ValueError, match="expected at least 2"):
        dibit.noise(model, step, draws=1)
    with pytest.raises(ValueError, match="leaves no gradient"):
        dibit.noise(model, lambda: None)
