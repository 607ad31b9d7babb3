"""Products, quotients and powers of factors gathered, viewed or expanded from sources of every kind and size."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dibit
from tests.unbiased import bias_of

E, D = 40, 8
CONFIGS = {
    "default": "default",
    "8 bits": dibit.Config(bits=8, block=128),
    "compress": dibit.Config(bits=4, block=128, inputs="compress"),
}

SOURCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "computed": lambda x, w: F.linear(x, w),
    "held": lambda x, w: x,
    "dropout of held": lambda x, w: F.dropout(x, 0.5),
    "a parameter": lambda x, w: w.repeat(len(x) // len(w) + 1, 1)[: len(x)],
    "made of constants": lambda x, w: torch.ones(len(x), D),
    "computed again": lambda x, w: x * 2 + 1,
}
SELECTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x[index]": lambda x, index: x[index],
    "index_select": lambda x, index: x.index_select(0, index),
    "view": lambda x, index: x.view(-1, D).unsqueeze(1).transpose(0, 1),
    "expand": lambda x, index: x[:1].expand(E, D),
    "gather and view": lambda x, index: x[index].view(-1, 2, D // 2),
    "gather of an expansion": lambda x, index: x[:, None].expand(-1, 3, D)[index],
}
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a * b": lambda a, b: a * b,
    "b * a": lambda a, b: b * a,
    "a * a": lambda a, b: a * a + b,
    "a / b": lambda a, b: a / (b.square() + 1),
    "b / a": lambda a, b: b / (a.square() + 1),
    "a ** 3": lambda a, b: a**3 + b,
    "bmm": lambda a, b: (a[..., None, :] @ b[..., None]).squeeze(-1),
}


class Net(nn.Module):
    def __init__(self, source: str, selection: str, operation: str, index: Tensor) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.weight, self.other = nn.Parameter(torch.randn(D, D) / 3), nn.Parameter(torch.randn(D))
        self.source, self.selection, self.operation = SOURCES[source], SELECTIONS[selection], OPERATIONS[operation]
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        a = self.selection(self.source(x, self.weight), self.index)
        other = F.linear(x.new_ones(a.numel() // D, D), torch.diag(self.other)).view(a.shape)
        return self.operation(a, other)


@pytest.mark.filterwarnings("ignore:dibit. a training forward pass")
@pytest.mark.parametrize("rows", [0, 1, 4, 30, 300])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.slow
def test_backward_is_the_plain_models(source: str, rows: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, D)
    index = torch.randint(rows, (E if rows < 100 else 2000,)) if rows else torch.zeros(0, dtype=torch.int64)
    for selection in SELECTIONS:
        for operation in OPERATIONS:
            for learnt in (False, True)[:: 1 if operation[:3] == "a *" else 2]:
                found = []
                for i, config in enumerate((None, *CONFIGS.values())):
                    net = Net(source, selection, operation, index)
                    own = x.clone().requires_grad_(learnt)
                    if config is not None:
                        dibit.compress(net, config)
                    torch.manual_seed(3)
                    try:
                        with dibit.track(net) if i % 2 else contextlib.nullcontext():
                            y = net(own)
                        y.square().sum().backward()
                    except (RuntimeError, ValueError) as error:
                        if config is None:
                            break  # nothing to expand or to view
                        raise AssertionError((selection, operation, learnt, config)) from error
                    grads = [p.grad for p in (own, *net.parameters())]
                    found.append((y.detach(), [None if g is None else g.shape for g in grads]))
                for y, shapes in found[1:]:
                    assert shapes == found[0][1]
                    assert source == "dropout of held" or torch.equal(y, found[0][0])


@pytest.mark.parametrize("operation", ["a * b", "a * a", "b / a", "a ** 3"])
@pytest.mark.parametrize("source", ["computed", "held", "dropout of held"])
@pytest.mark.statistics
def test_unbiased(source: str, operation: str) -> None:
    torch.manual_seed(0)
    x, index = torch.randn(12, D), torch.randint(12, (60,))
    config = dibit.Config(bits=2, block=32, dropout="mask")

    def grad(net: Net, i: int) -> Tensor:
        torch.manual_seed(5)
        own = x.clone().requires_grad_()
        net.zero_grad()
        y = net(own)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        return torch.cat([p.grad.flatten() for p in (own, *net.parameters()) if p.grad is not None])

    truth = grad(Net(source, "x[index]", operation, index), 0)
    net = dibit.compress(Net(source, "x[index]", operation, index), config)
    seeds = iter(range(1000))
    state = next(iter(net._forward_pre_hooks.values())).state

    def draw(i: int) -> Tensor:
        state.salt = next(seeds)
        return grad(net, i)

    bias = bias_of(draw, truth, 150)
    assert bias.unbiased or bias.relative < 1e-8, bias
