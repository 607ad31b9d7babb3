"""Shapes of data sets, and the random graphs and models of these sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dibit.experiments.shapes import ARXIV, BY_EDGES, CORA, MESH, MODELS, NAMED, Shape, mesh, random_graph, sage

TINY = Shape("tiny", 70, 300, 16, 8, 5, 2, 0.5, 20)


def test_widths_and_names() -> None:
    assert ARXIV.widths == [128, 128, 128]
    assert CORA.widths == [1433, 64]
    assert all(shape.name == name and shape.train <= shape.nodes for name, shape in NAMED.items())


def test_a_scaled_shape_keeps_the_model() -> None:
    half = ARXIV.scaled(0.5)
    assert (half.nodes, half.edges, half.train) == (84_672, 1_157_799, 45_470)
    assert half.widths == ARXIV.widths
    least = ARXIV.scaled(1e-9)
    assert (least.nodes, least.edges, least.train) == (64, 64, 64)


def test_a_random_graph_has_the_sizes_and_is_the_same_at_each_call() -> None:
    x, adjacency = random_graph(TINY)
    assert x.shape == (70, 16)
    assert adjacency.layout == torch.sparse_csr
    assert adjacency.shape == (70, 70)
    assert 250 < adjacency.values().numel() <= 300  # of edges drawn twice one stays
    random_graph.cache_clear()
    again, edges = random_graph(TINY)
    assert torch.equal(x, again)
    assert torch.equal(adjacency.col_indices(), edges.col_indices())


def test_a_mesh_is_a_grid_with_one_diagonal() -> None:
    x, adjacency = mesh(MESH)
    assert x.shape == (MESH.nodes, MESH.features)
    assert adjacency.values().numel() == MESH.edges
    dense = mesh(replace(MESH, nodes=9))[1].to_dense()
    assert dense[4].nonzero().flatten().tolist() == [0, 1, 3, 5, 7, 8]
    assert torch.equal(dense, dense.T)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_classes_in_training_from_the_same_weights(name: str) -> None:
    x, adjacency = random_graph(TINY)
    if name in BY_EDGES:
        adjacency = adjacency.to_sparse_coo().indices()
    model, again = MODELS[name](TINY), MODELS[name](TINY)
    assert model.training
    assert model(x, adjacency).shape == (70, 5)
    ours, others = model.state_dict(), again.state_dict()
    names = [name for name, _ in model.named_parameters()]
    assert names
    assert all(torch.equal(ours[name], others[name]) for name in names)


def test_sage_is_that_of_the_models() -> None:
    assert {name: p.shape for name, p in sage(TINY).named_parameters()} == {
        name: p.shape for name, p in MODELS["sage"](TINY).named_parameters()
    }
