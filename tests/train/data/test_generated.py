"""The generated graph: reproducible, with power-law degrees, and hard for a model that sees no edges."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch_geometric.nn import MLP, GraphSAGE

from dibit.train import DataSettings, ModelSettings, UserError
from dibit.train.data import NodeDataset, load_graph
from dibit.train.models import build_adjacency


def test_size_and_degrees() -> None:
    graph = load_graph(DataSettings(), seed=0)
    assert graph.x.shape == (20_000, 128)
    assert graph.num_classes == 10
    degree = torch.bincount(graph.edge_index[1], minlength=20_000).double()
    assert 13 < degree.mean() < 15
    assert degree.max() > 20 * degree.mean()  # heavy tail
    assert torch.equal(degree, torch.bincount(graph.edge_index[0], minlength=20_000).double())  # undirected
    assert torch.bincount(graph.y).min() > 1_500
    same = graph.y[graph.edge_index[0]] == graph.y[graph.edge_index[1]]
    assert 0.5 < same.double().mean() < 0.6


def test_reproducible_from_the_seed() -> None:
    first, again, other = (load_graph(DataSettings(dataset="planted:1000"), seed=s) for s in (3, 3, 4))
    assert first.num_nodes == 1000
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


@pytest.mark.parametrize("dataset", ["planted:", "planted:many", "planted:5", "planted:-100", "planted:1e5"])
def test_sizes_that_cannot_be_meant(dataset: str) -> None:
    with pytest.raises(UserError, match="after 'planted:' expected a number of nodes"):
        load_graph(DataSettings(dataset=dataset), seed=0)


def _accuracy(graph: NodeDataset, model: torch.nn.Module, *inputs: torch.Tensor, epochs: int = 40) -> float:
    split = graph.split(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(epochs):
        optimizer.zero_grad()
        F.cross_entropy(model(*inputs)[split.train], graph.y[split.train]).backward()
        optimizer.step()
    model.eval()
    return float((model(*inputs).argmax(1) == graph.y)[split.test].double().mean())


@pytest.mark.slow
def test_an_mlp_is_clearly_worse_than_a_gnn() -> None:
    graph = load_graph(DataSettings(dataset="planted:8000"), seed=0)
    adjacency = build_adjacency(ModelSettings(), graph.edge_index, graph.num_nodes, torch.device("cpu"))
    torch.manual_seed(0)
    mlp = _accuracy(graph, MLP([128, 64, 10], dropout=0.5), graph.x)
    sage = _accuracy(graph, GraphSAGE(128, 64, 2, 10, dropout=0.5, norm="BatchNorm"), graph.x, adjacency)
    assert mlp > 0.25  # the features tell something
    assert sage > 0.65
    assert sage - mlp > 0.10
    assert sage < 0.97  # and there is something left to lose
