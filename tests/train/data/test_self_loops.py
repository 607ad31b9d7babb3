"""``--self-loops``: one edge from every node to itself, whatever the source has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dibit.train import DataSettings, ModelSettings
from dibit.train.data import NodeDataset, load_graph
from dibit.train.models import build_adjacency, build_model
from tests.train.conftest import small_arrays

CPU = torch.device("cpu")
N = 60
RAW = small_arrays()["edge_index"]
LOOPS = np.tile(np.arange(N), (2, 1))
SOURCES = {
    "none": RAW[:, RAW[0] != RAW[1]],
    "as they come": RAW,
    "some twice": np.concatenate([LOOPS[:, :5], RAW, LOOPS[:, :5]], axis=1),
    "all": np.concatenate([RAW, LOOPS], axis=1),
    "nothing else": LOOPS[:, :7],
    "no edges": np.zeros((2, 0), np.int64),
}


def load(folder: Path, edge_index: np.ndarray, **settings: Any) -> NodeDataset:
    np.savez(folder / "g.npz", **{**small_arrays(), "edge_index": edge_index})
    return load_graph(DataSettings(dataset=str(folder / "g.npz"), **settings), seed=0)


@pytest.mark.parametrize("undirected", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_one_a_node_and_the_rest_as_without(tmp_path: Path, source: str, undirected: bool) -> None:
    without = load(tmp_path, SOURCES[source], undirected=undirected).edge_index
    edges = load(tmp_path, SOURCES[source], undirected=undirected, self_loops=True).edge_index
    assert not (without[0] == without[1]).any()
    loops = edges[0] == edges[1]
    assert edges[0][loops].tolist() == list(range(N))
    assert torch.equal(edges[:, ~loops], without)
    order = edges[1] * N + edges[0]
    assert (order.diff() > 0).all()  # sorted by target, then source; none twice
    given = {tuple(edge) for edge in SOURCES[source].T.tolist()}
    given |= {(b, a) for a, b in given} if undirected else set()
    assert set(zip(*edges.tolist(), strict=True)) == given | {(i, i) for i in range(N)}


def test_the_graph_of_a_single_node(tmp_path: Path) -> None:
    np.savez(tmp_path / "g.npz", x=np.ones((1, 2)), y=np.zeros(1, int), edge_index=np.zeros((2, 3), int))
    graph = load_graph(DataSettings(dataset=str(tmp_path / "g.npz"), self_loops=True), seed=0)
    assert graph.edge_index.tolist() == [[0], [0]]


@pytest.mark.parametrize("model", ["gcn", "gcn2", "gat"])
def test_models_that_have_them_anyway_see_no_difference(tmp_path: Path, model: str) -> None:
    settings = ModelSettings(model=model, layers=2, hidden=8)
    torch.manual_seed(0)
    net = build_model(settings, 8, 3).eval()
    graphs = [load(tmp_path, RAW, self_loops=loops) for loops in (False, True)]
    adjacencies = [build_adjacency(settings, graph.edge_index, N, CPU) for graph in graphs]
    if model != "gat":
        for part in ("crow_indices", "col_indices", "values"):
            assert torch.equal(*(getattr(adjacency, part)() for adjacency in adjacencies))
    assert torch.equal(*(net(graphs[0].x, adjacency) for adjacency in adjacencies))


@pytest.mark.parametrize("model", ["sage", "gin"])
def test_the_others_aggregate_a_node_itself(tmp_path: Path, model: str) -> None:
    graph = load(tmp_path, RAW, self_loops=True)
    adjacency = build_adjacency(ModelSettings(model=model), graph.edge_index, N, CPU)
    assert adjacency.to_dense().diagonal().tolist() == [1.0] * N
