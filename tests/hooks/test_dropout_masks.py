"""Dropout in what an activation checkpoint within the model runs: the same masks wherever it is run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import dibit

N, D = 64, 32
Function = Callable[[Tensor], Tensor]


class Part(nn.Module):
    """Both kinds of dropout; nothing else is done to x, so that the masks can be read off its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.drop(x), 0.5, self.training)


class Net(nn.Module):
    def __init__(self, how: str, again: Callable[[Function, Tensor], Tensor]) -> None:
        super().__init__()
        self.how, self.again = how, again
        self.drop, self.part = nn.Dropout(0.5), Part()
        self.parts = nn.Sequential(Part(), nn.Dropout(0.4), nn.Identity(), Part())

    def function(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)

    def mixed(self, x: Tensor) -> Tensor:
        return self.part(torch.dropout(self.drop(x), 0.5, self.training))

    def with_gradients(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return self.mixed(x)

    def nested(self, x: Tensor) -> Tensor:
        return self.again(self.part, self.function(x))

    def forward(self, x: Tensor) -> Tensor:
        return FORMS[self.how](self, x)


def made(net: Net, x: Tensor) -> Tensor:
    """A tensor that requires a gradient: from here on all stays exact."""
    return net.mixed(x) + 0 * torch.zeros(1, requires_grad=True)


def asked(net: Net, x: Tensor) -> Tensor:
    """A gradient asked for in the pass runs what is checkpointed again in the middle of it."""
    with torch.enable_grad():
        z = x.detach().clone().requires_grad_()
        y = net.again(net.mixed, z)
        y.sum().backward()
    assert z.grad is not None
    assert torch.equal(y == 0, z.grad == 0)
    return net.part(x)


FORMS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "a function": lambda net, x: net.again(net.function, x),
    "dropout itself": lambda net, x: net.again(F.dropout, x),
    "modules and functions": lambda net, x: net.again(net.mixed, x),
    "a module": lambda net, x: net.again(net.part, x),
    "a module's forward": lambda net, x: net.again(net.part.forward, x),
    "with gradients of its own": lambda net, x: net.again(net.with_gradients, x),
    "one within one": lambda net, x: net.again(net.nested, x),
    "another kind within one": lambda net, x: net.again(lambda z: AGAIN["reentrant"](net.mixed, z), x),
    "a sequence": lambda net, x: checkpoint_sequential(net.parts, 2, x, use_reentrant=net.again is AGAIN["reentrant"]),
    "beside one": lambda net, x: net.function(x) * (net.again(net.function, x) > -1),
    "a tensor is made to require a gradient": made,
    "a gradient is asked for": asked,
}


class Reversible(torch.autograd.Function):
    """Keeps nothing but the generator's state; its first run may have gradients of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Function, gradients: bool) -> Tensor:
        ctx.f, ctx.state = f, torch.get_rng_state()
        ctx.save_for_backward(x)
        with torch.set_grad_enabled(gradients):
            return f(x.detach().requires_grad_(gradients)).detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.enable_grad(), torch.random.fork_rng():
            torch.set_rng_state(ctx.state)
            x = x.detach().requires_grad_()
            y = ctx.f(x)
        torch.autograd.backward(y, dy)
        return x.grad, None, None


AGAIN: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "reentrant": lambda f, x: checkpoint(f, x, use_reentrant=True),
    "not reentrant": lambda f, x: checkpoint(f, x, use_reentrant=False),
    "reversible": lambda f, x: Reversible.apply(x, f, False),
    "reversible with gradients": lambda f, x: Reversible.apply(x, f, True),
}
AROUND: dict[str, Callable[[Function, Tensor], Tensor]] = {"nothing": lambda f, x: f(x), **AGAIN}
SETTINGS: list[Any] = ["default", "small", "iexact", {"part": None, "*": "default"}, {"part": "default"}]


def nets() -> Iterator[tuple[str, Net]]:
    for how, again in product(FORMS, AGAIN):
        yield f"{how}, {again}", Net(how, AGAIN[again]).train()


def inputs() -> Tensor:
    return torch.rand(N, D) + 1


@pytest.mark.parametrize("setting", [None, *SETTINGS], ids=str)
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_a_gradient_has_the_masks_of_its_forward_pass(around: str, setting: Any) -> None:
    torch.manual_seed(0)
    wrong = []
    for name, net in nets():
        if setting is not None:
            dibit.compress(net, setting)
        for _ in range(2):
            x = inputs().requires_grad_()
            y = AROUND[around](net, x)
            y.sum().backward()
            assert x.grad is not None
            if not torch.allclose(x.grad, y.detach() / x.detach(), rtol=1e-4):
                wrong.append(name)
    assert not wrong


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_the_same_seed_has_the_same_masks_without_gradients(setting: Any) -> None:
    torch.manual_seed(0)
    wrong = []
    for name, net in nets():
        dibit.compress(net, setting)
        x = inputs()
        torch.manual_seed(3)
        with torch.no_grad():
            expected, after = net(x), torch.rand(3)
        for _ in range(2):
            torch.manual_seed(3)
            out = net(x.clone().requires_grad_())
            if not (torch.equal(out, expected) and torch.equal(torch.rand(3), after)):
                wrong.append(name)
    assert not wrong
