"""What is said of a compressed model of which nothing was compressed: once, and only where it is so."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks

import dibit
from dibit.hooks import nothing_compressed


class Model(nn.Module):
    """Whose training step may call it, its parts, or nothing of it as modules."""

    def __init__(self) -> None:
        super().__init__()
        self.entities, self.linear, self.odd = nn.Embedding(50, 8), nn.Linear(8, 8), nn.Identity()

    def forward(self, i: Tensor) -> Tensor:
        return self.odd(self.entities(i))

    def whole(self, i: Tensor) -> Tensor:
        return self(i).sum()

    def direct(self, i: Tensor) -> Tensor:
        return (self.entities.weight[i] @ self.linear.weight).sum()

    def parts(self, i: Tensor) -> Tensor:
        return (self.entities(i) * self.entities(i + 1)).sum()

    def known_parts(self, i: Tensor) -> Tensor:
        return F.relu(self.linear(self.entities(i))).sum()


def said(
    step: Callable[[Model], Callable[[Tensor], Tensor]], optimizer: bool = True, compress: bool = True
) -> list[str]:
    model = Model()
    if compress:
        dibit.compress(model)
    steps = torch.optim.Adam(model.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            if optimizer:
                steps.zero_grad()
            step(model)(torch.arange(20)).backward()
            if optimizer:
                steps.step()
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("optimizer", [True, False])
@pytest.mark.parametrize("step", ["whole", "direct", "parts", "known_parts"])
def test_it_is_said_once_where_it_is_so(step: str, optimizer: bool) -> None:
    words = said(lambda model: getattr(model, step), optimizer)
    if step == "known_parts" or (step == "direct" and not optimizer):  # no code of Dibit's runs in the last
        assert not words
    else:
        assert len(words) == 1
        assert "compressed Model" in words[0]
        assert "nothing was compressed" in words[0]


def test_nothing_is_said_of_plain_models_of_exact_ones_and_of_other_optimisers() -> None:
    assert not said(lambda model: model.direct, compress=False)
    model, other = dibit.compress(Model(), None), nn.Linear(8, 2)
    idle = dibit.compress(Model())
    gone = dibit.decompress(dibit.compress(Model()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for each, loss in ((model, model.direct(torch.arange(3))), (gone, gone.direct(torch.arange(3)))):
            loss.backward()
            torch.optim.SGD(each.parameters(), 0.1).step()
        idle.linear(torch.ones(1, 8, requires_grad=True)).sum().backward()
        other(torch.ones(1, 8)).sum().backward()
        torch.optim.SGD(other.parameters(), 0.1).step()


@pytest.mark.slow
def test_no_hook_stays_on_optimisers() -> None:
    gc.collect()
    nothing_compressed._waiting.clear(), nothing_compressed._forget(0)
    before = len(_global_optimizer_post_hooks)
    model = dibit.compress(Model())
    assert len(_global_optimizer_post_hooks) == before + 1
    model.known_parts(torch.arange(3)).backward()
    assert len(_global_optimizer_post_hooks) == before
    model = dibit.compress(Model())
    del model
    gc.collect()
    assert len(_global_optimizer_post_hooks) == before
