"""What a rule need not say: bytes that it saves are in the ledger, and what it draws repeats under a seed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dibit
from dibit.engine.forward_pass import ForwardPass
from tests.marks import nothing_compressed
from tests.unbiased import bias_of

N, D = 50, 16


class Noisy(torch.autograd.Function):
    """y = asinh(x), whose derivative is kept as it is, times 1 or 3 at random."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor) -> Tensor:
        draws = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(int(seed)))
        ctx.save_for_backward(torch.rsqrt(1 + x * x), draws)
        return torch.asinh(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        slope, draws = ctx.saved_tensors
        return dy * slope * (1 + 2 * draws), None


def noisy(forward: ForwardPass, x: Tensor) -> Any:
    seed = forward.seed("noisy", x.device)
    with torch.enable_grad():
        (x * 2).tanh()  # a graph of the rule's own, which it throws away
    return Noisy.apply(x, seed)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.asinh(x + self.weight)


def gradient(model: Net, x: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    model.zero_grad()
    model(x).square().sum().backward()
    assert model.weight.grad is not None
    return model.weight.grad.clone()


@nothing_compressed
def test_what_a_rule_saves_without_a_word_is_counted() -> None:
    model = dibit.compress(Net(), rules={torch.asinh: noisy})
    with dibit.track(model) as ledger:
        model(torch.randn(N, D))
    (row,) = [row for row in ledger.rows if row.operation == "asinh"]
    assert (row.how, row.kept) == ("exact", N * D * (4 + 8))


@nothing_compressed
def test_what_a_rule_draws_repeats_under_a_seed() -> None:
    model, x = dibit.compress(Net(), rules={torch.asinh: noisy}), torch.randn(N, D)
    first = gradient(model, x, 0)
    assert torch.equal(gradient(model, x, 0), first)
    assert not torch.equal(gradient(model, x, 1), first)


def test_the_rule_of_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
    found: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?)```", page, re.S)[1], found)  # type: ignore[index]
    x = torch.randn(N, D)
    truth = gradient(Net(), x, 0)
    model = dibit.compress(Net(), rules={torch.asinh: found["asinh"]})
    bias = bias_of(lambda i: gradient(model, x, i), truth, 64)
    assert bias.unbiased, bias
    assert not bias.exact
