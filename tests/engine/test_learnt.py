"""`dibit.scores(model).state_dict()` holds all that training has taught, for loops of one's own."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import dibit
from dibit import Config, Sample
from tests.engine.test_loss_reach import D, N, Net, chain

ROWS = torch.arange(20)
CONFIG = Config(bits=2, block=64, reduce=Sample(4, by="gradient"))


def steps(net: nn.Module, count: int, optimizer: torch.optim.Optimizer) -> None:
    x, adjacency = torch.linspace(-1, 1, N * D).view(N, D), chain()
    for _ in range(count):
        optimizer.zero_grad()
        with dibit.batch(net, loss_rows=ROWS):
            y = net(x, adjacency)
        y[ROWS].square().sum().backward()
        optimizer.step()


def made() -> tuple[nn.Module, torch.optim.Optimizer]:
    net = dibit.compress(Net(nn.LayerNorm), CONFIG)
    return net, torch.optim.Adam(net.parameters(), 0.01)


def saved(net: nn.Module, optimizer: torch.optim.Optimizer) -> bytes:
    file = io.BytesIO()
    scores = dibit.scores(net).state_dict()
    torch.save([net.state_dict(), optimizer.state_dict(), scores, torch.get_rng_state()], file)
    return file.getvalue()


def restored(content: bytes) -> tuple[nn.Module, torch.optim.Optimizer]:
    net, optimizer = made()
    weights, moments, scores, draws = torch.load(io.BytesIO(content), weights_only=True)
    net.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    dibit.scores(net).load_state_dict(scores)
    torch.set_rng_state(draws)
    return net, optimizer


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("before", [0, 1, 2, 5])
def test_a_loop_of_ones_own_goes_on_with_the_same_bits(before: int) -> None:
    torch.manual_seed(1)
    net, optimizer = made()
    steps(net, before, optimizer)
    content = saved(net, optimizer)
    steps(net, 3, optimizer)
    again, optimizer = restored(content)
    steps(again, 3, optimizer)
    assert torch.equal(weights(net), weights(again))


def test_an_older_dict_has_scores_alone() -> None:
    net, optimizer = made()
    steps(net, 2, optimizer)
    state = dibit.scores(net).state_dict()
    older = {key: value for key, value in state.items() if value.dtype == torch.uint8}
    assert 0 < len(older) < len(state)
    other, _ = made()
    dibit.scores(other).load_state_dict(older)
    assert {key for key in dibit.scores(other).state_dict() if not key.startswith("draws/")} == older.keys()


def test_without_loss_rows_nothing_is_learnt_of_the_reach() -> None:
    net, _ = made()
    net(torch.randn(N, D), chain()).sum().backward()
    assert not any(key.startswith("reach/") for key in dibit.scores(net).state_dict())


@pytest.mark.parametrize("value", [torch.zeros(3), torch.tensor(1.0), torch.zeros(2, dtype=torch.int64), 3, "x"])
@pytest.mark.parametrize("key", ["a:linear:1", "reach/a:linear:1", "draws/first"])
def test_something_else_is_refused_and_changes_nothing(key: str, value: object) -> None:
    net, optimizer = made()
    steps(net, 2, optimizer)
    before = dibit.scores(net).state_dict()
    with pytest.raises(TypeError, match="expected uint8"):
        dibit.scores(net).load_state_dict({key: value})  # type: ignore[dict-item]
    assert all(torch.equal(value, before[name]) for name, value in dibit.scores(net).state_dict().items())


@pytest.mark.parametrize("how", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_learn_on_their_own(how: object) -> None:
    net, optimizer = made()
    steps(net, 2, optimizer)
    other = how(net)  # type: ignore[operator]
    before = dict(dibit.scores(net).reach.steps)
    assert before
    assert dibit.scores(other).reach.steps == before
    dibit.scores(other).load_state_dict({})
    assert dibit.scores(net).reach.steps == before
