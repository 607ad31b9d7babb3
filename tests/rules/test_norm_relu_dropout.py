"""BatchNorm, ReLU and dropout in one pass: the three functions' numbers, unbiased gradients, fewer bytes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dibit
from dibit import Config, Sample
from dibit.nn import NormReLUDropout, norm_relu_dropout
from dibit.recipes import RECIPES
from tests.unbiased import bias_of

N, D = 400, 16


class Net(nn.Module):
    def __init__(self, p: float = 0.5, apart: bool = False, **settings: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, 3)
        norm = nn.BatchNorm1d(D, **settings)  # type: ignore[arg-type]
        self.middle: nn.Module = (
            nn.Sequential(norm, nn.ReLU(), nn.Dropout(p)) if apart else NormReLUDropout(D, p, **settings)  # type: ignore[arg-type]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
def test_plain_it_is_torchs_three_functions(momentum: float | None, affine: bool) -> None:
    nets = [Net(apart=apart, momentum=momentum, affine=affine) for apart in (True, False)]
    x = torch.randn(N, D)
    for training in (True, True, False):
        found = []
        for net in nets:
            torch.manual_seed(3)
            found.append(net.train(training)(x))
        assert torch.equal(*found)
    norm = nets[0].middle[0]  # type: ignore[index]
    fused = nets[1].middle
    assert fused.state_dict().keys() == norm.state_dict().keys()
    for a, b in zip(norm.state_dict().values(), fused.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("p", [0.0, 0.5, 0.2])
def test_compressed_forward_to_rounding(p: float) -> None:
    net, twin, x = dibit.compress(Net(p), Config()), Net(p, apart=True), torch.randn(N, D)
    kept: list[Tensor] = []
    net.middle.register_forward_hook(lambda module, args, y: kept.append(y.detach()))
    net(x)
    h = F.relu(twin.middle[0](twin.first(x)))  # type: ignore[index]
    y = kept[0]
    share = float(((y == 0) & (h > 0)).sum() / (h > 0).sum())
    assert abs(share - p) < 5 * (p * (1 - p) / float((h > 0).sum())) ** 0.5 + 1e-9
    passed = (y != 0) & (h > 1e-4)
    assert torch.allclose(y[passed], h[passed] / (1 - p), rtol=1e-4, atol=1e-5)
    assert ((y == 0) | (h > -1e-5)).all()
    for own, other in zip(net.middle.state_dict().values(), twin.middle[0].state_dict().values(), strict=True):  # type: ignore[index]
        assert torch.allclose(own, other, rtol=1e-5, atol=1e-6), "running statistics follow"


CONFIGS = {
    "all rows": Config(bits=4),
    "dither": Config(rounding="dither"),
    "sampled": Config(bits=8, reduce=Sample(2), norm=Config(bits=4, reduce=Sample(3))),
    "by gradient": Config(norm=Config(bits=4, reduce=Sample(3, by="gradient"))),
    "torch's mask": Config(bits=4, dropout="mask"),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.statistics
def test_unbiased(config: Config) -> None:
    """Against the gradient that autograd gives for the mask that was drawn."""
    net, twin = dibit.compress(Net(), config), Net(apart=True)
    x, readout = torch.randn(60, D), torch.randn(60, 3)
    masks: list[Tensor] = []
    net.middle.register_forward_hook(lambda module, args, y: masks.append(y.detach() != 0))

    def draw(i: int) -> Tensor:
        torch.manual_seed(i)
        net.zero_grad()
        twin.zero_grad()
        own, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        (net(own) * readout).sum().backward()
        h = twin.middle[0](twin.first(other))  # type: ignore[index]
        (twin.last(torch.relu(h) * masks.pop() * 2) * readout).sum().backward()
        own_bias, its_bias = net.middle.bias.grad, twin.middle[0].bias.grad  # type: ignore[index, union-attr]
        assert torch.allclose(own_bias, its_bias, rtol=1e-4, atol=1e-4), "exact: it needs the masks alone"  # type: ignore[arg-type]
        found = [[p.grad.flatten() for p in part.parameters() if p.grad is not None] for part in (net, twin)]
        return torch.cat([own.grad.flatten(), *found[0]]) - torch.cat([other.grad.flatten(), *found[1]])  # type: ignore[union-attr]

    anchor = torch.ones_like(draw(0))  # the truth of a difference is 0, of which no size could be taken
    assert (bias := bias_of(lambda i: draw(i) + anchor, anchor, 400)).unbiased, bias
    assert not bias.exact


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_keeps_no_more_than_the_three(recipe: str) -> None:
    kept = []
    for apart in (False, True):
        net = dibit.compress(Net(apart=apart), recipe)
        with dibit.track(net) as ledger:
            net(torch.randn(3000, D))
        kept.append((ledger.total, ledger.plain))
    assert kept[0][0] <= kept[1][0]
    assert abs(kept[0][1] - kept[1][1]) <= 64, "the same plain bytes are counted"


def test_what_it_cannot_take_stays_exact() -> None:
    x = torch.randn(N, D)
    net = dibit.compress(Net(1.0))
    assert (net.middle(x) == 0).all()
    net = dibit.compress(Net()).eval()
    assert torch.equal(net(x), Net(apart=True).eval()(x))
    with pytest.raises(ValueError, match="expected a probability"):
        norm_relu_dropout(x, p=1.5)
    with pytest.raises(ValueError, match="2D or 3D"):
        NormReLUDropout(D)(torch.randn(D))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    net = dibit.compress(Net().to(dtype), Config())
    net(torch.randn(N, D, dtype=dtype)).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype and p.grad.isfinite().all() for p in net.parameters())
