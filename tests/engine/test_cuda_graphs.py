"""What a CUDA graph would write down, made to run on the CPU: fresh draws at each replay, tables that go on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import GraphSAGE
from torch_geometric.utils import erdos_renyi_graph, to_torch_csr_tensor

import dibit
from dibit.codec import seed_stream, seed_tensor
from dibit.codec.row_sampling import LEFT_OUT
from dibit.codec.seed_stream import Key
from tests.engine.test_row_scores import N, readout, trained
from tests.unbiased import bias_of, gradient
from tests.watched import watched


@pytest.fixture
def captured() -> Iterator[None]:
    """From now on every pass is one that a CUDA graph captures."""
    with seed_stream.as_if_captured("cpu"):
        yield


def backward(net: nn.Module, x: Tensor, r: Tensor) -> list[Tensor]:
    net.zero_grad()
    (net(x) * r).sum().backward()
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def test_every_replay_draws_anew(request: pytest.FixtureRequest) -> None:
    net, x, r = trained()
    request.getfixturevalue("captured")
    first, second = backward(net, x, r), backward(net, x, r)
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        found.append(backward(net, x, r)[0])
    assert not torch.equal(found[0], second[0])


def test_no_seed_is_a_number(request: pytest.FixtureRequest) -> None:
    """A number would be written into the graph once and for all."""
    net, x, r = trained()
    for captured in (False, True):
        if captured:
            request.getfixturevalue("captured")
        with watched(Key.__init__, seed_tensor) as calls:
            backward(net, x, r)
        assert bool(calls) == (not captured)


def test_tables_stay_where_they_are_and_go_on(request: pytest.FixtureRequest) -> None:
    net, x, r = trained()
    table = dibit.scores(net)
    backward(net, x, r)
    before = dict(table.known)
    old = {key: scores.clone() for key, scores in before.items()}
    assert before
    request.getfixturevalue("captured")
    for p in net.parameters():
        p.data.mul_(2)
    louder = r * 64
    backward(net, x, louder)
    assert all(table.known[key] is before[key] for key in before)
    assert all(any(own is scores for own in table._captured) for scores in before.values())
    for key, scores in before.items():
        rose = (scores > old[key]) & (scores < LEFT_OUT)
        assert rose.float().mean() > 0.5, key


@pytest.mark.statistics
def test_unbiased(request: pytest.FixtureRequest) -> None:
    """The backward pass draws the rows of its forward pass, though the table has changed in between."""
    net, x, r = trained(3)
    plain = dibit.decompress(trained(3)[0])
    truth = gradient(plain, x, r)
    request.getfixturevalue("captured")
    changes = [r, readout(N).flip(0)]

    def draw(i: int) -> Tensor:
        backward(net, x, changes[i % 2])  # scores of another loss: the tables move
        return gradient(net, x, r)

    assert (bias := bias_of(draw, truth, 500)).unbiased, bias
    assert not bias.exact


def test_a_sum_over_neighbours_divided_by_their_number_is_a_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyG's mean on a GPU, run here: as few bytes as the mean itself, the same gradients."""
    from torch_geometric.nn.conv import sage_conv

    def as_on_a_gpu(matrix: Tensor, x: Tensor, reduce: str) -> Tensor:
        assert reduce == "mean"
        pointers = matrix.crow_indices()
        degree = pointers[1:] - pointers[:-1]
        return torch.sparse.mm(matrix, x) / degree.view(-1, 1).clamp_(min=1)

    def other(matrix: Tensor, x: Tensor, reduce: str) -> Tensor:
        pointers = matrix.crow_indices()
        degree = pointers[1:] - pointers[:-1]
        return torch.sparse.mm(matrix, x) / degree.view(-1, 1).clamp_(min=2)

    graph = to_torch_csr_tensor(erdos_renyi_graph(300, 0.01), size=(300, 300))
    x = torch.randn(300, 24)
    found = []
    for spmm in (sage_conv.spmm, as_on_a_gpu, other):
        monkeypatch.setattr(sage_conv, "spmm", spmm)
        torch.manual_seed(1)
        net = dibit.compress(GraphSAGE(24, 32, 3, 4, dropout=0.5, norm="batch_norm"), dibit.Config())
        torch.manual_seed(2)
        with dibit.track(net) as ledger:
            y = net(x, graph)
        y.square().mean().backward()
        found.append((ledger.total, [p.grad for p in net.parameters() if p.grad is not None]))
    assert found[1][0] == found[0][0]
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    assert found[2][0] > found[0][0], "another divisor is no mean: the test can fail"
