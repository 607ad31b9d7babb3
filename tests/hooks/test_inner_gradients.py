"""Gradients and transforms that a forward pass asks for itself: exact, or refused with a sentence."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import EquilibriumAggregation, SAGEConv

import dibit

N, D = 50, 16


def energy_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, D), nn.SiLU(), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 1))


def by_grad(e: Tensor, x: Tensor) -> Tensor:
    return -torch.autograd.grad(e.sum(), x, create_graph=True)[0]


class Force(nn.Module):
    def forward(self, e: Tensor, x: Tensor) -> Tensor:
        return by_grad(e, x)


class Makes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach().clone().requires_grad_()


class Molecule(nn.Module):
    """Energies and forces; `how` says who makes the leaf and who asks."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.net, self.force, self.makes = how, energy_net(), Force(), Makes()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.how == "given":
            pass
        elif self.how == "made by a part":
            x = self.makes(x)
        elif self.how == "set":
            x = x.detach().clone()
            x.requires_grad = True
        else:
            x = x.detach().clone().requires_grad_()
        e = self.net(x)
        if self.how == "backward":
            e.sum().backward(inputs=[x], create_graph=True)
            assert x.grad is not None
            return e, -x.grad
        return e, self.force(e, x)


@pytest.mark.parametrize("recipe", dibit.recipes.RECIPES)
@pytest.mark.parametrize("how", ["given", "made", "made by a part", "set", "backward"])
@pytest.mark.filterwarnings("ignore")
def test_forces_are_exact_and_can_be_trained_on(how: str, recipe: str) -> None:
    torch.manual_seed(0)
    plain, x = Molecule(how).train(), torch.randn(N, 3, requires_grad=how == "given")
    model = dibit.compress(copy.deepcopy(plain), recipe)
    results = []
    for net in (plain, model):
        e, f = net(x)
        net.zero_grad()
        (e.sum() + f.square().sum()).backward()
        results.append([e, f, *(p.grad for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_that_it_stays_exact_is_said_once() -> None:
    model, x = dibit.compress(Molecule("made")).train(), torch.randn(N, 3)
    with pytest.warns(UserWarning, match="asks for a gradient inside its forward pass") as caught:
        model(x), model(x)
    assert len(caught) == 1


class Between(nn.Module):
    """A gradient by an intermediate result, of which no leaf tells beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.net = nn.Linear(3, 3), energy_net()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return torch.autograd.grad(self.net(h).sum(), h)[0] + h


def test_what_cannot_be_exact_is_refused_and_the_advice_works() -> None:
    torch.manual_seed(0)
    plain, x = Between().train(), torch.randn(N, 3)
    model = dibit.compress(copy.deepcopy(plain))
    with pytest.raises(RuntimeError, match=r"'net\.1': None, .*'\*': 'default'}\), or the whole model") as error:
        model(x)
    advice = str(error.value).split("leave what is differentiated exact: ")[1]
    assert advice.endswith("dibit.compress(model, None).")
    expected = plain(x)
    assert torch.equal(dibit.compress(model, {"net": None, "*": "default"})(x), expected)
    assert torch.equal(dibit.compress(model, None)(x), expected)


class Marks(nn.Module):
    """Makes a leaf that nobody differentiates by."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h.detach().requires_grad_()
        return self.last(torch.tanh(h))


def test_a_leaf_that_nobody_differentiates_by_keeps_one_pass_exact() -> None:
    model, x = dibit.compress(Marks(), "iexact").train(), torch.randn(N, 3)
    kept = []
    for _ in range(2):
        with dibit.track(model) as saved:
            model(x)
        kept.append([row.module for row in saved.rows if "bit, block" in row.how])
    assert "last" not in kept[0]
    assert "last" in kept[1]


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.last = SAGEConv(D, D), EquilibriumAggregation(D, D, [D]), nn.Linear(D, D)

    def forward(self, x: Tensor, edges: Tensor, index: Tensor) -> Tensor:
        return self.last(self.last(self.pool(self.conv(x, edges).relu(), index)).relu())


def test_a_layer_that_minimises_an_energy_of_its_own_is_exact_and_the_rest_is_not() -> None:
    torch.manual_seed(0)
    plain = Pooled().train()
    x, edges, index = torch.randn(N, D), torch.randint(N, (2, 200)), torch.arange(N) // 2
    model = dibit.compress(copy.deepcopy(plain), "iexact")
    with dibit.track(model) as saved:
        out = model(x, edges, index)
    expected = plain(x, edges, index)
    assert torch.equal(out, expected)
    out.sum().backward()
    expected.sum().backward()
    for own, p in zip(model.pool.parameters(), plain.pool.parameters(), strict=True):
        assert (own.grad is None) == (p.grad is None)
        if p.grad is not None:
            assert torch.allclose(own.grad, p.grad)  # nothing before it in the backward pass is compressed
    compressed = {row.module for row in saved.rows if "bit, block" in row.how}
    assert {"last", "conv.lin_l"} <= compressed
    assert not any(name.startswith("pool") for name in compressed)


def _vmap(f: nn.Module, x: Tensor) -> Tensor:
    return torch.vmap(lambda row: f(row[None])[0])(x)


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "vmap": _vmap,
    "vmap of vmap": lambda f, x: torch.vmap(torch.vmap(lambda v: v.exp() * 2))(f(x)[None])[0],
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).square().sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones_like(x))[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "jacrev": lambda f, x: torch.vmap(torch.func.jacrev(f))(x[:, None])[:, 0, :, 0].sum(1),
    "jacfwd": lambda f, x: torch.vmap(torch.func.jacfwd(f))(x[:, None])[:, 0, :, 0].sum(1),
    "hessian": lambda f, x: torch.func.hessian(lambda y: f(y).sum())(x[:1])[0, :, 0, :],
    "functional_call": lambda f, x: torch.func.functional_call(f, {n: p * 2 for n, p in f.named_parameters()}, (x,)),
    "jacobian": lambda f, x: torch.autograd.functional.jacobian(lambda y: f(y).sum(0), x).sum(0),
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](torch.ones_like(x)),
}


def _vjp_twice(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    out, back = torch.func.vjp(f, x)
    return back(torch.ones_like(out))[0] + back(torch.sigmoid(out))[0] + torch.vmap(back)(torch.ones(2, *x.shape))[0][1]


TRANSFORMS |= {
    "vjp twice": _vjp_twice,
    "vjp of vjp": lambda f, x: _vjp_twice(lambda y: _vjp_twice(f, y), x),
    "vjp by parameters": lambda f, x: (
        x
        + sum(
            g.sum()
            for g in torch.func.vjp(
                lambda values: torch.func.functional_call(f, values, (x,)), dict(f.named_parameters())
            )[1](torch.ones_like(x))[0].values()
        )
    ),
    "jacrev of jacrev": lambda f, x: x + torch.func.jacrev(torch.func.jacrev(lambda y: f(y).sum()))(x[:2]).sum(),
    "jacrev of jacfwd": lambda f, x: x + torch.func.jacrev(torch.func.jacfwd(lambda y: f(y).sum()))(x[:2]).sum(),
}


class Transformed(nn.Module):
    def __init__(self, name: str, features: bool) -> None:
        super().__init__()
        self.features = features  # what is transformed by requires no gradient
        self.name, self.first, self.last = name, nn.Linear(D, D), nn.Linear(D, D)
        self.inner = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.features else torch.tanh(self.first(x))
        return self.last(TRANSFORMS[self.name](self.inner, h))


@pytest.mark.parametrize("recipe", ["default", "iexact"])
@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.filterwarnings("ignore")
def test_transforms_inside_the_forward_pass(name: str, features: bool, recipe: str) -> None:
    torch.manual_seed(0)
    plain, x = Transformed(name, features).train(), torch.randn(N, D)
    model = dibit.compress(copy.deepcopy(plain), recipe)
    out, expected = model(x), plain(x)
    assert torch.equal(out, expected)
    out.sum().backward()
    expected.sum().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
