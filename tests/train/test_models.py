"""Each model with its adjacency computes what PyTorch Geometric's own computes from the edge list."""

from __future__ import annotations

import pytest
import torch
from torch_geometric.nn import GCN, GIN, GraphSAGE

from dibit.train import ModelSettings
from dibit.train.models import build_adjacency, build_model

CPU = torch.device("cpu")
# Directed on purpose: a transposed adjacency would give other numbers.
EDGES = torch.tensor([[0, 1, 2, 3, 3, 4, 0], [1, 2, 0, 0, 4, 1, 4]])
X = torch.rand(5, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("aggr", [None, "max"])
@pytest.mark.parametrize(("name", "reference"), [("gcn", GCN), ("sage", GraphSAGE), ("gin", GIN)])
def test_same_as_from_the_edge_list(name: str, reference: type, aggr: str | None) -> None:
    if name == "gcn" and aggr:
        pytest.skip("gcn has one aggregation")
    settings = ModelSettings(model=name, layers=2, hidden=8, norm="layer", aggr=aggr)
    model = build_model(settings, 6, 3).eval()
    own = reference(6, 8, 2, 3, norm="LayerNorm", norm_kwargs={"mode": "node"}, **({"aggr": aggr} if aggr else {}))
    own.load_state_dict(model.state_dict())
    adjacency = build_adjacency(settings, EDGES, 5, CPU)
    torch.testing.assert_close(model(X, adjacency), own.eval()(X, EDGES))


@pytest.mark.parametrize("norm", ["none", "batch", "layer", "graph", "pair"])
@pytest.mark.parametrize("name", ["gcn", "sage", "gin", "gat", "gcn2"])
@pytest.mark.parametrize("layers", [1, 3])
def test_every_parameter_is_trained(name: str, norm: str, layers: int) -> None:
    settings = ModelSettings(model=name, layers=layers, hidden=8, norm=norm)
    torch.manual_seed(0)
    model = build_model(settings, 6, 3)
    out = model(X, build_adjacency(settings, EDGES, 5, CPU))
    assert out.shape == (5, 3)
    (out * torch.rand(5, 3)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("residual", [False, True])
def test_gcn2_with_and_without_a_residual(residual: bool) -> None:
    """relu(norm(conv(dropout(x), x0)) + x), and without it bit for bit what it was: the same draws, the same sums."""
    settings = ModelSettings(model="gcn2", layers=3, hidden=8, dropout=0.5, residual=residual)
    torch.manual_seed(0)
    model = build_model(settings, 6, 3)
    adjacency = build_adjacency(settings, EDGES, 5, CPU)
    torch.manual_seed(1)
    out = model(X, adjacency)
    torch.manual_seed(1)
    x = x0 = model.lin_in(model.dropout(X)).relu()
    for conv, norm in zip(model.convs, model.norms, strict=True):
        h = norm(conv(model.dropout(x), x0, adjacency))
        x = (h + x).relu() if residual else h.relu()
    assert torch.equal(out, model.lin_out(model.dropout(x)))


def test_gcn2_is_the_papers_formula() -> None:
    """arXiv:2007.02133, equation 5, one layer without norm: relu(((1-a) P h + a h0) ((1-b) I + b W))."""
    settings = ModelSettings(model="gcn2", layers=1, hidden=4, norm="none", alpha=0.3, theta=0.7)
    model = build_model(settings, 6, 3).eval()
    dense = torch.eye(5)
    dense[EDGES[1], EDGES[0]] = 1
    scale = dense.sum(1).rsqrt()
    p = scale[:, None] * dense * scale
    h0 = model.lin_in(X).relu()
    beta = torch.log(torch.tensor(0.7 + 1))
    mixed = 0.7 * p @ h0 + 0.3 * h0
    hidden = ((1 - beta) * mixed + beta * mixed @ model.convs[0].weight1).relu()
    torch.testing.assert_close(model(X, build_adjacency(settings, EDGES, 5, CPU)), model.lin_out(hidden))
