"""`gradient_error` against a case with a known answer, and what it must leave alone."""

import pytest
import torch
from torch import nn
from torch_geometric.nn import GraphSAGE

import dibit
from dibit import Config, Project
from dibit.study import gradient_error


def test_projection_of_a_linear_layer_has_the_known_error() -> None:
    n, d, o, ratio = 64, 32, 8, 4
    x, dy = torch.randn(n, d), torch.randn(n, o)
    lin = nn.Linear(d, o, bias=False)
    found = gradient_error(
        lin,
        lambda: (lin(x) * dy).sum().backward(),
        Config(bits=8, block=16, reduce=Project(ratio), inputs="compress"),
        draws=200,
    )
    # E |G P P^T - G|^2 = |G|^2 (D - 1) / R for entries +-1/sqrt(R)
    assert abs(found.mean - (d - 1) / (d // ratio)) < 5 * found.error
    assert 0 < found.error < 0.2


def test_everything_is_as_before() -> None:
    model = GraphSAGE(16, 16, 2, 4, dropout=0.5, norm="batch_norm").train()
    x, edge_index = torch.randn(50, 16), torch.randint(50, (2, 300))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rng = torch.get_rng_state()

    def step() -> None:
        model(x, edge_index).square().sum().backward()

    found = gradient_error(model, step, "default", draws=3)
    assert found.mean > 0
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in model.parameters())
    assert not model._forward_hooks
    # the same masks for plain and compressed: without a codec there is no error at all
    assert gradient_error(model, step, None, draws=2).mean == 0
    assert gradient_error(model, step, {"convs.0": "exact", "*": None}, draws=2).mean > 0


def test_errors() -> None:
    lin = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="gradient of zero"):
        gradient_error(lin, lambda: lin(torch.randn(3, 4)), "default")
    dibit.compress(lin)
    with pytest.raises(ValueError, match="got a compressed model"):
        gradient_error(lin, lambda: None, "default")
