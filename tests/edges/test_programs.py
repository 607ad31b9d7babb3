"""Programs on the ends of edges, drawn at random: whatever is deferred of them, outcome and gradient are plain torch's.

Codes are replaced by exact residuals, so that every gradient has to be plain torch's to the order of its sums.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dibit
from tests.marks import nothing_compressed

N, E, H, C = 40, 300, 2, 8
GENERATOR = torch.Generator().manual_seed(0)
SOURCE, TARGET = torch.randint(0, N, (2, E), generator=GENERATOR)


class Doubled(torch.autograd.Function):
    """Of somebody else's: autograd gives it the deferred tensor itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x + x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return x * 0.5


GATHERS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, index: x.index_select(0, index),
    lambda x, index: x[index],
    lambda x, index: torch.gather(x, 0, index[:, None, None].expand(E, H, C)),
]


def drawn(seed: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A program of node features (N, H, C), a factor an edge and weights (1, H, C); it gives (N, ...)."""
    number, gather = random.Random(seed), GATHERS[seed % len(GATHERS)]
    steps = [number.randrange(1 << 30) for _ in range(number.randint(1, 5))]
    end = number.randrange(1 << 30)

    def run(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        ends = [gather(x, SOURCE), gather(x, TARGET)]
        values = list(ends)
        for step in steps:
            pick = random.Random(step)
            a, b = pick.choice(values), pick.choice(values)
            values.append(
                pick.choice(
                    (
                        lambda a, b: a + b,
                        lambda a, b: a * b,
                        lambda a, b: a * scale,
                        lambda a, b: scale * a,
                        lambda a, b: F.leaky_relu(a, 0.2),
                        lambda a, b: F.leaky_relu(a + b),
                        lambda a, b: a * weight,
                        lambda a, b: a - b,
                        lambda a, b: a * (a.sum(-1, keepdim=True)),
                        lambda a, b: b * a.sum(-1).unsqueeze(-1),
                        lambda a, b: b * (F.leaky_relu(ends[0] + ends[1], 0.2) * weight).sum(dim=-1)[..., None],
                        lambda a, b: b * (ends[0] * ends[1]).sum(-1)[..., None],
                        lambda a, b: scripted(a),
                        lambda a, b: Doubled.apply(a),
                        lambda a, b: a.clone().mul_(2),
                    )
                )(a, b)
            )
        pick = random.Random(end)
        messages, index = pick.choice(values), pick.choice((TARGET, SOURCE))
        out = pick.choice((torch.zeros, torch.ones))(N, H, C)
        if pick.random() < 0.3:
            wide, reduce = index[:, None, None].expand(E, H, C), pick.choice(("amax", "amin"))
            scatter = pick.choice((Tensor.scatter_reduce_, torch.scatter_reduce, Tensor.scatter_reduce))
            y = scatter(out, 0, wide, messages, reduce, include_self=pick.random() < 0.2)
        elif pick.random() < 0.5:
            y = out.index_add_(0, index, messages)
        elif pick.random() < 0.5:
            y = messages.new_zeros(N, H, C).scatter_add_(0, index[:, None, None].expand_as(messages), messages)
        else:
            y = out.scatter_add(0, index[:, None, None].expand(E, H, C), messages)
        if pick.random() < 0.3:
            wide = TARGET[:, None, None].expand(E, H, C)
            y = y + torch.zeros(N, H, C).scatter_reduce_(0, wide, values[0], "amax", include_self=False)
        y = y + torch.zeros(N, H, C).index_add_(0, TARGET, values[0])  # a gather that others have looked at
        if pick.random() < 0.3:
            x.mul_(2)
        return y

    return run


class Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.lin, self.last = nn.Linear(C, H * C), nn.Linear(H * C, 3)
        self.scale = nn.Parameter(torch.rand(E, H, 1))
        self.weight = nn.Parameter(torch.randn(1, H, C))
        self.program: Any = drawn(seed)
        self.positive = seed % 3 == 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.lin(x)
        h = h.relu() if self.positive else h  # zeros tie
        h = self.program(h.view(N, H, C), self.scale, self.weight)
        return self.last(h.view(N, -1))


def outcome(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    y = model(torch.linspace(-1, 1, N * C).view(N, C))
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@nothing_compressed
@pytest.mark.parametrize("seed", range(300))
def test_outcome_is_the_plain_one(seed: int) -> None:
    torch.manual_seed(seed)
    model = Net(seed)
    try:
        y, grads = outcome(model)
    except RuntimeError:
        pytest.skip("plain torch refuses it: a tensor that it keeps was changed in place")
    for _ in range(2):
        own, found = outcome(dibit.compress(model, "lossless"))
        assert torch.equal(own, y)
        assert found.keys() == grads.keys()
        for name, grad in grads.items():
            assert torch.allclose(found[name], grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max()) + 1e-6), name
