"""Residuals whose form is settled when the pass ends: whatever the model does after the operation that keeps them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dibit

SETTLED_LATER: dict[str, Callable[[Tensor], Tensor]] = {
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


class LeafWithin(nn.Module):
    """Makes a tensor that requires a gradient, and asks for none: what follows stays exact."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * torch.ones(3, requires_grad=True).sum()


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("on purpose")


class Guarded(nn.Module):
    """Goes on after a module has failed."""

    def __init__(self) -> None:
        super().__init__()
        self.fails = Fails()

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.fails(x)
        except ValueError:
            return x


@pytest.mark.parametrize("name", SETTLED_LATER)
@pytest.mark.parametrize("part", [LeafWithin, Guarded, nn.Identity])
@pytest.mark.parametrize("returned", [True, False])
def test_settled_whatever_follows(name: str, part: type[nn.Module], returned: bool) -> None:
    """And the ledger books it under the operation that keeps it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.part, self.last = nn.Linear(16, 16), part(), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = SETTLED_LATER[name](self.first(x))
            z = self.last(self.part(y))
            k = torch.zeros(2).requires_grad_()
            return (y if returned else k), z

    torch.manual_seed(0)
    net = Net()
    dibit.compress(net)
    x = torch.randn(64, 16)
    for _ in range(3):
        with dibit.track(net) as saved:
            y, z = net(x)
        (y.sum() + z.sum()).backward()
    assert net.first.weight.grad is not None
    rows = [row for row in saved.rows if row.operation == name]
    assert [row.how == "reference (returned)" for row in rows] == [returned]
